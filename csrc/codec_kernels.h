// The codec's arithmetic, stated once over a vector layer V (codec_portable.cc, codec_avx2.cc, codec_avx512.cc).
// Each of those includes this file inside its own target region, so everything here has internal linkage: of a shared
// function the linker could keep the copy compiled for instructions that the machine lacks. For the same reason this
// file calls nothing from the standard library.
//
// V: kLanes floats in F, as many int32 in I, half as many doubles in D. Every operation of V is exact or is one IEEE
// operation rounded to nearest even, so all layers give the same bits. No code changes the rounding or denormal modes.

namespace parablock::internal {
namespace {

constexpr int32_t kInfinity = 0x7F800000;
constexpr int32_t kZeroGroup = (127 - 100) << 23;    // bits of 2^-100
constexpr int32_t kBf16Overflow = 0x7F7F8000;        // the least magnitude that rounds to a bf16 infinity
constexpr uint16_t kBadGroup = 0x7FC0;

PARABLOCK_INLINE float float_of(int32_t bits) { return __builtin_bit_cast(float, bits); }
PARABLOCK_INLINE int32_t bits_of(float value) { return __builtin_bit_cast(int32_t, value); }

PARABLOCK_INLINE uint16_t load_u16(const uint8_t* p) {
  uint16_t value;
  __builtin_memcpy(&value, p, 2);
  return value;
}
PARABLOCK_INLINE void store_u16(uint8_t* p, uint16_t value) { __builtin_memcpy(p, &value, 2); }

template <class V, Dtype kDtype>
PARABLOCK_INLINE typename V::F load_as(const void* base, int64_t at) {
  if constexpr (kDtype == Dtype::kFp32) return V::load(static_cast<const float*>(base) + at);
  if constexpr (kDtype == Dtype::kBf16) return V::load_bf16(static_cast<const uint16_t*>(base) + at);
  if constexpr (kDtype == Dtype::kFp16) return V::load_fp16(static_cast<const uint16_t*>(base) + at);
}

template <class V, Dtype kDtype>
PARABLOCK_INLINE void store_as(void* base, int64_t at, typename V::F value) {
  if constexpr (kDtype == Dtype::kFp32) V::store(static_cast<float*>(base) + at, V::canonical_nan(value));
  if constexpr (kDtype == Dtype::kBf16) V::store_bf16(static_cast<uint16_t*>(base) + at, value);
  if constexpr (kDtype == Dtype::kFp16) V::store_fp16(static_cast<uint16_t*>(base) + at, value);
}

// Prefetches the data that a linear pass reads 3 KiB later: with three or more streams at once the hardware prefetchers
// fall behind. The address may lie past the end of the buffer, which is harmless to prefetch but not a valid pointer,
// so it is computed as an integer.
constexpr uintptr_t kPrefetchBytes = 3072;
PARABLOCK_INLINE void prefetch_after(const void* base, size_t offset) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(base) + offset + kPrefetchBytes));
}

// ---- encode

template <class V, Dtype kNow, Dtype kRef, int kCount>
PARABLOCK_INLINE void load_change(typename V::F (&x)[kCount], const void* now, const void* ref, const float* residual,
                                  int64_t at) {
  for (int i = 0; i < kCount; ++i) {
    const int64_t lane = at + i * V::kLanes;
    prefetch_after(now, static_cast<size_t>(lane) * dtype_bytes(kNow));
    prefetch_after(ref, static_cast<size_t>(lane) * dtype_bytes(kRef));
    x[i] = V::sub(load_as<V, kNow>(now, lane), load_as<V, kRef>(ref, lane));
  }
  if (residual == nullptr) return;
  for (int i = 0; i < kCount; ++i) {
    const float* const rest = residual + at + i * V::kLanes;
    prefetch_after(rest, 0);
    x[i] = V::add(x[i], V::load(rest));
  }
}

// The bf16 scale of a group whose largest magnitude has the bits `largest`, as the bits of a float.
template <Format kFormat>
PARABLOCK_INLINE int32_t scale_bits(int32_t largest, int32_t top) {
  if constexpr (kFormat == Format::kInt8) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(float_of(largest) / 127.0f));
    return static_cast<int32_t>((bits + 0xFFFFu) & 0xFFFF0000u);
  } else {
    // max(x) reaches the largest magnitude exactly if the signed maximum of the bits does; then m > 0 and m/-8 < 0.
    const uint32_t sign = top == largest ? 0x80000000u : 0u;
    const uint32_t bits = static_cast<uint32_t>(bits_of(float_of(largest) / 8.0f));
    return static_cast<int32_t>(sign | ((bits + 0xFFFFu) & 0xFFFF0000u));
  }
}

