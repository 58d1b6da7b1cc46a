// Adds up int8 and int4 bodies with AVX-512 VNNI, to a sum or to a mean; codec_avx512.cc has the rest of the codec.
// dpbusd multiplies 64 signed bytes by 64 unsigned bytes and adds each four neighbouring products to a 32-bit sum. Here
// the signed bytes are the codes of four contributions, interleaved, and the unsigned bytes are digits of the
// contributions' factors.
//
// A factor, weight * scale, is an integer in units of 2^-72 (see codec_sum.h) with up to 103 bits. Only the bits from
// the lowest to the highest bit set in any contribution's factor matter. `base` is the number of the lowest; the bits
// from there on are the window. A window is cut into 8-bit digits, six at most; if that is not enough, a further window
// follows with a higher `base`.
//
// Example: two contributions to one int8 element, with the factors 0x123400 and 0x45600 and the codes 3 and -2.
//   base      the lowest bit set in any factor is bit 9 (0x123400 has bit 10, 0x45600 has bit 9): base = 9
//   windows   0x123400 >> 9 = 0x91A and 0x45600 >> 9 = 0x22B
//   digits    0x91A = 9, 0x1A and 0x22B = 2, 0x2B: digit 0 is {0x1A, 0x2B, 0, 0}, digit 1 is {9, 2, 0, 0}
//   dpbusd    digit 0: 3 * 0x1A - 2 * 0x2B = -8; digit 1: 3 * 9 - 2 * 2 = 23
//   window    -8 + (23 << 8) = 5880, the window of the element's sum
//   add       sum += 5880 << 9, which is 3 * 0x123400 - 2 * 0x45600
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>

#include "codec_table.h"

#ifdef __clang__
#define PARABLOCK_VNNI "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
#else
#define PARABLOCK_VNNI "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,prefer-vector-width=512"
// GCC 12 reports the deliberately undefined operand inside its own intrinsics as if it were an error in this file.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wunused-function"

PARABLOCK_TARGET_BEGIN(PARABLOCK_VNNI)
#include "codec_kernels.h"

#include "codec_sum.h"

namespace parablock::internal {
namespace {

constexpr int kBlock = 64;  // elements per block: one register of codes
constexpr int kFour = 4;  // contributions whose products one dpbusd adds
constexpr int kMostDigits = 6;  // of a window, so that the window of a sum fits into 64 bits
constexpr int64_t kLong = 1 << 16;  // elements; the sums of this many fill a second-level cache
// How many elements ahead the codes of each contribution are prefetched, into the second-level cache: bodies often
// begin at the same offset in a page, so sixteen contributions would evict one another from the first-level cache.
constexpr int kPrefetchCodes = 1024;

// Word [q][j] has digit j of the contributions 4q to 4q + 3, a byte each; 0 for missing contributions.
struct Digits {
  uint32_t words[kTogether / kFour][8];
};

// The windows of one group, at the same `base` in every contribution.
struct Windows {
  PARABLOCK_INLINE void end_at(int64_t count) {
    for (int64_t i = count; i < count + kFour; ++i) of[i] = 0;
  }
  uint64_t of[kTogether + kFour];  // by contribution, followed by zeros
  uint64_t negative = 0;  // bit i: the factor of contribution i is negative
};

// Cuts windows into digits: transposes bytes, so that digit j of four contributions becomes one word.
PARABLOCK_INLINE void cut(const Windows& windows, int64_t count, Digits& digits) {
  for (int64_t first = 0; first < count; first += kFour) {
    __m128i window[kFour];
    for (int64_t i = 0; i < kFour; ++i) window[i] = _mm_cvtsi64_si128(static_cast<int64_t>(windows.of[first + i]));
    const __m128i ab = _mm_unpacklo_epi8(window[0], window[1]);
    const __m128i cd = _mm_unpacklo_epi8(window[2], window[3]);
    auto* const words = reinterpret_cast<__m128i*>(digits.words[first / kFour]);
    _mm_storeu_si128(words, _mm_unpacklo_epi16(ab, cd));
    _mm_storeu_si128(words + 1, _mm_unpackhi_epi16(ab, cd));
  }
}

// Returns 64 codes as bytes. Digits are unsigned, so a negative factor negates the codes instead. Only int4 needs that,
// since an int8 scale is never negative.
template <Format kFormat>
PARABLOCK_INLINE __m512i codes_at(const Contribution& one, int64_t at, bool negative) {
  if constexpr (kFormat == Format::kInt8) {
    const uint8_t* const codes = one.planes.codes + at;
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(codes) + kPrefetchCodes), _MM_HINT_T1);
    return _mm512_loadu_si512(codes);
  } else {
    const uint8_t* const codes = one.planes.codes + at / 2;
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(codes) + kPrefetchCodes / 2), _MM_HINT_T1);
    const __m512i bytes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(bytes, _mm512_slli_epi16(bytes, 4)), _mm512_set1_epi8(15));
    const __m128i values = negative ? _mm_setr_epi8(0, -1, -2, -3, -4, -5, -6, -7, 8, 7, 6, 5, 4, 3, 2, 1)
                                    : _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), nibbles);
  }
}

