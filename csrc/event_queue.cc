#include "event_queue.h"

#include <sched.h>

#include <chrono>
#include <utility>

namespace parablock {
namespace {

size_t cost(const Event& event) { return sizeof event + event.text.size(); }

}  // namespace

void EventQueue::push(Event event, size_t most) {
  {
    std::lock_guard lock(mutex_);
    Unread& unread = unread_[event.link];
    unread.bytes += cost(event);
    unread.most = most;
    events_.push_back(std::move(event));
    any_.store(true, std::memory_order_relaxed);
  }
  ready_.notify_one();
}

// The answer may be outdated at once, which is harmless: the thread that takes an event wakes the loop to ask again.
bool EventQueue::full(uint64_t link) const {
  std::lock_guard lock(mutex_);
  auto unread = unread_.find(link);
  return unread != unread_.end() && unread->second.full();
}

size_t EventQueue::size() const {
  std::lock_guard lock(mutex_);
  return events_.size();
}

std::optional<Event> EventQueue::next(int64_t timeout_ns) {
  const int64_t spin_until_ns = timeout_ns > 0 ? spin_until_ns_.load(std::memory_order_relaxed) : 0;
  while (!any_.load(std::memory_order_relaxed) && monotonic_ns() < spin_until_ns) sched_yield();
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return !events_.empty(); });
  if (events_.empty()) return std::nullopt;
  Event event = std::move(events_.front());
  events_.pop_front();
  any_.store(!events_.empty(), std::memory_order_relaxed);
  auto found = unread_.find(event.link);
  Unread& unread = found->second;
  const bool was_full = unread.full();
  unread.bytes -= cost(event);
  if (was_full && !unread.full()) loop_.wake();
  if (unread.bytes == 0) unread_.erase(found);
  return event;
}

}  // namespace parablock