template <class V, Format kFormat>
PARABLOCK_INLINE void store_codes(uint8_t* codes, int64_t at, typename V::I code) {
  if constexpr (kFormat == Format::kInt8) {
    V::store_i8(codes + at, code);
  } else {
    V::store_i4(codes + at / 2, code);
  }
}

template <class V, Format kFormat, Dtype kNow, Dtype kRef>
int64_t encode_groups(const void* now, const void* ref, const float* residual_in, float* residual_out, int64_t numel,
                      Planes out) {
  constexpr int kGroup = static_cast<int>(group_size(kFormat));
  constexpr int kCount = kGroup / V::kLanes;
  using F = typename V::F;
  using I = typename V::I;
  int64_t bad = 0;
  uint8_t* scales = out.scales;
  for (int64_t at = 0; at < numel; at += kGroup, scales += 2) {
    F x[kCount];
    load_change<V, kNow, kRef>(x, now, ref, residual_in, at);
    I magnitude = V::magnitude(x[0]);
    I signed_top = V::bits(x[0]);
    for (int i = 1; i < kCount; ++i) {
      magnitude = V::max_i(magnitude, V::magnitude(x[i]));
      if constexpr (kFormat == Format::kInt4) signed_top = V::max_i(signed_top, V::bits(x[i]));
    }
    const int32_t largest = V::reduce_max(magnitude);
    if (__builtin_expect(largest >= kInfinity || largest <= kZeroGroup, 0)) {
      const bool is_bad = largest >= kInfinity;
      bad += is_bad;
      store_u16(scales, is_bad ? kBadGroup : 0);
      for (int i = 0; i < kCount; ++i) {
        store_codes<V, kFormat>(out.codes, at + i * V::kLanes, V::set_i(0));
        if (residual_out) V::store(residual_out + at + i * V::kLanes, is_bad ? V::set(0.0f) : x[i]);
      }
      continue;
    }
    const int32_t top = kFormat == Format::kInt4 ? V::reduce_max(signed_top) : 0;
    const int32_t bits = scale_bits<kFormat>(largest, top);
    store_u16(scales, static_cast<uint16_t>(static_cast<uint32_t>(bits) >> 16));
    const F scale = V::set(float_of(bits));
    const F inverse = V::set(1.0f / float_of(bits));
    for (int i = 0; i < kCount; ++i) {
      // |x * inverse| stays below 127.5 (int8) and 8.5 (int4), as the scale is rounded up: only +8 needs the clamp.
      I code = V::round(V::mul(x[i], inverse));
      if constexpr (kFormat == Format::kInt4) code = V::min_i(code, V::set_i(7));
      store_codes<V, kFormat>(out.codes, at + i * V::kLanes, code);
      if (residual_out) {
        V::store(residual_out + at + i * V::kLanes, V::sub(x[i], V::mul(V::to_float(code), scale)));
      }
    }
  }
  return bad;
}

template <class V, Format kFormat, Dtype kNow, Dtype kRef>
int64_t encode_plain(const void* now, const void* ref, const float* residual_in, float* residual_out, int64_t numel,
                     Planes out) {
  constexpr int kCount = static_cast<int>(kAlignment) / V::kLanes;
  constexpr int32_t kLimit = kFormat == Format::kBf16 ? kBf16Overflow : kInfinity;
  using F = typename V::F;
  int64_t bad = 0;
  for (int64_t at = 0; at < numel; at += kAlignment) {
    F x[kCount];
    load_change<V, kNow, kRef>(x, now, ref, residual_in, at);
    for (int i = 0; i < kCount; ++i) {
      const int64_t lane = at + i * V::kLanes;
      const F value = V::zero_from(x[i], kLimit, bad);
      F rest = V::set(0.0f);
      if constexpr (kFormat == Format::kBf16) {
        const F rounded = V::round_to_bf16(value);
        V::store_high_halves(out.codes + lane * 2, rounded);
        rest = V::sub(value, rounded);
      } else {
        V::store_bytes(out.codes + lane * 4, value);
      }
      if (residual_out) V::store(residual_out + lane, rest);
    }
  }
  return bad;
}