// Interleaves the codes of four contributions, so that the four codes of an element lie in one 32-bit word. The words
// stay within their 128-bit lanes: word i in lane L of register q belongs to element 16 L + 4 q + i.
PARABLOCK_INLINE void interleave(const __m512i (&in)[kFour], __m512i (&out)[kFour]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(in[0], in[1]);
  const __m512i ab_high = _mm512_unpackhi_epi8(in[0], in[1]);
  const __m512i cd_low = _mm512_unpacklo_epi8(in[2], in[3]);
  const __m512i cd_high = _mm512_unpackhi_epi8(in[2], in[3]);
  out[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

// Moves sums from the order that `interleave` makes into the order of their elements.
PARABLOCK_INLINE void put_in_order(__m512i (&sums)[kFour]) {
  const __m512i low01 = _mm512_shuffle_i32x4(sums[0], sums[1], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(sums[0], sums[1], 0xEE);
  const __m512i low23 = _mm512_shuffle_i32x4(sums[2], sums[3], 0x44);
  const __m512i high23 = _mm512_shuffle_i32x4(sums[2], sums[3], 0xEE);
  sums[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
  sums[1] = _mm512_shuffle_i32x4(low01, low23, 0xDD);
  sums[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
  sums[3] = _mm512_shuffle_i32x4(high01, high23, 0xDD);
}

// How a window reaches the sums in memory. kStream bypasses the cache, for sums that are so long that they would leave
// the cache before their next use; it needs aligned addresses.
enum class Store {
  kAdd,  // sum += window
  kOverwrite,  // sum = window: the first window of an empty sum
  kStream,  // the same, past the cache
};

constexpr int kParts = 8;  // of a block, with eight elements each

// Where the windows of one group go: to the sums, as window * 2^base.
struct IntoSum {
  PARABLOCK_INLINE void put(int64_t at, const __m512i (&windows)[kParts]) const {
    for (int i = 0; i < kParts; ++i) put_part(at + 8 * i, windows[i]);
  }

  PARABLOCK_INLINE void put(int64_t at, const __m256i (&windows)[kParts]) const {
    for (int i = 0; i < kParts; ++i) put_part(at + 8 * i, _mm512_cvtepi32_epi64(windows[i]));
  }

  PARABLOCK_INLINE void put_part(int64_t at, __m512i window) const {
    const __m512i low = _mm512_sll_epi64(window, _mm_cvtsi32_si128(base));  // 0 from 64 on
    const __m512i high = base < 64 ? _mm512_sra_epi64(window, _mm_cvtsi32_si128(64 - base))
                                   : _mm512_sll_epi64(window, _mm_cvtsi32_si128(base - 64));
    if (store == Store::kOverwrite) {
      _mm512_storeu_si512(lo + at, low);
      _mm512_storeu_si512(hi + at, high);
      return;
    }
    if (store == Store::kStream) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(lo + at), low);
      _mm512_stream_si512(reinterpret_cast<__m512i*>(hi + at), high);
      return;
    }
    const __m512i sum = _mm512_add_epi64(_mm512_loadu_si512(lo + at), low);
    const __mmask8 carry = _mm512_cmplt_epu64_mask(sum, low);
    const __m512i upper = _mm512_add_epi64(_mm512_loadu_si512(hi + at), high);
    _mm512_storeu_si512(lo + at, sum);
    _mm512_storeu_si512(hi + at, _mm512_mask_sub_epi64(upper, carry, upper, _mm512_set1_epi64(-1)));
  }

  int64_t* hi;
  int64_t* lo;
  int base;
  Store store;
};

// Or straight to the mean, where one window is all that there is to a sum. With at most `kMostDigitsOfMean` digits it
// is exact as a double, and so is its product with a unit, so the mean has the same bits as by way of the sum.
//
// A division takes longer than all the rest. The product with the rounded reciprocal is at most three units in the last
// place off the quotient that is asked for. Both become the same fp32 value unless a bound between two fp32 values lies
// in between, which the 29 bits that are rounded off tell; only then the block takes divisions.
struct IntoMean {
  static constexpr int kMostDigitsOfMean = 5;
  static_assert(kTogether * 128 * ((int64_t{1} << 8 * kMostDigitsOfMean) - 1) < int64_t{1} << 53);

  IntoMean(float* to, double weight) : out(to), total_weight(weight), reciprocal(1 / weight) {}

  // Returns whether windows at this base can be taken: whether no mean of theirs but zero is subnormal in fp32, nor a
  // factor in double.
  PARABLOCK_INLINE bool set_base(int base) {
    unit = __builtin_bit_cast(double, static_cast<uint64_t>(base - kUnitBits + 1023) << 52);  // 2^(base - kUnitBits)
    factor = reciprocal * unit;
    return factor >= 0x1p-125 && factor <= 0x1p127;
  }

  static PARABLOCK_INLINE __m512d exactly(__m512i window) { return _mm512_cvtepi64_pd(window); }
  static PARABLOCK_INLINE __m512d exactly(__m256i window) { return _mm512_cvtepi32_pd(window); }

  template <class Window>
  PARABLOCK_INLINE void put(int64_t at, const Window (&windows)[kParts]) const {
    constexpr int64_t kRoundedOff = (1 << 29) - 1;
    constexpr int64_t kHalfway = 1 << 28;
    constexpr int64_t kClose = 8;  // more than 3, to be safe: a division too many costs nothing
    __m512d means[kParts];
    __m512i closest = _mm512_set1_epi64(kRoundedOff);
    for (int i = 0; i < kParts; ++i) {
      means[i] = _mm512_mul_pd(exactly(windows[i]), _mm512_set1_pd(factor));
      const __m512i rest = _mm512_and_si512(_mm512_castpd_si512(means[i]), _mm512_set1_epi64(kRoundedOff));
      // Below kHalfway - kClose this wraps around to a large number.
      closest = _mm512_min_epu64(closest, _mm512_sub_epi64(rest, _mm512_set1_epi64(kHalfway - kClose)));
    }
    if (__builtin_expect(_mm512_cmple_epu64_mask(closest, _mm512_set1_epi64(2 * kClose)) != 0, 0)) {
      for (int i = 0; i < kParts; ++i)
        means[i] =
            _mm512_div_pd(_mm512_mul_pd(exactly(windows[i]), _mm512_set1_pd(unit)), _mm512_set1_pd(total_weight));
    }
    for (int i = 0; i < kParts; ++i) _mm256_storeu_ps(out + at + 8 * i, _mm512_cvtpd_ps(means[i]));
  }

  float* out;
  double total_weight;
  double reciprocal;
  double unit = 0;
  double factor = 0;
};

// Multiplies one block of all contributions by `kDigits` digits of their factors, and hands on the windows.
template <Format kFormat, int kDigits, class Into>
void add_block(const Into& into, const Contribution* in, int64_t count, uint64_t negative, const Digits& digits,
               int64_t at) {
  constexpr int kPairs = (kDigits + 1) / 2;
  __m512i sums[kDigits][kFour];
  for (int j = 0; j < kDigits; ++j)
    for (int q = 0; q < kFour; ++q) sums[j][q] = _mm512_setzero_si512();
  for (int64_t first = 0; first < count; first += kFour) {
    __m512i apart[kFour];
    for (int64_t i = 0; i < kFour; ++i) {
      const int64_t one = first + i < count ? first + i : first;  // a missing one has digits 0, so any codes do
      apart[i] = codes_at<kFormat>(in[one], at, negative >> one & 1);
    }
    __m512i together[kFour];
    interleave(apart, together);
    for (int j = 0; j < kDigits; ++j) {
      const __m512i digit = _mm512_set1_epi32(static_cast<int32_t>(digits.words[first / kFour][j]));
      for (int q = 0; q < kFour; ++q) sums[j][q] = _mm512_dpbusd_epi32(sums[j][q], digit, together[q]);
    }
  }
  // Two neighbouring digits' sums still fit into 32 bits together: |sum| <= 64 * 128 * 255 < 2^21.
  __m512i pairs[kPairs][kFour];
  for (int p = 0; p < kPairs; ++p) {
    for (int q = 0; q < kFour; ++q) {
      pairs[p][q] = sums[2 * p][q];
      if (2 * p + 1 < kDigits)
        pairs[p][q] = _mm512_add_epi32(pairs[p][q], _mm512_slli_epi32(sums[(2 * p + 1) % kDigits][q], 8));
    }
    put_in_order(pairs[p]);
  }
  // Part 2q + h of the block is half h of register q.
  __m256i narrow[kPairs][kParts];
  for (int p = 0; p < kPairs; ++p) {
    for (int q = 0; q < kFour; ++q) {
      narrow[p][2 * q] = _mm512_castsi512_si256(pairs[p][q]);
      narrow[p][2 * q + 1] = _mm512_extracti64x4_epi64(pairs[p][q], 1);
    }
  }
  if constexpr (kPairs == 1) {
    into.put(at, narrow[0]);
  } else {
    __m512i windows[kParts];
    for (int i = 0; i < kParts; ++i) {
      windows[i] = _mm512_cvtepi32_epi64(narrow[0][i]);
      for (int p = 1; p < kPairs; ++p)
        windows[i] = _mm512_add_epi64(windows[i], _mm512_slli_epi64(_mm512_cvtepi32_epi64(narrow[p][i]), 16 * p));
    }
    into.put(at, windows);
  }
}

template <class Into>
using AddBlock = void (*)(const Into& into, const Contribution* in, int64_t count, uint64_t negative,
                          const Digits& digits, int64_t at);

template <Format kFormat, class Into>
constexpr AddBlock<Into> kAddBlock[kMostDigits] = {&add_block<kFormat, 1, Into>, &add_block<kFormat, 2, Into>,
                                                   &add_block<kFormat, 3, Into>, &add_block<kFormat, 4, Into>,
                                                   &add_block<kFormat, 5, Into>, &add_block<kFormat, 6, Into>};

PARABLOCK_INLINE int bit_length(Magnitude units) {
  const uint64_t high = static_cast<uint64_t>(units >> 64);
  return high != 0 ? 128 - __builtin_clzll(high) : 64 - __builtin_clzll(static_cast<uint64_t>(units) | 1);
}

template <Format kFormat, class Into>
PARABLOCK_INLINE void add_windows_of_group(const Into& into, const Contribution* in, int64_t count,
                                           const Windows& windows, int64_t at, int digit_count) {
  Digits digits;
  cut(windows, count, digits);
  for (int64_t block = at; block < at + group_size(kFormat); block += kBlock)
    kAddBlock<kFormat, Into>[digit_count - 1](into, in, count, windows.negative, digits, block);
}

PARABLOCK_INLINE void clear(int64_t* hi, int64_t* lo, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) hi[i] = lo[i] = 0;
}

// Adds one group with factors of any width: one window after the other.
template <Format kFormat>
void add_group_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t at, bool empty,
                    bool is_long) {
  const Factors<kFormat> factors(in, count, at);
  if (factors.any == 0 && empty) clear(hi, lo, at, at + group_size(kFormat));
  Windows windows;
  windows.end_at(count);
  for (int64_t i = 0; i < count; ++i) windows.negative |= uint64_t{factors.of[i].negative} << i;
  Magnitude left = factors.any;
  for (int base = 0; left != 0; left = base < 128 ? factors.any >> base : 0) {
    const int zeros = lowest_bit(left);
    base += zeros;
    const int wanted = (bit_length(left >> zeros) + 7) / 8;
    const int digit_count = wanted < kMostDigits ? wanted : kMostDigits;
    for (int64_t i = 0; i < count; ++i) windows.of[i] = static_cast<uint64_t>(factors.of[i].units >> base);
    const bool last = digit_count == wanted;
    const Store store = !empty ? Store::kAdd : last && is_long ? Store::kStream : Store::kOverwrite;
    add_windows_of_group<kFormat>(IntoSum{hi, lo, base, store}, in, count, windows, at, digit_count);
    empty = false;
    base += 8 * digit_count;
  }
}

// The windows of eight groups at once, one group per 64-bit lane, which `add_group_vnni` computes for one group at a
// time. In the uploads of a model, the factors of a group differ by a few binades and have few bits, so one window
// nearly always covers all of them. Here each factor's bits are shifted so that bit 63 of a lane stands for the highest
// bit of the group's largest factor. `fits` tells which groups one window covers.
template <Format kFormat>
struct EightGroups {
  static constexpr int64_t kGroups = 8;

  PARABLOCK_INLINE EightGroups(const Contribution* in, int64_t count, int64_t at) {
    const __m512i implicit = _mm512_set1_epi64(int64_t{1} << 52);
    __m512i top = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; ++i) {
      const auto* const scales = reinterpret_cast<const __m128i*>(in[i].planes.scales + at / group_size(kFormat) * 2);
      const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(scales)), 16);
      const __m512d value = _mm512_mul_pd(_mm512_set1_pd(in[i].weight), _mm512_cvtps_pd(_mm256_castsi256_ps(bits)));
      const __m512d size = _mm512_abs_pd(value);
      if constexpr (kFormat == Format::kInt4) negative[i] = _mm512_cmp_pd_mask(value, _mm512_setzero_pd(), _CMP_LT_OQ);
      const __mmask8 counts = _mm512_cmp_pd_mask(size, _mm512_set1_pd(kFactorLimit), _CMP_LT_OQ);  // false for NaN
      const __m512i exponent = _mm512_srli_epi64(_mm512_maskz_mov_epi64(counts, _mm512_castpd_si512(size)), 52);
      const __mmask8 normal = _mm512_test_epi64_mask(exponent, exponent);
      const __m512i fraction = _mm512_and_si512(_mm512_castpd_si512(size), _mm512_set1_epi64((int64_t{1} << 52) - 1));
      exponents[i] = exponent;
      frames[i] = _mm512_maskz_slli_epi64(normal, _mm512_or_si512(fraction, implicit), 11);
      top = _mm512_max_epu64(top, exponent);
    }
    __m512i any = _mm512_setzero_si512();
    __mmask8 cut_off = 0;
    for (int64_t i = 0; i < count; ++i) {
      const __m512i down = _mm512_sub_epi64(top, exponents[i]);
      const __m512i aligned = _mm512_srlv_epi64(frames[i], down);
      cut_off |= _mm512_cmpneq_epi64_mask(_mm512_sllv_epi64(aligned, down), frames[i]);
      frames[i] = aligned;
      any = _mm512_or_si512(any, aligned);
    }
    alignas(64) int64_t tops[kGroups];
    alignas(64) uint64_t anys[kGroups];
    _mm512_store_si512(tops, top);
    _mm512_store_si512(anys, any);
    for (int64_t g = 0; g < kGroups; ++g) {
      empty[g] = anys[g] == 0;
      zeros[g] = empty[g] ? 0 : __builtin_ctzll(anys[g]);
      digits[g] = (64 - zeros[g] + 7) / 8;
      base[g] = static_cast<int>(tops[g]) - kFrameExponent + zeros[g];
      fits[g] = !(cut_off >> g & 1) && (empty[g] || (digits[g] <= kMostDigits && base[g] >= 0));
    }
  }

  PARABLOCK_INLINE void windows_of(int64_t g, int64_t count, Windows& windows) const {
    for (int64_t i = 0; i < count; ++i) {
      windows.of[i] = reinterpret_cast<const uint64_t*>(&frames[i])[g] >> zeros[g];
      if constexpr (kFormat == Format::kInt4) windows.negative |= uint64_t{negative[i] >> g & 1u} << i;
    }
  }

  // The exponent field of a double whose highest bit is 2^63 units: then bit 0 of its frame counts one unit.
  static constexpr int kFrameExponent = 1023 - kUnitBits + 63;

  __m512i exponents[kTogether];
  __m512i frames[kTogether];  // by contribution: the bits of its factors, aligned to each group's largest factor
  __mmask8 negative[kTogether];  // only for int4
  bool empty[kGroups];
  bool fits[kGroups];
  int zeros[kGroups];
  int digits[kGroups];
  int base[kGroups];
};

