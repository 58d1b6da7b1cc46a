// The AVX2 vector layer: 8 floats per register. An int8 group does not fit the registers and spills to the first-level
// cache.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>

#include "codec_table.h"

PARABLOCK_TARGET_BEGIN("avx2,f16c,popcnt")
#include "codec_kernels.h"

#include "codec_sum.h"

#include "codec_make_kernels.h"

namespace parablock::internal {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8;
  using F = __m256;
  using I = __m256i;
  using D = __m256d;
  using L = __m256i;
  static constexpr int kSumVectors = 2;

  static PARABLOCK_INLINE F set(float value) { return _mm256_set1_ps(value); }
  static PARABLOCK_INLINE I set_i(int32_t value) { return _mm256_set1_epi32(value); }
  static PARABLOCK_INLINE D set_d(double value) { return _mm256_set1_pd(value); }
  static PARABLOCK_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static PARABLOCK_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static PARABLOCK_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static PARABLOCK_INLINE D add_d(D a, D b) { return _mm256_add_pd(a, b); }
  static PARABLOCK_INLINE D sub_d(D a, D b) { return _mm256_sub_pd(a, b); }
  static PARABLOCK_INLINE D mul_d(D a, D b) { return _mm256_mul_pd(a, b); }
  static PARABLOCK_INLINE I and_i(I a, I b) { return _mm256_and_si256(a, b); }
  static PARABLOCK_INLINE I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
  static PARABLOCK_INLINE I min_i(I a, I b) { return _mm256_min_epi32(a, b); }
  static PARABLOCK_INLINE int32_t reduce_max(I a) {
    __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
    m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1));
    return _mm_cvtsi128_si32(m);
  }

  static PARABLOCK_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  static PARABLOCK_INLINE I magnitude(F a) { return and_i(bits(a), set_i(0x7FFFFFFF)); }
  static PARABLOCK_INLINE I round(F a) { return _mm256_cvtps_epi32(a); }
  static PARABLOCK_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }

  static PARABLOCK_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static PARABLOCK_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static PARABLOCK_INLINE F load_bytes(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static PARABLOCK_INLINE void store_bytes(uint8_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits(a));
  }
  static PARABLOCK_INLINE F load_high_halves(const uint8_t* p) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }
  static PARABLOCK_INLINE void store_high_halves(uint8_t* p, F a) {
    const I halves = _mm256_srli_epi32(bits(a), 16);
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
  }
  static PARABLOCK_INLINE F load_bf16(const uint16_t* p) {
    return load_high_halves(reinterpret_cast<const uint8_t*>(p));
  }
  static PARABLOCK_INLINE F load_fp16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  // For infinities and for finite values that do not round to infinity; not for NaN.
  static PARABLOCK_INLINE F round_to_bf16(F a) {
    const I odd = and_i(_mm256_srli_epi32(bits(a), 16), set_i(1));
    const I rounded = _mm256_add_epi32(_mm256_add_epi32(bits(a), set_i(0x7FFF)), odd);
    return _mm256_castsi256_ps(and_i(rounded, set_i(static_cast<int32_t>(0xFFFF0000u))));
  }
  static PARABLOCK_INLINE F nan_where_unordered(F a, F test) {
    return _mm256_blendv_ps(a, _mm256_castsi256_ps(set_i(0x7FC00000)), _mm256_cmp_ps(test, test, _CMP_UNORD_Q));
  }
  static PARABLOCK_INLINE F canonical_nan(F a) { return nan_where_unordered(a, a); }
  static PARABLOCK_INLINE void store_bf16(uint16_t* p, F a) {
    store_high_halves(reinterpret_cast<uint8_t*>(p), nan_where_unordered(round_to_bf16(a), a));
  }
  static PARABLOCK_INLINE void store_fp16(uint16_t* p, F a) {
    const __m128i halves = _mm256_cvtps_ph(canonical_nan(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
  }
  // Lanes whose magnitude has bits of at least `limit` become 0 and are counted.
  static PARABLOCK_INLINE F zero_from(F a, int32_t limit, int64_t& count) {
    const F kept = _mm256_castsi256_ps(_mm256_cmpgt_epi32(set_i(limit), magnitude(a)));
    count += kLanes - __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(kept)));
    return _mm256_and_ps(kept, a);
  }

  static constexpr bool kNibbleLookup = false;
  static PARABLOCK_INLINE I load_i8(const uint8_t* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static PARABLOCK_INLINE void store_i8(uint8_t* p, I codes) {
    const I words = _mm256_packs_epi32(codes, codes);
    const I bytes = _mm256_packs_epi16(words, words);
    const __m128i low = _mm256_castsi256_si128(bytes);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, _mm256_extracti128_si256(bytes, 1)));
  }
  // A byte in each 64-bit lane: its low nibble goes to the lower 32 bits, its high nibble to the upper ones.
  static PARABLOCK_INLINE I load_i4(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const I bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const I nibbles = _mm256_or_si256(bytes, _mm256_slli_epi64(bytes, 28));
    return _mm256_srai_epi32(_mm256_slli_epi32(nibbles, 28), 28);
  }
  static PARABLOCK_INLINE void store_i4(uint8_t* p, I codes) {
    const I low = and_i(codes, _mm256_set1_epi64x(0x0F));
    const I high = and_i(_mm256_srli_epi64(codes, 28), _mm256_set1_epi64x(0xF0));
    const I pick = _mm256_set1_epi64x(static_cast<int64_t>(0xFFFFFFFFFFFF0800u));
    const I pairs = _mm256_shuffle_epi8(_mm256_or_si256(low, high), pick);
    const __m128i four = _mm_unpacklo_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
    const int32_t word = _mm_cvtsi128_si32(four);
    __builtin_memcpy(p, &word, 4);
  }

  static PARABLOCK_INLINE D lower(F a) { return _mm256_cvtps_pd(_mm256_castps256_ps128(a)); }
  static PARABLOCK_INLINE D upper(F a) { return _mm256_cvtps_pd(_mm256_extractf128_ps(a, 1)); }
  static PARABLOCK_INLINE L set_l(uint64_t value) { return _mm256_set1_epi64x(static_cast<int64_t>(value)); }
  static PARABLOCK_INLINE L load_l(const int64_t* p) { return _mm256_loadu_si256(reinterpret_cast<const L*>(p)); }
  static PARABLOCK_INLINE void store_l(int64_t* p, L a) { _mm256_storeu_si256(reinterpret_cast<L*>(p), a); }
  static PARABLOCK_INLINE L add_l(L a, L b) { return _mm256_add_epi64(a, b); }
  static PARABLOCK_INLINE L add_bits(L a, D b) { return add_l(a, _mm256_castpd_si256(b)); }
};

}  // namespace

constexpr Kernels kAvx2Kernels = make_kernels<Avx2>("avx2");

}  // namespace parablock::internal
PARABLOCK_TARGET_END
#endif
