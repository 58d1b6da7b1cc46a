// The sum's arithmetic, on top of codec_kernels.h and under the same rules: included inside a target region, internal
// linkage, no calls into the standard library.
//
// An element's sum is one integer of 128 bits in two's complement, in units of 2^-72; `hi` and `lo` are its upper and
// lower half. Addition is exact, so the result does not depend on the order, the pieces or the instructions of the
// additions. For int8 and int4, the factor of a group, weight * scale, is therefore rounded to units once; the codes
// are then multiplied by digits of that integer, each as wide as the multiplier takes. Several digits form a window:
// the factor's bits from bit `base` on, which one pass over the codes adds to the sum.

namespace parablock::internal {
namespace {

typedef unsigned __int128 Magnitude;

constexpr double kRounder = 0x1.8p52;  // in units; rounds magnitudes up to 2^51 units, see fold
constexpr int kCoarseBits = 52;        // a coarse unit, the first step of rounding a single value, has 2^52 units
constexpr double kCoarseUnit = 0x1p-20;
constexpr double kFactorLimit = 0x1p31;  // a group with a factor this large has only codes that are 0

struct Factor {
  Magnitude units;
  bool negative;
};

// `value`, not negative and below kFactorLimit, in units, rounded to nearest even.
PARABLOCK_INLINE Magnitude units_of(double value) {
  const uint64_t bits = __builtin_bit_cast(uint64_t, value);
  const int shift = static_cast<int>(bits >> 52) - 1075 + kUnitBits;
  const uint64_t mantissa = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000;
  if (__builtin_expect(shift >= 0, 1)) return static_cast<Magnitude>(mantissa) << shift;
  if (shift < -53) return 0;  // less than half a unit, as are all subnormals
  const uint64_t rest = mantissa << (64 + shift);
  const uint64_t whole = mantissa >> -shift;
  const uint64_t half = uint64_t{1} << 63;
  return whole + (rest > half || (rest == half && (whole & 1)));
}

// The factor of the group at `at`: how much a code of 1 adds to the sum.
template <Format kFormat>
PARABLOCK_INLINE Factor factor_of(const Contribution& one, int64_t at) {
  const int32_t bits = int32_t{load_u16(one.planes.scales + at / group_size(kFormat) * 2)} << 16;
  if ((bits & kInfinity) == kInfinity) return {0, false};
  const double value = one.weight * static_cast<double>(float_of(bits));
  const double size = __builtin_fabs(value);  // also for -0, which a scale may be
  return {size < kFactorLimit ? units_of(size) : 0, value < 0};
}

PARABLOCK_INLINE int lowest_bit(Magnitude units) {
  const uint64_t low = static_cast<uint64_t>(units);
  return low != 0 ? __builtin_ctzll(low) : 64 + __builtin_ctzll(static_cast<uint64_t>(units >> 64));
}

// The factors of one group in all contributions; `any` has the bits that are set in any of the factors.
template <Format kFormat>
struct Factors {
  PARABLOCK_INLINE Factors(const Contribution* in, int64_t count, int64_t at) {
    for (int64_t i = 0; i < count; ++i) {
      of[i] = factor_of<kFormat>(in[i], at);
      any |= of[i].units;
    }
  }
  Factor of[kTogether];
  Magnitude any = 0;
};

// sums += window * 2^base
template <class V, int kCount>
void add_windows(int64_t* hi, int64_t* lo, const int64_t* window, int base) {
  uint64_t low[kCount];
  int64_t high[kCount];
  for (int i = 0; i < kCount; ++i) low[i] = base < 64 ? static_cast<uint64_t>(window[i]) << (base & 63) : 0;
  if (base == 0) {
    for (int i = 0; i < kCount; ++i) high[i] = window[i] >> 63;
  } else if (base < 64) {
    for (int i = 0; i < kCount; ++i) high[i] = window[i] >> (64 - base);
  } else {
    for (int i = 0; i < kCount; ++i) high[i] = window[i] << (base - 64);
  }
  for (int i = 0; i < kCount; ++i) {
    const uint64_t sum = static_cast<uint64_t>(lo[i]) + low[i];
    hi[i] = static_cast<int64_t>(static_cast<uint64_t>(hi[i]) + static_cast<uint64_t>(high[i]) + (sum < low[i]));
    lo[i] = static_cast<int64_t>(sum);
  }
}

template <Format kFormat>
PARABLOCK_INLINE void load_codes(int16_t (&out)[group_size(kFormat)], const uint8_t* codes) {
  constexpr int kGroup = static_cast<int>(group_size(kFormat));
  if constexpr (kFormat == Format::kInt8) {
    for (int i = 0; i < kGroup; ++i) out[i] = static_cast<int8_t>(codes[i]);
  } else {
    for (int i = 0; i < kGroup / 2; ++i) {
      out[2 * i] = static_cast<int16_t>(((codes[i] & 15) ^ 8) - 8);
      out[2 * i + 1] = static_cast<int16_t>(static_cast<int8_t>(codes[i]) >> 4);
    }
  }
}

// Uses digits of 15 bits, for a multiplier of 16 x 16 bits, and three digits per window. The compiler vectorises the
// loops.
template <class V, Format kFormat>
void add_group(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t at, bool empty) {
  constexpr int kGroup = static_cast<int>(group_size(kFormat));
  constexpr int kDigits = 3;
  constexpr int kDigitBits = 15;
  const Factors<kFormat> factors(in, count, at);
  if (empty) {
    for (int i = 0; i < kGroup; ++i) hi[at + i] = lo[at + i] = 0;
  }
  Magnitude left = factors.any;
  for (int base = 0; left != 0; left = base < 128 ? factors.any >> base : 0) {
    base += lowest_bit(left);
    int32_t sums[kDigits][kGroup] = {};
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t window = static_cast<uint64_t>(factors.of[i].units >> base);
      int16_t codes[kGroup];
      load_codes<kFormat>(codes, in[i].planes.codes + code_bytes(kFormat, at));
      for (int d = 0; d < kDigits; ++d) {
        const auto size = static_cast<int16_t>(window >> (d * kDigitBits) & 0x7FFF);
        const auto digit = static_cast<int16_t>(factors.of[i].negative ? -size : size);
        if (digit == 0) continue;
        for (int e = 0; e < kGroup; ++e) sums[d][e] += int32_t{codes[e]} * int32_t{digit};
      }
    }
    int64_t window[kGroup];
    for (int e = 0; e < kGroup; ++e) {
      window[e] = int64_t{sums[0][e]} + int64_t{sums[1][e]} * (1 << kDigitBits) +
                  int64_t{sums[2][e]} * (int64_t{1} << (2 * kDigitBits));
    }
    add_windows<V, kGroup>(hi + at, lo + at, window, base);
    base += kDigits * kDigitBits;
  }
}

template <class V, Format kFormat>
void accumulate_groups(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                       bool empty) {
  for (int64_t at = begin; at < end; at += group_size(kFormat)) {
    for (int64_t first = 0; first < count; first += kTogether) {
      const int64_t here = count - first < kTogether ? count - first : kTogether;
      add_group<V, kFormat>(hi, lo, in + first, here, at, empty && first == 0);
    }
  }
}

// Adding 1.5 * 2^52 units to a value leaves its count of units, rounded to nearest even, in the low bits of the result.
// fold adds all bits of the result to the sum; accumulate_plain subtracts the rounders' own bits in advance.
template <class V>
PARABLOCK_INLINE void fold(typename V::L& coarse_sum, typename V::L& fine_sum, typename V::D value) {
  using D = typename V::D;
  const D rounder = V::set_d(kRounder * kCoarseUnit);
  const D coarse = V::add_d(value, rounder);
  const D rest = V::sub_d(value, V::sub_d(coarse, rounder));
  coarse_sum = V::add_bits(coarse_sum, coarse);
  fine_sum = V::add_bits(fine_sum, V::add_d(rest, V::set_d(kRounder * kUnit)));
}

// fp32 and bf16 have one factor per element, which is rounded to units in two steps of 52 bits each. A few vectors of
// both sums stay in registers while all contributions are added to them.
template <class V, Format kFormat>
void accumulate_plain(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                      bool empty) {
  constexpr int kHalf = V::kLanes / 2;
  constexpr int kSums = 2 * V::kSumVectors;
  constexpr int kElements = V::kSumVectors * V::kLanes;
  using L = typename V::L;
  const uint64_t additions = static_cast<uint64_t>(count);  // modulo 2^64, like all sums of bits
  const L coarse_start = V::set_l(-additions * __builtin_bit_cast(uint64_t, kRounder* kCoarseUnit));
  const L fine_start = V::set_l(-additions * __builtin_bit_cast(uint64_t, kRounder* kUnit));
  for (int64_t at = begin; at < end; at += kElements) {
    L coarse[kSums];
    L fine[kSums];
    for (int i = 0; i < kSums; ++i) {
      coarse[i] = coarse_start;
      fine[i] = fine_start;
    }
    for (const Contribution* one = in; one != in + count; ++one) {
      const typename V::D weight = V::set_d(one->weight);
      for (int i = 0; i < V::kSumVectors; ++i) {
        int64_t ignored = 0;
        const typename V::F value = load_plain<V, kFormat>(one->planes.codes, at + i * V::kLanes, ignored);
        fold<V>(coarse[2 * i], fine[2 * i], V::mul_d(V::lower(value), weight));
        fold<V>(coarse[2 * i + 1], fine[2 * i + 1], V::mul_d(V::upper(value), weight));
      }
    }
    if (empty) {
      for (int i = 0; i < kElements; ++i) hi[at + i] = lo[at + i] = 0;
    }
    int64_t window[kElements];
    for (int i = 0; i < kSums; ++i) V::store_l(window + i * kHalf, fine[i]);
    add_windows<V, kElements>(hi + at, lo + at, window, 0);
    for (int i = 0; i < kSums; ++i) V::store_l(window + i * kHalf, coarse[i]);
    add_windows<V, kElements>(hi + at, lo + at, window, kCoarseBits);
  }
}

// Reads the lower half as a signed number, so that a small negative sum is not the difference of two large numbers.
template <class V>
void mean_range(const int64_t* __restrict__ hi, const int64_t* __restrict__ lo, double total_weight, int64_t numel,
                float* __restrict__ out) {
  for (int64_t i = 0; i < numel; ++i) {
    const int64_t upper = hi[i] + (lo[i] < 0);
    const double sum = static_cast<double>(upper) * kHiUnit + static_cast<double>(lo[i]) * kUnit;
    out[i] = static_cast<float>(sum / total_weight);
  }
}

}  // namespace
}  // namespace parablock::internal
