// How much a sender may have under way: twice the bytes that the link delivers in one round trip. So the window of a
// sender that it holds back doubles every round trip, and other senders have no more under way than they can use.
// A minimum keeps a fast link busy. Transfers that come at the same time share the minimum: bytes under way occupy
// kernel memory, and more of them than a CPU cache holds slow down both ends.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace parablock {

// Counts the transfers of all links of a transport that have begun to arrive. Each of them holds a Share meanwhile.
class Incoming {
 public:
  class Share {
   public:
    explicit Share(std::shared_ptr<Incoming> incoming) : incoming_(std::move(incoming)) { ++incoming_->count_; }
    Share(Share&& other) noexcept = default;
    Share& operator=(Share&& other) = delete;
    ~Share() {
      if (incoming_ != nullptr) --incoming_->count_;
    }

   private:
    std::shared_ptr<Incoming> incoming_;
  };

  size_t count() const { return count_; }

 private:
  size_t count_ = 0;
};

class Window {
 public:
  void measured_round_trip(int64_t ns) {
    round_trips_[next_++ % round_trips_.size()] = ns;
    auto known = round_trips_.begin() + std::min(next_, round_trips_.size());
    round_trip_ns_ = *std::min_element(round_trips_.begin(), known);
  }

  void arrived(uint64_t bytes, int64_t now_ns) {
    int64_t interval = std::max(round_trip_ns_, kLeastIntervalNs);
    if (now_ns - last_ns_ > interval) {  // the link was idle: says nothing about its speed
      since_ns_ = now_ns;
      bytes_ = 0;
    }
    last_ns_ = now_ns;
    bytes_ += bytes;
    if (now_ns - since_ns_ < interval) return;
    double sample = 1e9 * static_cast<double>(bytes_) / static_cast<double>(now_ns - since_ns_);
    bytes_per_second_ = sample > bytes_per_second_ ? sample : bytes_per_second_ + (sample - bytes_per_second_) / 8;
    since_ns_ = now_ns;
    bytes_ = 0;
  }

  // `highest` also limits the minimum. `sharing`: the number of transfers that share the minimum.
  uint64_t bytes(uint64_t highest, size_t sharing) const {
    double in_a_round_trip = bytes_per_second_ * static_cast<double>(round_trip_ns_) / 1e9;
    uint64_t least = std::min(kLeastBytes / std::max<size_t>(sharing, 1), highest);
    return std::clamp(static_cast<uint64_t>(2 * in_a_round_trip), least, highest);
  }

 private:
  // Enough to keep a loopback link busy while a thread is not scheduled for a millisecond.
  static constexpr uint64_t kLeastBytes = 4 << 20;
  static constexpr int64_t kLeastIntervalNs = 10'000'000;

  std::array<int64_t, 8> round_trips_{};  // the last eight; the shortest has the least queueing in it

  size_t next_ = 0;
  int64_t round_trip_ns_ = 0;
  int64_t since_ns_ = 0;
  int64_t last_ns_ = 0;
  uint64_t bytes_ = 0;
  double bytes_per_second_ = 0;
};

}  // namespace parablock
