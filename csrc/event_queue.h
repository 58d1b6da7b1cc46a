// The events on their way from the loop thread to the program. The queue never refuses an event; for back-pressure it
// tells when a link has so many bytes of unread events that the loop must stop reading from that link.
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
  explicit EventQueue(Loop& loop) : loop_(loop) {}  // woken when a link is no longer full

  // Loop thread only: push, full, size. `most`: bytes of unread events above which the link is full.
  void push(Event event, size_t most);
  bool full(uint64_t link) const;
  size_t size() const;  // events of all links

  // Any other thread: next, spin_until. `next` returns the oldest event, or nullopt after `timeout_ns`.
  std::optional<Event> next(int64_t timeout_ns);
  // An answer is expected any moment: until this time `next` busy-polls before it sleeps.
  void spin_until(int64_t until_ns) { spin_until_ns_.store(until_ns, std::memory_order_relaxed); }

 private:
  Loop& loop_;
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Event> events_;
  struct Unread {  // events of one link that the program has not taken yet
    size_t bytes = 0;
    size_t most = 0;
    bool full() const { return bytes > most; }
  };
  std::map<uint64_t, Unread> unread_;
  std::atomic<bool> any_{false};  // whether there are events; read without the lock, for busy-polling
  std::atomic<int64_t> spin_until_ns_{0};
};

}  // namespace parablock
