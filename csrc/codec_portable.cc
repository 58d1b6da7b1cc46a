// The portable vector layer: 4 floats in the vector type that GCC and Clang offer on every target.
#include <cstdint>

#include "codec_table.h"

#include "codec_kernels.h"

#include "codec_sum.h"

#include "codec_make_kernels.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "a packed body is little-endian, so the machine must be");

namespace parablock::internal {
namespace {

// Exact: fp16 has fewer bits than fp32 in every field. Uses integers only, so that the denormal mode does not matter.
PARABLOCK_INLINE int32_t widen_fp16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31;
  const uint32_t mantissa = half & 0x3FFu;
  uint32_t bits;
  if (exponent == 31) {
    bits = 0x7F800000u | mantissa << 13 | (mantissa != 0 ? 0x00400000u : 0);
  } else if (exponent != 0) {
    bits = (exponent + 112) << 23 | mantissa << 13;
  } else if (mantissa != 0) {
    const uint32_t shift = static_cast<uint32_t>(__builtin_clz(mantissa)) - 21;  // brings the leading one to bit 10
    bits = (113 - shift) << 23 | ((mantissa << shift) & 0x3FFu) << 13;
  } else {
    bits = 0;
  }
  return static_cast<int32_t>(sign | bits);
}

// Rounds to nearest even; a NaN becomes 0x7E00.
PARABLOCK_INLINE uint16_t narrow_to_fp16(int32_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) & 0x7FFFFFFFu;
  const uint32_t sign = (static_cast<uint32_t>(value) >> 16) & 0x8000u;
  if (bits > 0x7F800000u) return 0x7E00;
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 2^16 and more
  uint32_t half;
  if (bits >= 0x38800000u) {  // 2^-14: a normal number; rounding may carry into the exponent, up to infinity
    half = (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1)) >> 13;
  } else if (bits >= 0x33000000u) {  // 2^-25: a multiple of 2^-24
    const uint32_t shift = 126 - (bits >> 23);
    const uint32_t mantissa = (bits & 0x7FFFFFu) | 0x800000u;
    half = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    const uint32_t middle = 1u << (shift - 1);
    half += rest > middle || (rest == middle && (half & 1));
  } else {
    half = 0;
  }
  return static_cast<uint16_t>(sign | half);
}

struct Portable {
  static constexpr int kLanes = 4;
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef double D __attribute__((vector_size(16)));
  typedef uint64_t L __attribute__((vector_size(16)));  // adding wraps
  static constexpr int kSumVectors = 1;

  static PARABLOCK_INLINE F set(float value) { return F{value, value, value, value}; }
  static PARABLOCK_INLINE I set_i(int32_t value) { return I{value, value, value, value}; }
  static PARABLOCK_INLINE D set_d(double value) { return D{value, value}; }
  static PARABLOCK_INLINE F add(F a, F b) { return a + b; }
  static PARABLOCK_INLINE F sub(F a, F b) { return a - b; }
  static PARABLOCK_INLINE F mul(F a, F b) { return a * b; }
  static PARABLOCK_INLINE D add_d(D a, D b) { return a + b; }
  static PARABLOCK_INLINE D sub_d(D a, D b) { return a - b; }
  static PARABLOCK_INLINE D mul_d(D a, D b) { return a * b; }
  static PARABLOCK_INLINE I and_i(I a, I b) { return a & b; }
  static PARABLOCK_INLINE I select(I mask, I a, I b) { return (mask & a) | (~mask & b); }
  static PARABLOCK_INLINE I max_i(I a, I b) { return select(a > b, a, b); }
  static PARABLOCK_INLINE I min_i(I a, I b) { return select(a < b, a, b); }
  static PARABLOCK_INLINE int32_t reduce_max(I a) {
    const int32_t low = a[0] > a[1] ? a[0] : a[1];
    const int32_t high = a[2] > a[3] ? a[2] : a[3];
    return low > high ? low : high;
  }

  static PARABLOCK_INLINE I bits(F a) { return __builtin_bit_cast(I, a); }
  static PARABLOCK_INLINE F from_bits(I a) { return __builtin_bit_cast(F, a); }
  static PARABLOCK_INLINE I magnitude(F a) { return bits(a) & set_i(0x7FFFFFFF); }
  // Exact and half-to-even for |a| below 2^22; a code has |a| < 128.
  static PARABLOCK_INLINE I round(F a) {
    const F rounder = set(12582912.0f);
    return __builtin_convertvector((a + rounder) - rounder, I);
  }
  static PARABLOCK_INLINE F to_float(I a) { return __builtin_convertvector(a, F); }

