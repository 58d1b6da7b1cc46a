// epoll, a timer and a way to wake it: what waits for sockets. Knows nothing of links or frames.
#pragma once

#include <sys/epoll.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "socket.h"

namespace parablock {

// What to wait for on a socket.
struct Interest {
  bool reads = true;
  bool writes = false;
  bool operator==(const Interest&) const = default;
};

class Loop {
 public:
  struct Ready {
    uint64_t token;
    bool readable;  // or hung up, or in error, which come whatever the interest: reading tells which
  };

  Loop();

  // Any thread. `token` comes back in Ready; the two highest are taken. A descriptor that is closed without `remove` is
  // forgotten by itself, unless a process that was forked holds it, too. Removing one that is not there does nothing.
  void add(int fd, uint64_t token, Interest interest = {});
  void change(int fd, uint64_t token, Interest interest);
  void remove(int fd);

  // Waits for sockets, for `wake` or until `deadline_ns`. For the first `spin_ns` it does not sleep but looks again and
  // again, and lets other threads have the core in between. Loop thread only.
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
  std::atomic<bool> awake_{false};  // `wake` was called since the last `wait`: once is enough
  int64_t timer_at_ns_ = 0;  // when the timer will fire; 0: not set
};

}  // namespace parablock