template <Format kFormat>
void add_eight_groups(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t at, bool empty,
                      bool is_long) {
  const EightGroups<kFormat> eight(in, count, at);
  for (int64_t g = 0; g < eight.kGroups; ++g) {
    const int64_t here = at + g * group_size(kFormat);
    if (!eight.fits[g]) {
      add_group_vnni<kFormat>(hi, lo, in, count, here, empty, is_long);
    } else if (!eight.empty[g]) {
      Windows windows;
      windows.end_at(count);
      eight.windows_of(g, count, windows);
      const Store store = !empty ? Store::kAdd : is_long ? Store::kStream : Store::kOverwrite;
      const IntoSum into{hi, lo, eight.base[g], store};
      add_windows_of_group<kFormat>(into, in, count, windows, here, eight.digits[g]);
    } else if (empty) {
      clear(hi, lo, here, here + group_size(kFormat));
    }
  }
}

template <Format kFormat>
void accumulate_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                     bool empty) {
  constexpr int64_t kEightGroups = EightGroups<kFormat>::kGroups * group_size(kFormat);
  const bool aligned = (reinterpret_cast<uintptr_t>(hi) | reinterpret_cast<uintptr_t>(lo)) % sizeof(__m512i) == 0;
  const bool is_long = aligned && count <= kTogether && end - begin >= kLong;
  int64_t at = begin;
  auto add_all = [&](auto add) {
    for (int64_t first = 0; first < count; first += kTogether) {
      const int64_t here = count - first < kTogether ? count - first : kTogether;
      add(hi, lo, in + first, here, at, empty && first == 0, is_long);
    }
  };
  for (; at + kEightGroups <= end; at += kEightGroups) add_all(&add_eight_groups<kFormat>);
  for (; at < end; at += group_size(kFormat)) add_all(&add_group_vnni<kFormat>);
}

