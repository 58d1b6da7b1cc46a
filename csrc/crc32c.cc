#include "crc32c.h"

#include <array>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace parablock {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // reflected

using Table = std::array<uint32_t, 256>;

constexpr std::array<Table, 8> make_slices() {
  std::array<Table, 8> slices{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (kPolynomial & (0u - (crc & 1)));
    slices[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t byte = 0; byte < 256; ++byte)
      slices[k][byte] = (slices[k - 1][byte] >> 8) ^ slices[0][slices[k - 1][byte] & 0xFF];
  return slices;
}

constexpr std::array<Table, 8> kSlices = make_slices();

// All update functions take and return the raw register (no inversion).
uint32_t update_portable(uint32_t crc, const uint8_t* data, size_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (size_t k = 0; k < 8; ++k) crc ^= kSlices[7 - k][(word >> (8 * k)) & 0xFF];
  }
  for (; bytes > 0; --bytes) crc = (crc >> 8) ^ kSlices[0][(crc ^ *data++) & 0xFF];
  return crc;
}

#ifdef __x86_64__

// Appending zero bytes is linear in the register, so one table lookup per byte of the register moves a partial checksum
// over a stride.
constexpr size_t kStride = 1024;
constexpr size_t kCacheLine = 64;

struct Shift {
  std::array<Table, 4> table{};

  Shift() {
    std::array<uint32_t, 32> of_bit{};
    for (size_t bit = 0; bit < 32; ++bit) {
      uint32_t crc = 1u << bit;
      for (size_t i = 0; i < kStride; ++i) crc = (crc >> 8) ^ kSlices[0][crc & 0xFF];
      of_bit[bit] = crc;
    }
    for (size_t k = 0; k < 4; ++k)
      for (size_t byte = 0; byte < 256; ++byte)
        for (size_t bit = 0; bit < 8; ++bit)
          if (byte >> bit & 1) table[k][byte] ^= of_bit[8 * k + bit];
  }

  uint32_t operator()(uint32_t crc) const {
    return table[0][crc & 0xFF] ^ table[1][crc >> 8 & 0xFF] ^ table[2][crc >> 16 & 0xFF] ^ table[3][crc >> 24];
  }
};

uint64_t load64(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, 8);
  return word;
}

// The instruction has a latency of three cycles and a throughput of one per cycle, so three strides run side by side.
// The hardware prefetchers do not follow them; prefetching the strides after the next makes reads from memory two to
// three times as fast.
__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t crc, const uint8_t* data, size_t bytes) {
  static const Shift shift;
  while (bytes >= 3 * kStride) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t line = 0; line < kStride; line += kCacheLine) {
      for (size_t ahead = 6; ahead < 9; ++ahead) __builtin_prefetch(data + ahead * kStride + line);
      for (size_t i = line; i < line + kCacheLine; i += 8) {
        a = _mm_crc32_u64(a, load64(data + i));
        b = _mm_crc32_u64(b, load64(data + kStride + i));
        c = _mm_crc32_u64(c, load64(data + 2 * kStride + i));
      }
    }
    crc = shift(shift(static_cast<uint32_t>(a)) ^ static_cast<uint32_t>(b)) ^ static_cast<uint32_t>(c);
    data += 3 * kStride;
    bytes -= 3 * kStride;
  }
  uint64_t wide = crc;
  for (; bytes >= 8; bytes -= 8, data += 8) wide = _mm_crc32_u64(wide, load64(data));
  crc = static_cast<uint32_t>(wide);
  for (; bytes > 0; --bytes) crc = _mm_crc32_u8(crc, *data++);
  return crc;
}

// x^n modulo the polynomial, reflected.
constexpr uint64_t power_of_x(int n) {
  uint32_t power = 0x80000000;
  for (; n > 0; --n) power = (power >> 1) ^ (kPolynomial & (0u - (power & 1)));
  return power;
}

