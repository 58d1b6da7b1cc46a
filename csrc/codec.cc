// Picks the kernels for this machine and splits a block over threads; the arithmetic is in codec_kernels.h.
#include "codec.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "codec_table.h"
#include "thread_pool.h"

namespace parablock {
namespace {

using internal::Kernels;

static_assert(kSplitMultiple % kAlignment == 0, "a group must not be split between threads");

#ifdef __x86_64__
// __builtin_cpu_supports also checks that the operating system saves the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

const Kernels& vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels changed = internal::kAvx512Kernels;
    changed.name = "avx512-vnni";
    changed.accumulate[static_cast<int>(Format::kInt8)] = &internal::accumulate_int8_vnni;
    changed.accumulate[static_cast<int>(Format::kInt4)] = &internal::accumulate_int4_vnni;
    changed.mean[static_cast<int>(Format::kInt8)] = &internal::mean_int8_vnni;
    changed.mean[static_cast<int>(Format::kInt4)] = &internal::mean_int4_vnni;
    return changed;
  }();
  return kernels;
}
#endif

const Kernels* best_kernels() {
#ifdef __x86_64__
  if (has_vnni()) return &vnni_kernels();
  if (has_avx512()) return &internal::kAvx512Kernels;
  if (has_avx2()) return &internal::kAvx2Kernels;
#endif
  return &internal::kPortableKernels;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

int index(Format format) { return static_cast<int>(format); }
int index(Dtype dtype) { return static_cast<int>(dtype); }

template <class Pointer>
Pointer offset(Pointer base, size_t bytes) {
  return base == nullptr ? base : base + bytes;
}

const void* at(const void* base, Dtype dtype, int64_t element) {
  return static_cast<const uint8_t*>(base) + dtype_bytes(dtype) * static_cast<size_t>(element);
}

ConstPlanes at(ConstPlanes planes, Format format, int64_t element) {
  return {offset(planes.scales, scale_bytes(format, element)), offset(planes.codes, code_bytes(format, element))};
}

Planes at(Planes planes, Format format, int64_t element) {
  return {offset(planes.scales, scale_bytes(format, element)), offset(planes.codes, code_bytes(format, element))};
}

using ByFormat = std::array<std::vector<Contribution>, 4>;

ByFormat by_format(std::span<const Contribution> in) {
  ByFormat apart;
  for (const Contribution& one : in) apart[index(one.format)].push_back(one);
  return apart;
}

// A piece of a sum that fits the first-level cache, so that a sum that only serves a mean never goes to memory.
struct SumTile {
  static constexpr int64_t kElements = 1024;

  // Starts from an existing sum; null: from an empty one.
  void start(const int64_t* old_hi, const int64_t* old_lo, int64_t count) {
    empty = old_hi == nullptr;
    if (empty) return;
    std::copy_n(old_hi, count, hi);
    std::copy_n(old_lo, count, lo);
  }

  void add(std::span<const Contribution> alike, int64_t from, int64_t count) {
    for (size_t first = 0; first < alike.size(); first += internal::kTogether) {
      const size_t here = std::min<size_t>(alike.size() - first, internal::kTogether);
      std::array<Contribution, internal::kTogether> moved;
      for (size_t i = 0; i < here; ++i) {
        moved[i] = alike[first + i];
        moved[i].planes = at(moved[i].planes, moved[i].format, from);
      }
      const auto kernel = kernels().accumulate[index(alike.front().format)];
      kernel(hi, lo, moved.data(), static_cast<int64_t>(here), 0, count, empty);
      empty = false;
    }
  }

  alignas(64) int64_t hi[kElements];
  alignas(64) int64_t lo[kElements];
  bool empty = true;
};

}  // namespace

const char* instruction_set() { return kernels().name; }

void force_instruction_set(const char* name) {
  const std::string wanted(name);
  const Kernels* found = wanted == "portable" ? &internal::kPortableKernels : nullptr;
#ifdef __x86_64__
  if (wanted == "avx2" && has_avx2()) found = &internal::kAvx2Kernels;
  if (wanted == "avx512" && has_avx512()) found = &internal::kAvx512Kernels;
  if (wanted == "avx512-vnni" && has_vnni()) found = &vnni_kernels();
#endif
  if (found == nullptr) {
    throw std::invalid_argument("expected portable, avx2, avx512 or avx512-vnni, up to this machine's best, which is " +
                                std::string(best_kernels()->name) + "; found " + wanted);
  }
  chosen().store(found, std::memory_order_relaxed);
}

