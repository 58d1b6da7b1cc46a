// Tells when a transfer stalls: judges silence by the transfer's own speed, so that a slow transfer does not count as
// stalled. Reads no clock; the caller passes the time.
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

  // The longest silence that slowness explains: four times the time that `next_bytes` take at the speed so far, plus
  // four round trips.
  int64_t patience_ns(uint64_t next_bytes, int64_t round_trip_ns) const {
    if (bytes_ == 0) return kUnknownSpeedNs;
    double at_this_speed =
        static_cast<double>(last_ns_ - began_ns_) * static_cast<double>(next_bytes) / static_cast<double>(bytes_);
    return std::max(kLeastNs, 4 * (static_cast<int64_t>(std::min(at_this_speed, kMostNs)) + round_trip_ns));
  }

  // True once per stall, and only after the transfer has begun.
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
