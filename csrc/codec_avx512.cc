// The AVX-512 vector layer: 16 floats per register, eight registers per int8 group.
#ifdef __x86_64__
#include <immintrin.h>

#include <cstdint>

#include "codec_table.h"

#ifdef __clang__
#define PARABLOCK_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,f16c"
#else
// Only GCC has to be told to use whole registers, and only GCC accepts the option.
#define PARABLOCK_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512"
// GCC 12 reports the deliberately undefined operand inside its own intrinsics as if it were an error in this file.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

PARABLOCK_TARGET_BEGIN(PARABLOCK_AVX512)
#include "codec_kernels.h"

#include "codec_sum.h"

#include "codec_make_kernels.h"

namespace parablock::internal {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  using F = __m512;
  using I = __m512i;
  using D = __m512d;
  using L = __m512i;
  static constexpr int kSumVectors = 4;

  static PARABLOCK_INLINE F set(float value) { return _mm512_set1_ps(value); }
  static PARABLOCK_INLINE I set_i(int32_t value) { return _mm512_set1_epi32(value); }
  static PARABLOCK_INLINE D set_d(double value) { return _mm512_set1_pd(value); }
  static PARABLOCK_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static PARABLOCK_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static PARABLOCK_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static PARABLOCK_INLINE D add_d(D a, D b) { return _mm512_add_pd(a, b); }
  static PARABLOCK_INLINE D sub_d(D a, D b) { return _mm512_sub_pd(a, b); }
  static PARABLOCK_INLINE D mul_d(D a, D b) { return _mm512_mul_pd(a, b); }
  static PARABLOCK_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
  static PARABLOCK_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  static PARABLOCK_INLINE I min_i(I a, I b) { return _mm512_min_epi32(a, b); }
  static PARABLOCK_INLINE int32_t reduce_max(I a) { return _mm512_reduce_max_epi32(a); }

  static PARABLOCK_INLINE I bits(F a) { return _mm512_castps_si512(a); }
  static PARABLOCK_INLINE I magnitude(F a) { return and_i(bits(a), set_i(0x7FFFFFFF)); }
  static PARABLOCK_INLINE I round(F a) { return _mm512_cvtps_epi32(a); }
  static PARABLOCK_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static PARABLOCK_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static PARABLOCK_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static PARABLOCK_INLINE F load_bytes(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static PARABLOCK_INLINE void store_bytes(uint8_t* p, F a) { _mm512_storeu_ps(p, a); }
  static PARABLOCK_INLINE F load_high_halves(const uint8_t* p) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }
  static PARABLOCK_INLINE void store_high_halves(uint8_t* p, F a) {
    const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits(a), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  static PARABLOCK_INLINE F load_bf16(const uint16_t* p) {
    return load_high_halves(reinterpret_cast<const uint8_t*>(p));
  }
  static PARABLOCK_INLINE F load_fp16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  // The upper halves of the result are the nearest bf16 numbers, ties to even.
  static PARABLOCK_INLINE I add_bf16_half(I a) {
    const __mmask16 odd = _mm512_test_epi32_mask(a, set_i(0x10000));
    const I down = _mm512_add_epi32(a, set_i(0x7FFF));
    return _mm512_mask_add_epi32(down, odd, a, set_i(0x8000));
  }
  // For infinities and for finite values that do not round to infinity; not for NaN.
  static PARABLOCK_INLINE F round_to_bf16(F a) {
    return _mm512_castsi512_ps(and_i(add_bf16_half(bits(a)), set_i(static_cast<int32_t>(0xFFFF0000u))));
  }
  static PARABLOCK_INLINE F canonical_nan(F a) {
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits(a), nan, set_i(0x7FC00000)));
  }
  static PARABLOCK_INLINE void store_bf16(uint16_t* p, F a) {
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const I halves = _mm512_mask_mov_epi32(add_bf16_half(bits(a)), nan, set_i(0x7FC00000));
    store_high_halves(reinterpret_cast<uint8_t*>(p), _mm512_castsi512_ps(halves));
  }
  static PARABLOCK_INLINE void store_fp16(uint16_t* p, F a) {
    const __m256i halves = _mm512_cvtps_ph(canonical_nan(a), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
  }
  // Lanes whose magnitude has bits of at least `limit` become 0 and are counted.
  static PARABLOCK_INLINE F zero_from(F a, int32_t limit, int64_t& count) {
    const __mmask16 kept = _mm512_cmplt_epi32_mask(magnitude(a), set_i(limit));
    count += __builtin_popcount(static_cast<uint16_t>(~kept));
    return _mm512_maskz_mov_ps(kept, a);
  }

  static PARABLOCK_INLINE I load_i8(const uint8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static PARABLOCK_INLINE void store_i8(uint8_t* p, I codes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(codes));
  }
  // A permutation uses only the low four bits of an index, so a byte spread over the two halves of a 64-bit lane needs
  // no mask: the low nibble indexes for the lower half, the high nibble for the upper half.
  static constexpr bool kNibbleLookup = true;
  static PARABLOCK_INLINE I nibble_values() {
    return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  }
  static PARABLOCK_INLINE F look_up(F table, const uint8_t* p) {
    const I bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm512_permutexvar_ps(_mm512_or_si512(bytes, _mm512_slli_epi64(bytes, 28)), table);
  }
  static PARABLOCK_INLINE void store_i4(uint8_t* p, I codes) {
    const I low = and_i(codes, _mm512_set1_epi64(0x0F));
    const I high = and_i(_mm512_srli_epi64(codes, 28), _mm512_set1_epi64(0xF0));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(_mm512_or_si512(low, high)));
  }

  static PARABLOCK_INLINE D lower(F a) { return _mm512_cvtps_pd(_mm512_castps512_ps256(a)); }
  static PARABLOCK_INLINE D upper(F a) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(a, 1)); }
  static PARABLOCK_INLINE L set_l(uint64_t value) { return _mm512_set1_epi64(static_cast<int64_t>(value)); }
  static PARABLOCK_INLINE L load_l(const int64_t* p) { return _mm512_loadu_si512(p); }
  static PARABLOCK_INLINE void store_l(int64_t* p, L a) { _mm512_storeu_si512(p, a); }
  static PARABLOCK_INLINE L add_l(L a, L b) { return _mm512_add_epi64(a, b); }
  static PARABLOCK_INLINE L add_bits(L a, D b) { return add_l(a, _mm512_castpd_si512(b)); }
};

}  // namespace

constexpr Kernels kAvx512Kernels = make_kernels<Avx512>("avx512");

}  // namespace parablock::internal
PARABLOCK_TARGET_END
#endif