  template <class T>
  static PARABLOCK_INLINE T load_any(const void* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
  }
  static PARABLOCK_INLINE F load(const float* p) { return load_any<F>(p); }
  static PARABLOCK_INLINE void store(float* p, F a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static PARABLOCK_INLINE F load_bytes(const uint8_t* p) { return load_any<F>(p); }
  static PARABLOCK_INLINE void store_bytes(uint8_t* p, F a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static PARABLOCK_INLINE F load_high_halves(const uint8_t* p) {
    return from_bits(I{load_u16(p), load_u16(p + 2), load_u16(p + 4), load_u16(p + 6)} << 16);
  }
  static PARABLOCK_INLINE void store_high_halves(uint8_t* p, F a) {
    for (int i = 0; i < kLanes; ++i) store_u16(p + i * 2, static_cast<uint16_t>(bits(a)[i] >> 16));
  }
  static PARABLOCK_INLINE F load_bf16(const uint16_t* p) {
    return load_high_halves(reinterpret_cast<const uint8_t*>(p));
  }
  static PARABLOCK_INLINE F load_fp16(const uint16_t* p) {
    return from_bits(I{widen_fp16(p[0]), widen_fp16(p[1]), widen_fp16(p[2]), widen_fp16(p[3])});
  }

  // For infinities and for finite values that do not round to infinity; not for NaN.
  static PARABLOCK_INLINE F round_to_bf16(F a) {
    typedef uint32_t U __attribute__((vector_size(16)));  // unsigned: a carry out of the sign bit may wrap
    const U wide = __builtin_bit_cast(U, a);
    const U rounded = wide + U{0x7FFF, 0x7FFF, 0x7FFF, 0x7FFF} + ((wide >> 16) & 1);
    return __builtin_bit_cast(F, rounded & 0xFFFF0000u);
  }
  static PARABLOCK_INLINE F nan_where_unordered(F a, F test) {
    return from_bits(select(magnitude(test) > set_i(kInfinity), set_i(0x7FC00000), bits(a)));
  }
  static PARABLOCK_INLINE F canonical_nan(F a) { return nan_where_unordered(a, a); }
  static PARABLOCK_INLINE void store_bf16(uint16_t* p, F a) {
    store_high_halves(reinterpret_cast<uint8_t*>(p), nan_where_unordered(round_to_bf16(a), a));
  }
  static PARABLOCK_INLINE void store_fp16(uint16_t* p, F a) {
    for (int i = 0; i < kLanes; ++i) p[i] = narrow_to_fp16(bits(a)[i]);
  }
  // Lanes whose magnitude has bits of at least `limit` become 0 and are counted.
  static PARABLOCK_INLINE F zero_from(F a, int32_t limit, int64_t& count) {
    const I kept = magnitude(a) < set_i(limit);
    count += kLanes + kept[0] + kept[1] + kept[2] + kept[3];
    return from_bits(bits(a) & kept);
  }

  static constexpr bool kNibbleLookup = false;
  static PARABLOCK_INLINE I load_i8(const uint8_t* p) {
    return I{static_cast<int8_t>(p[0]), static_cast<int8_t>(p[1]), static_cast<int8_t>(p[2]),
             static_cast<int8_t>(p[3])};
  }
  static PARABLOCK_INLINE void store_i8(uint8_t* p, I codes) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(codes[i]);
  }
  static PARABLOCK_INLINE I load_i4(const uint8_t* p) {
    const I nibbles{p[0] & 15, p[0] >> 4, p[1] & 15, p[1] >> 4};
    return (nibbles ^ set_i(8)) - set_i(8);
  }
  static PARABLOCK_INLINE void store_i4(uint8_t* p, I codes) {
    p[0] = static_cast<uint8_t>((codes[0] & 15) | (codes[1] & 15) << 4);
    p[1] = static_cast<uint8_t>((codes[2] & 15) | (codes[3] & 15) << 4);
  }

  static PARABLOCK_INLINE D lower(F a) { return D{a[0], a[1]}; }
  static PARABLOCK_INLINE D upper(F a) { return D{a[2], a[3]}; }
  static PARABLOCK_INLINE L set_l(uint64_t value) { return L{value, value}; }
  static PARABLOCK_INLINE L load_l(const int64_t* p) { return load_any<L>(p); }
  static PARABLOCK_INLINE void store_l(int64_t* p, L a) { __builtin_memcpy(p, &a, sizeof(a)); }
  static PARABLOCK_INLINE L add_l(L a, L b) { return a + b; }
  static PARABLOCK_INLINE L add_bits(L a, D b) { return a + __builtin_bit_cast(L, b); }
};

}  // namespace

constexpr Kernels kPortableKernels = make_kernels<Portable>("portable");

}  // namespace parablock::internal