int64_t encode(const void* now, Dtype now_dtype, const void* ref, Dtype ref_dtype, const float* residual_in,
               float* residual_out, int64_t numel, Format format, Planes out, int threads) {
  const auto kernel = kernels().encode[index(format)][index(now_dtype)][index(ref_dtype)];
  std::atomic<int64_t> bad{0};
  parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
    const int64_t here =
        kernel(at(now, now_dtype, begin), at(ref, ref_dtype, begin), residual_in ? residual_in + begin : nullptr,
               residual_out ? residual_out + begin : nullptr, end - begin, at(out, format, begin));
    bad.fetch_add(here, std::memory_order_relaxed);
  });
  return bad.load(std::memory_order_relaxed);
}

void decode(ConstPlanes in, int64_t numel, Format format, float* out, int threads) {
  const auto kernel = kernels().decode[index(format)];
  parallel_for(numel, threads,
               [&](int64_t begin, int64_t end) { kernel(at(in, format, begin), end - begin, out + begin); });
}

void apply(void* target, Dtype dtype, ConstPlanes in, int64_t numel, Format format, int threads) {
  const auto kernel = kernels().apply[index(format)][index(dtype)];
  parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
    kernel(const_cast<void*>(at(target, dtype, begin)), at(in, format, begin), end - begin);
  });
}

void accumulate(int64_t* hi, int64_t* lo, std::span<const Contribution> in, int64_t numel, bool empty, int threads) {
  for (const std::vector<Contribution>& alike : by_format(in)) {
    if (alike.empty()) continue;
    const auto kernel = kernels().accumulate[index(alike.front().format)];
    parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
      kernel(hi, lo, alike.data(), static_cast<int64_t>(alike.size()), begin, end, empty);
    });
    empty = false;
  }
}

void accumulated_mean(const int64_t* hi, const int64_t* lo, bool empty, std::span<const Contribution> in,
                      double total_weight, int64_t numel, float* out, int threads) {
  const ByFormat apart = by_format(in);
  const bool alike = !in.empty() && apart[index(in[0].format)].size() == in.size();
  const auto direct = alike ? kernels().mean[index(in[0].format)] : nullptr;
  if (empty && direct != nullptr && in.size() <= internal::kTogether) {
    return parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
      direct(in.data(), static_cast<int64_t>(in.size()), total_weight, begin, end, out);
    });
  }
  const auto mean = kernels().accumulated_mean;
  parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
    if (in.empty()) return mean(hi + begin, lo + begin, total_weight, end - begin, out + begin);
    SumTile sum;
    for (int64_t from = begin; from < end; from += SumTile::kElements) {
      const int64_t count = std::min(end - from, SumTile::kElements);
      sum.start(empty ? nullptr : hi + from, empty ? nullptr : lo + from, count);
      for (const std::vector<Contribution>& alike : apart) sum.add(alike, from, count);
      mean(sum.hi, sum.lo, total_weight, count, out + from);
    }
  });
}

Inspection inspect(ConstPlanes in, int64_t numel, Format format, int threads) {
  const auto kernel = kernels().inspect[index(format)];
  std::mutex mutex;
  Inspection all{0.0, 0, 0};
  parallel_for(numel, threads, [&](int64_t begin, int64_t end) {
    const Inspection here = kernel(at(in, format, begin), end - begin);
    std::lock_guard<std::mutex> lock(mutex);
    all = joined(all, here);
  });
  return all;
}

Inspection joined(const Inspection& a, const Inspection& b) {
  return {std::max(a.largest, b.largest), a.bad_groups + b.bad_groups, a.invalid + b.invalid};
}

uint64_t fingerprint(const void* data, size_t bytes, int threads) {
  const auto kernel = kernels().fingerprint;
  const uint32_t* words = static_cast<const uint32_t*>(data);
  std::atomic<uint64_t> sum{0};
  parallel_for(static_cast<int64_t>(bytes / 4), threads, [&](int64_t begin, int64_t end) {
    sum.fetch_add(kernel(words + begin, begin, end - begin), std::memory_order_relaxed);
  });
  return sum.load(std::memory_order_relaxed);
}

}  // namespace parablock
