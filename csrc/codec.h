// The codec: packs one block's change into bytes and unpacks it, on the CPU. Pure functions over raw memory: no
// allocation, no Python, no knowledge of transfers or threads. Every instruction-set variant yields the same bytes.
//
// A packed block has two planes, the scales of all groups and the codes of all groups. They are passed as separate
// pointers so that any range of groups can be handled alone: encode, copy and send of one block overlap that way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace parablock {

enum class Format : uint8_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };
enum class Dtype : uint8_t { kFp32 = 0, kBf16 = 1, kFp16 = 2 };

constexpr int64_t kAlignment = 128;  // elements; every parameter's start and every flat length is a multiple

constexpr size_t dtype_bytes(Dtype dtype) { return dtype == Dtype::kFp32 ? 4 : 2; }
constexpr int64_t group_size(Format format) { return format == Format::kInt4 ? 64 : 128; }
constexpr bool has_scales(Format format) { return format == Format::kInt8 || format == Format::kInt4; }
constexpr size_t scale_bytes(Format format, int64_t elements) {
  return has_scales(format) ? static_cast<size_t>(elements / group_size(format)) * 2 : 0;
}
constexpr size_t code_bytes(Format format, int64_t elements) {
  switch (format) {
    case Format::kFp32: return static_cast<size_t>(elements) * 4;
    case Format::kBf16: return static_cast<size_t>(elements) * 2;
    case Format::kInt8: return static_cast<size_t>(elements);
    case Format::kInt4: return static_cast<size_t>(elements) / 2;
  }
  return 0;
}

struct Planes {
  uint8_t* scales;  // null where the format has none
  uint8_t* codes;
};
struct ConstPlanes {
  const uint8_t* scales;
  const uint8_t* codes;
};

// The instruction set in use, "avx512-vnni", "avx512", "avx2" or "portable": the best of the machine unless
// `force_instruction_set` chose another.
const char* instruction_set();
void force_instruction_set(const char* name);  // throws std::invalid_argument when the machine lacks it

// All lengths are in elements and multiples of 128. `threads` (at least 1) includes the caller.

// x = (now - ref) + residual_in; packs x and writes the error of the packing to residual_out. `residual_in` may be
// null (x = now - ref), `residual_out` may be null (discarded) or equal to residual_in. Returns the number of bad
// groups (int8, int4) or bad elements (fp32, bf16).
int64_t encode(const void* now, Dtype now_dtype, const void* ref, Dtype ref_dtype, const float* residual_in,
               float* residual_out, int64_t numel, Format format, Planes out, int threads);

void decode(ConstPlanes in, int64_t numel, Format format, float* out, int threads);

// target <- round(float(target) + decode(in))
void apply(void* target, Dtype dtype, ConstPlanes in, int64_t numel, Format format, int threads);

// An element's sum is one integer of 128 bits, in units of 2^-72: value = hi * 2^-8 + lo * 2^-72, where `lo` is
// unsigned. Integer addition is associative, so the sum has the same bits whatever the order of arrival. Each
// contribution stays below 2^31 in magnitude, which is 2^103 units, so the sum of kMaxContributions stays below 2^127.
constexpr int kUnitBits = 72;
constexpr double kUnit = 0x1p-72;
constexpr double kHiUnit = 0x1p-8;
constexpr double kLargestContribution = 0x1p31;
constexpr int kMaxContributions = 4095;  // of a sum, in one pass or in several

struct Contribution {
  ConstPlanes planes;
  Format format;
  double weight;
};

// Adds for each contribution, with rint(...) computed in double and rounded to nearest even, and the rest in integers:
//   int8, int4:  code * rint(weight * scale / kUnit)
//   fp32, bf16:  rint(weight * value / kUnit)
// Contributions of one format are added in one pass over hi and lo, which take 16 bytes per element while an int8
// contribution takes one. `empty`: the sum begins at zero, whatever hi and lo hold. The caller has checked with
// `inspect` that every contribution is valid and below kLargestContribution.
void accumulate(int64_t* hi, int64_t* lo, std::span<const Contribution> in, int64_t numel, bool empty, int threads);

// The mean of the sum with `in` accumulated on top. Does not change hi and lo, nor read them when the sum is `empty`.
//   out = float((upper * kHiUnit + lower * kUnit) / total_weight), one rounding per step, in double until the last,
//   where `lower` is `lo` read as a signed number and `upper` is the rest of the sum
void accumulated_mean(const int64_t* hi, const int64_t* lo, bool empty, std::span<const Contribution> in,
                      double total_weight, int64_t numel, float* out, int threads);

// What a receiver checks before it folds bytes that it cannot trust.
struct Inspection {
  double largest;  // the largest |code * scale| of finite scales, in double: above FLT_MAX, decode overflows
  int64_t bad_groups;  // groups whose scale is the bad-group mark 0x7FC0
  int64_t invalid;  // anything the encoder never makes: another non-finite scale, a non-finite fp32/bf16 element,
                    // a negative int8 scale, the int8 code -128
};
Inspection inspect(ConstPlanes in, int64_t numel, Format format, int threads);
Inspection joined(const Inspection& a, const Inspection& b);  // of a block, from those of two parts

// A 64-bit fingerprint of `bytes` (a multiple of 4) that any number of threads or GPU blocks can sum in any order:
//   sum over i of mix(word_i, i) mod 2^64, where word_i is the i-th little-endian uint32 and
//   mix(w, i) = z ^ (z >> 29), z = (w + (i + 1) * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9   (all mod 2^64)
// It detects divergence, not a deliberate collision.
uint64_t fingerprint(const void* data, size_t bytes, int threads);

}  // namespace parablock
