// The kernels of one instruction set, as a table. codec.cc picks a table once and splits the work; a kernel sees one
// contiguous range on one thread.
#pragma once

#include <cstdint>

#include "codec.h"

namespace parablock::internal {

// Contributions that a kernel takes together: their products fit into the sums of digits without overflow.
constexpr int64_t kTogether = 64;

struct Kernels {
  const char* name;
  // [format][dtype of now][dtype of ref]
  int64_t (*encode[4][3][3])(const void* now, const void* ref, const float* residual_in, float* residual_out,
                             int64_t numel, Planes out);
  void (*decode[4])(ConstPlanes in, int64_t numel, float* out);
  void (*apply[4][3])(void* target, ConstPlanes in, int64_t numel);
  void (*accumulate[4])(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                        bool empty);
  // Of contributions that are all of this format, kTogether at most, without a sum; null: there is no such way.
  void (*mean[4])(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end, float* out);
  void (*accumulated_mean)(const int64_t* hi, const int64_t* lo, double total_weight, int64_t numel, float* out);
  Inspection (*inspect[4])(ConstPlanes in, int64_t numel);
  uint64_t (*fingerprint)(const uint32_t* words, int64_t first_index, int64_t count);
};

extern const Kernels kPortableKernels;
#ifdef __x86_64__
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
// The entries that differ on a machine that also has VNNI.
void accumulate_int8_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                          bool empty);
void accumulate_int4_vnni(int64_t* hi, int64_t* lo, const Contribution* in, int64_t count, int64_t begin, int64_t end,
                          bool empty);
void mean_int8_vnni(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end, float* out);
void mean_int4_vnni(const Contribution* in, int64_t count, double total_weight, int64_t begin, int64_t end, float* out);
#endif

}  // namespace parablock::internal

// The code between BEGIN and END is compiled for a richer instruction set than the rest of the build. Standard headers
// belong before BEGIN: the linker could merge a standard template that is instantiated in between with the portable
// instantiation, and keep the wrong one.
#ifdef __clang__
#define PARABLOCK_PRAGMA(text) _Pragma(#text)
#define PARABLOCK_TARGET_BEGIN(set) \
  PARABLOCK_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define PARABLOCK_TARGET_END _Pragma("clang attribute pop")
#else
#define PARABLOCK_PRAGMA(text) _Pragma(#text)
#define PARABLOCK_TARGET_BEGIN(set) _Pragma("GCC push_options") PARABLOCK_PRAGMA(GCC target(set))
#define PARABLOCK_TARGET_END _Pragma("GCC pop_options")
#endif

#define PARABLOCK_INLINE inline __attribute__((always_inline))