// ---- decode, apply, accumulate

// A code of fp32 or bf16; a code that is not finite reads as 0 and is counted.
template <class V, Format kFormat>
PARABLOCK_INLINE typename V::F load_plain(const uint8_t* codes, int64_t at, int64_t& invalid) {
  if constexpr (kFormat == Format::kFp32) return V::zero_from(V::load_bytes(codes + at * 4), kInfinity, invalid);
  if constexpr (kFormat == Format::kBf16) return V::zero_from(V::load_high_halves(codes + at * 2), kInfinity, invalid);
}

// Holds the scale of one group and decodes the group's codes: all codes to +0 when the scale is not finite.
template <class V, Format kFormat>
struct Group {
  PARABLOCK_INLINE Group(const uint8_t* scales, int64_t at) {
    if constexpr (has_scales(kFormat)) {
      const int32_t bits = static_cast<int32_t>(uint32_t{load_u16(scales + at / group_size(kFormat) * 2)} << 16);
      const bool finite = (bits & kInfinity) != kInfinity;
      scale = V::set(finite ? float_of(bits) : 0.0f);
      keep = V::set_i(finite ? -1 : 0);
    }
    if constexpr (kFormat == Format::kInt4 && V::kNibbleLookup) {
      table = V::mul(V::to_float(V::and_i(V::nibble_values(), keep)), scale);
    }
  }

  PARABLOCK_INLINE typename V::F decoded(const uint8_t* codes, int64_t at) const {
    if constexpr (kFormat == Format::kInt8) {
      return V::mul(V::to_float(V::and_i(V::load_i8(codes + at), keep)), scale);
    } else if constexpr (kFormat == Format::kInt4 && V::kNibbleLookup) {
      return V::look_up(table, codes + at / 2);
    } else if constexpr (kFormat == Format::kInt4) {
      return V::mul(V::to_float(V::and_i(V::load_i4(codes + at / 2), keep)), scale);
    } else {
      int64_t ignored = 0;
      return load_plain<V, kFormat>(codes, at, ignored);
    }
  }

  typename V::F scale;
  typename V::I keep;
  typename V::F table;  // all sixteen products of an int4 group, where V can look them up
};

template <class V, Format kFormat>
void decode_range(ConstPlanes in, int64_t numel, float* out) {
  for (int64_t at = 0; at < numel; at += group_size(kFormat)) {
    const Group<V, kFormat> group(in.scales, at);
    for (int i = 0; i < static_cast<int>(group_size(kFormat)); i += V::kLanes) {
      const int64_t lane = at + i;
      V::store(out + lane, group.decoded(in.codes, lane));
    }
  }
}

template <class V, Format kFormat, Dtype kTarget>
void apply_range(void* target, ConstPlanes in, int64_t numel) {
  for (int64_t at = 0; at < numel; at += group_size(kFormat)) {
    const Group<V, kFormat> group(in.scales, at);
    for (int i = 0; i < static_cast<int>(group_size(kFormat)); i += V::kLanes) {
      const int64_t lane = at + i;
      prefetch_after(target, static_cast<size_t>(lane) * dtype_bytes(kTarget));
      const typename V::F before = load_as<V, kTarget>(target, lane);
      store_as<V, kTarget>(target, lane, V::add(before, group.decoded(in.codes, lane)));
    }
  }
}

// ---- loops that the compiler vectorises as they stand; V only gives each variant an instantiation of its own

template <class V>
uint64_t fingerprint_range(const uint32_t* words, int64_t first_index, int64_t count) {
  constexpr uint64_t kStep = 0x9E3779B97F4A7C15u;
  uint64_t offset = (static_cast<uint64_t>(first_index) + 1) * kStep;
  uint64_t sum = 0;
#pragma GCC unroll 8
  for (int64_t i = 0; i < count; ++i, offset += kStep) {
    const uint64_t z = (words[i] + offset) * 0xBF58476D1CE4E5B9u;
    sum += z ^ (z >> 29);
  }
  return sum;
}

