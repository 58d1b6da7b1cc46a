// Waits for sockets: epoll, a timer and a wake-up. Independent of links and frames.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "socket.h"

namespace parablock {

// The events to wait for on a socket.
struct Interest {
  bool reads = true;
  bool writes = false;
  bool operator==(const Interest&) const = default;
};

class Loop {
 public:
  struct Ready {
    uint64_t token;
    bool readable;  // or hung up or in error, reported whatever the interest: a read tells which
  };

  Loop();

  // Any thread: add, change, remove. `token` comes back in Ready; the two highest tokens are reserved. epoll forgets a
  // descriptor that is closed without `remove`, unless there is a copy of it. Removing an unknown descriptor does
  // nothing.
  void add(int fd, uint64_t token, Interest interest = {});
  void change(int fd, uint64_t token, Interest interest);
  void remove(int fd);

  // Waits for sockets, for `wake` or until `deadline_ns`. Busy-polls for the first `spin_ns` instead of sleeping, and
  // yields the core between polls. Loop thread only.
  void wait(int64_t deadline_ns, int64_t spin_ns, std::vector<Ready>& ready);

  // Any thread, also before and after `wait`; never blocks.
  void wake();

 private:
  using Events = std::array<epoll_event, 64>;

  int look(int64_t spin_ns, Events& events);
  void set_timer(int64_t at_ns);

  static constexpr uint64_t kWakeToken = ~uint64_t{0};
  static constexpr uint64_t kTimerToken = ~uint64_t{0} - 1;

  Fd epoll_;
  Fd wake_;
  Fd timer_;
  std::atomic<bool> awake_{false};  // `wake` was called since the last `wait`: further wake-ups are redundant
  int64_t timer_at_ns_ = 0;  // when the timer will fire; 0: not set
};

}  // namespace parablock
