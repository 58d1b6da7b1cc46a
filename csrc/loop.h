// epoll, a timer and a way to wake it: what waits for sockets. Knows nothing of links or frames.
#pragma once

#include <sys/epoll.h>

#include <cstdint>
#include <vector>

#include "socket.h"

namespace parablock {

class Loop {
 public:
  struct Ready {
    uint64_t token;
    bool readable;  // or hung up, or in error: reading tells which
    bool writable;
  };

  Loop();

  // Loop thread only. `token` comes back in Ready; kWakeToken is taken.
  void add(int fd, uint64_t token);
  void watch_writes(int fd, uint64_t token, bool on);
  void remove(int fd);

  // Waits for sockets, for `wake` or until `deadline_ns`. Loop thread only.
  void wait(int64_t deadline_ns, std::vector<Ready>& ready);

  // Any thread, also before and after `wait`; never blocks.
  void wake();

 private:
  static constexpr uint64_t kWakeToken = ~uint64_t{0};
  static constexpr uint64_t kTimerToken = ~uint64_t{0} - 1;

  Fd epoll_;
  Fd wake_;
  Fd timer_;
};

}  // namespace parablock
