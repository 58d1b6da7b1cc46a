// Simulates a slow link in front of a fast socket: a token bucket (bytes per second) and a one-way delay. Decides when
// a frame may start and when its last byte would have arrived. Independent of frames and sockets.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace parablock {

// When a frame arrives at the far end: its first byte and its last.
struct Passage {
  int64_t first_ns = 0;
  int64_t last_ns = 0;
};

class Shaper {
 public:
  // `bytes_per_second` 0 means unlimited.
  void configure(double bytes_per_second, int64_t delay_ns) {
    bytes_per_second_ = bytes_per_second;
    delay_ns_ = delay_ns;
  }

  bool active() const { return bytes_per_second_ > 0 || delay_ns_ > 0; }

  // The earliest time at which the next frame may start; in the past when the line is idle.
  int64_t free_at() const { return free_at_; }

  // Puts a frame of `bytes` on the line and returns when it arrives. `waited`: the frame was ready while
  // the line was busy, so it follows the previous frame without a gap, however late the caller's timer fired. Otherwise
  // the frame starts now.
  Passage transmit(size_t bytes, int64_t now_ns, bool waited) {
    int64_t start = waited ? free_at_ : std::max(free_at_, now_ns);
    double seconds = bytes_per_second_ > 0 ? static_cast<double>(bytes) / bytes_per_second_ : 0.0;
    free_at_ = start + static_cast<int64_t>(1e9 * std::min(seconds, kMostSeconds));
    return {start + delay_ns_, free_at_ + delay_ns_};
  }

 private:
  static constexpr double kMostSeconds = 3.2e7;  // a year; a longer time would overflow and makes no difference

  double bytes_per_second_ = 0;
  int64_t delay_ns_ = 0;
  int64_t free_at_ = 0;
};

}  // namespace parablock