template <class V, Format kFormat>
void inspect_group(const uint8_t* scales, const uint8_t* codes, Inspection& found) {
  uint8_t largest = 0;
  uint8_t below_range = 0;
  for (int i = 0; i < static_cast<int>(code_bytes(kFormat, group_size(kFormat))); ++i) {
    if constexpr (kFormat == Format::kInt8) {
      const uint8_t negated = static_cast<uint8_t>(-codes[i]);
      const uint8_t size = codes[i] < negated ? codes[i] : negated;  // |code|: of x and -x as unsigned, the smaller
      largest = size > largest ? size : largest;
      below_range = static_cast<uint8_t>(below_range + (codes[i] == 0x80));
    } else {
      const uint8_t low = codes[i] & 15;
      const uint8_t high = codes[i] >> 4;
      const uint8_t low_size = low < 8 ? low : static_cast<uint8_t>(16 - low);
      const uint8_t high_size = high < 8 ? high : static_cast<uint8_t>(16 - high);
      const uint8_t size = low_size > high_size ? low_size : high_size;
      largest = size > largest ? size : largest;
    }
  }
  const uint16_t scale = load_u16(scales);
  const bool finite = (scale & 0x7F80) != 0x7F80;
  const double step = finite ? float_of(static_cast<int32_t>((scale & 0x7FFFu) << 16)) : 0.0;
  found.largest = step * largest > found.largest ? step * largest : found.largest;
  found.bad_groups += scale == kBadGroup;
  found.invalid += below_range + (!finite && scale != kBadGroup);
  found.invalid += kFormat == Format::kInt8 && finite && (scale & 0x8000) != 0;
}

// Whether inspecting these groups one by one would change nothing in `found`, so that it can be left out. True for
// almost all groups of a body, whose scales are of one order of magnitude; in int4, the codes need not even be read.
template <class V, Format kFormat>
bool is_unremarkable(const uint8_t* scales, const uint8_t* codes, int64_t groups, const Inspection& found) {
  constexpr uint16_t kNotCounted = kFormat == Format::kInt4 ? 0x8000 : 0;  // an int4 scale may be negative
  uint16_t top = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const uint16_t scale = load_u16(scales + g * 2) & static_cast<uint16_t>(~kNotCounted);
    top = scale > top ? scale : top;
  }
  if (top >= 0x7F80) return false;  // not finite, or negative
  int largest = 8;  // an int4 group nearly always has the code -8
  if constexpr (kFormat == Format::kInt8) {
    int8_t least = 0;
    int8_t most = 0;
    for (int64_t i = 0; i < groups * group_size(kFormat); ++i) {
      const int8_t code = static_cast<int8_t>(codes[i]);
      least = code < least ? code : least;
      most = code > most ? code : most;
    }
    if (least == -128) return false;
    largest = -least > most ? -least : most;
  }
  return float_of(static_cast<int32_t>(uint32_t{top} << 16)) * static_cast<double>(largest) <= found.largest;
}

template <class V, Format kFormat>
Inspection inspect_groups(ConstPlanes in, int64_t numel) {
  constexpr int64_t kRun = 32;  // groups that are looked at together
  constexpr int64_t kGroup = group_size(kFormat);
  Inspection found{0.0, 0, 0};
  for (int64_t at = 0; at < numel; at += kRun * kGroup) {
    const int64_t left = (numel - at) / kGroup;
    const int64_t groups = left < kRun ? left : kRun;
    const uint8_t* scales = in.scales + scale_bytes(kFormat, at);
    const uint8_t* codes = in.codes + code_bytes(kFormat, at);
    if (is_unremarkable<V, kFormat>(scales, codes, groups, found)) continue;
    for (int64_t g = 0; g < groups; ++g) {
      inspect_group<V, kFormat>(scales + g * 2, codes + code_bytes(kFormat, g * kGroup), found);
    }
  }
  return found;
}

template <class V, Format kFormat>
Inspection inspect_plain(ConstPlanes in, int64_t numel) {
  typename V::I largest = V::set_i(0);
  int64_t invalid = 0;
  for (int64_t lane = 0; lane < numel; lane += V::kLanes) {
    largest = V::max_i(largest, V::magnitude(load_plain<V, kFormat>(in.codes, lane, invalid)));
  }
  return Inspection{float_of(V::reduce_max(largest)), 0, invalid};
}

}  // namespace
}  // namespace parablock::internal
