// What happened, from the loop thread to those who take it. It holds whatever comes, but says when so much of one link
// lies here that this link's reading is to stop.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>

#include "loop.h"
#include "session.h"

namespace parablock {

class EventQueue {
 public:
  explicit EventQueue(Loop& loop) : loop_(loop) {}  // woken when a link is full no longer

  // Loop thread only, as the next two. `most`: bytes of this link's events that may lie here before it is full.
  void push(Event event, size_t most);
  bool full(uint64_t link) const;
  size_t size() const;  // of all links

  // The oldest event, or nothing after `timeout_ns`. Any other thread, as the next.
  std::optional<Event> next(int64_t timeout_ns);
  // An answer to what was said may come any moment: until then one who waits looks for it before falling asleep.
  void spin_until(int64_t until_ns) { spin_until_ns_.store(until_ns, std::memory_order_relaxed); }

 private:
  Loop& loop_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  struct Unread {  // of one link's events, that nobody took yet
    size_t bytes = 0;
    size_t most = 0;
    bool full() const { return bytes > most; }
  };
  std::map<uint64_t, Unread> unread_;
  std::atomic<bool> any_{false};  // whether there are events, without the lock, for one who looks again and again
  std::atomic<int64_t> spin_until_ns_{0};
};

}  // namespace parablock