// The mean of one group, by way of its sum.
template <Format kFormat>
void mean_of_group(const Contribution* in, int64_t count, double total_weight, int64_t at, float* out) {
  constexpr int64_t kGroup = group_size(kFormat);
  Contribution moved[kTogether];
  for (int64_t i = 0; i < count; ++i) {
    moved[i] = in[i];
    moved[i].planes.scales += scale_bytes(kFormat, at);
    moved[i].planes.codes += code_bytes(kFormat, at);
  }
  alignas(64) int64_t hi[kGroup];
  alignas(64) int64_t lo[kGroup];
  add_group_vnni<kFormat>(hi, lo, moved, count, 0, true, false);
  mean_range<void>(hi, lo, total_weight, kGroup, out + at);
}

template <Format kFormat>
void mean_vnni(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kGroup = group_size(kFormat);
  constexpr int64_t kEightGroups = EightGroups<kFormat>::kGroups * kGroup;
  IntoMean into(out, total_weight);
  int64_t at = begin;
  for (; at + kEightGroups <= end; at += kEightGroups) {
    const EightGroups<kFormat> eight(in, count, at);
    for (int64_t g = 0; g < eight.kGroups; ++g) {
      const int64_t here = at + g * kGroup;
      if (eight.empty[g]) {
        for (int64_t i = here; i < here + kGroup; ++i) out[i] = 0;
      } else if (eight.fits[g] && eight.digits[g] <= into.kMostDigitsOfMean && into.set_base(eight.base[g])) {
        Windows windows;
        windows.end_at(count);
        eight.windows_of(g, count, windows);
        add_windows_of_group<kFormat>(into, in, count, windows, here, eight.digits[g]);
      } else {
        mean_of_group<kFormat>(in, count, total_weight, here, out);
      }
    }
  }
  for (; at < end; at += kGroup) mean_of_group<kFormat>(in, count, total_weight, at, out);
}

}  // namespace

void mean_int8_vnni(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end,
                    float* out) {
  mean_vnni<Format::kInt8>(in, count, total_weight, begin, end, out);
}

void mean_int4_vnni(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end,
                    float* out) {
  mean_vnni<Format::kInt4>(in, count, total_weight, begin, end, out);
}

void accumulate_int8_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                          bool empty) {
  accumulate_vnni<Format::kInt8>(hi, lo, in, count, begin, end, empty);
}

void accumulate_int4_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                          bool empty) {
  accumulate_vnni<Format::kInt4>(hi, lo, in, count, begin, end, empty);
}

}  // namespace parablock::internal
PARABLOCK_TARGET_END
#endif
