// How a transfer gets on, and when it stands still: silence is measured against the transfer's own speed, so that a
// slow one is not taken for a stalled one. Knows nothing of clocks; times are given.
#pragma once

#include <algorithm>
#include <cstdint>

namespace parablock {

class Progress {
 public:
  void moved(uint64_t bytes, int64_t now_ns) {
    if (!began_) began_ns_ = now_ns;
    began_ = true;
    bytes_ += bytes;
    last_ns_ = now_ns;
    reported_ = false;
  }

  int64_t silence_ns(int64_t now_ns) const { return now_ns - last_ns_; }

  // The longest silence that slowness explains: four times what `next_bytes` take at the speed so far, and four round
  // trips.
  int64_t patience_ns(uint64_t next_bytes, int64_t round_trip_ns) const {
    if (bytes_ == 0) return kUnknownSpeedNs;
    double at_this_speed =
        static_cast<double>(last_ns_ - began_ns_) * static_cast<double>(next_bytes) / static_cast<double>(bytes_);
    return std::max(kLeastNs, 4 * (static_cast<int64_t>(std::min(at_this_speed, kMostNs)) + round_trip_ns));
  }

  // Once it has begun: true once for each time that it stands still.
  bool stalls(uint64_t next_bytes, int64_t round_trip_ns, int64_t now_ns) {
    if (!began_ || reported_ || silence_ns(now_ns) <= patience_ns(next_bytes, round_trip_ns)) return false;
    reported_ = true;
    return true;
  }

 private:
  static constexpr int64_t kLeastNs = 2'000'000'000;
  static constexpr int64_t kUnknownSpeedNs = 60'000'000'000;
  static constexpr double kMostNs = 3.6e12;

  bool began_ = false;
  int64_t began_ns_ = 0;
  int64_t last_ns_ = 0;
  uint64_t bytes_ = 0;
  bool reported_ = false;
};

}  // namespace parablock
