// A small pool of native threads that split a linear range. Its workers only run the codec's kernels: they hold no
// Python state and never take the GIL.
#pragma once

#include <cstdint>
#include <type_traits>

namespace parablock {

namespace internal {
// Calls fn(context, begin, end) for disjoint ranges that cover [0, total), on up to `threads` threads.
void run_split(int64_t total, int64_t piece, int threads, void (*fn)(void*, int64_t, int64_t), void* context);
}  // namespace internal

// Every range passed to fn is a multiple of this long, except the last range.
constexpr int64_t kSplitMultiple = int64_t{1} << 15;

// Calls fn(begin, end) for disjoint ranges that cover [0, total). `threads` includes the caller, which always takes
// part; with one thread, or a total of at most kSplitMultiple, all work stays on the caller. fn must not throw. Any
// number of threads may call this at once; they share the pool's threads, which start when first needed.

template <class Fn>
void parallel_for(int64_t total, int threads, Fn&& fn) {
  if (total <= 0) return;
  if (threads <= 1 || total <= kSplitMultiple) {
    fn(int64_t{0}, total);
    return;
  }
  // Four pieces per thread, so that a core that other work slows down does not hold up the others.
  const int64_t wanted = total / (int64_t{threads} * 4);
  const int64_t piece = (wanted / kSplitMultiple + 1) * kSplitMultiple;
  using Body = std::remove_reference_t<Fn>;
  internal::run_split(
      total, piece, threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&fn)));
}

}  // namespace parablock