// The factors that move a 128-bit remainder over a stretch of message: one for its earlier half, which is the low one,
// and one for its later half.
struct Distance {
  uint64_t low, high;
};
constexpr Distance kOver2048 = {power_of_x(2048 + 31), power_of_x(2048 - 33)};
constexpr Distance kOver512 = {power_of_x(512 + 31), power_of_x(512 - 33)};
constexpr Distance kOver128 = {power_of_x(128 + 31), power_of_x(128 - 33)};

#define PARABLOCK_CLMUL __attribute__((target("avx512f,avx512vl,vpclmulqdq,pclmul,sse4.2")))

PARABLOCK_CLMUL inline __m512i wide(Distance over) {
  auto low = static_cast<int64_t>(over.low), high = static_cast<int64_t>(over.high);
  return _mm512_set4_epi64(high, low, high, low);
}

PARABLOCK_CLMUL inline __m512i fold(__m512i folded, __m512i over, __m512i next) {
  constexpr int kXorOfThree = 0x96;
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(folded, over, 0x00),
                                   _mm512_clmulepi64_epi128(folded, over, 0x11), next, kXorOfThree);
}

// Four registers of carry-less products side by side: twice as fast as the CRC instruction on data in cache.
PARABLOCK_CLMUL uint32_t update_clmul(uint32_t crc, const uint8_t* data, size_t bytes) {
  constexpr size_t kRegister = 64, kBlock = 4 * kRegister;
  if (bytes < kBlock) return update_sse42(crc, data, bytes);
  auto next = [&](size_t i) PARABLOCK_CLMUL { return _mm512_loadu_si512(data + i * kRegister); };
  __m512i part[4] = {next(0), next(1), next(2), next(3)};
  part[0] = _mm512_xor_si512(part[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(crc))));
  data += kBlock;
  bytes -= kBlock;
  for (__m512i over = wide(kOver2048); bytes >= kBlock; data += kBlock, bytes -= kBlock)
    for (size_t i = 0; i < 4; ++i) part[i] = fold(part[i], over, next(i));
  __m512i over = wide(kOver512);
  __m512i all = fold(fold(fold(part[0], over, part[1]), over, part[2]), over, part[3]);
  for (; bytes >= kRegister; data += kRegister, bytes -= kRegister) all = fold(all, over, next(0));
  alignas(kRegister) __m128i quarter[4];
  _mm512_store_si512(quarter, all);
  __m128i over128 = _mm_set_epi64x(static_cast<int64_t>(kOver128.high), static_cast<int64_t>(kOver128.low));
  __m128i rest = quarter[0];
  for (size_t i = 1; i < 4; ++i)
    rest = _mm_xor_si128(
        _mm_xor_si128(_mm_clmulepi64_si128(rest, over128, 0x00), _mm_clmulepi64_si128(rest, over128, 0x11)),
        quarter[i]);
  uint64_t reduced = _mm_crc32_u64(0, static_cast<uint64_t>(_mm_cvtsi128_si64(rest)));
  reduced = _mm_crc32_u64(reduced, static_cast<uint64_t>(_mm_extract_epi64(rest, 1)));
  return update_sse42(static_cast<uint32_t>(reduced), data, bytes);
}

bool has_sse42() { return __builtin_cpu_supports("sse4.2"); }
bool has_clmul() { return has_sse42() && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("vpclmulqdq"); }

#endif

using Update = uint32_t (*)(uint32_t, const uint8_t*, size_t);

// The implementations that this machine can run, fastest last.
std::vector<Update> updates() {
  std::vector<Update> list = {&update_portable};
#ifdef __x86_64__
  if (has_sse42()) list.push_back(&update_sse42);
  if (has_clmul()) list.push_back(&update_clmul);
#endif
  return list;
}

}  // namespace

uint32_t crc32c(const void* data, size_t bytes, uint32_t crc) {
  static const Update fastest = updates().back();
  return ~fastest(~crc, static_cast<const uint8_t*>(data), bytes);
}

std::vector<uint32_t> crc32c_every_way(const void* data, size_t bytes) {
  std::vector<uint32_t> results;
  for (Update update : updates()) results.push_back(~update(~0u, static_cast<const uint8_t*>(data), bytes));
  return results;
}

}  // namespace parablock
