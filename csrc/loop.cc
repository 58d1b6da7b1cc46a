#include "loop.h"

#include <sched.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace parablock {
namespace {

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

void drain(int fd) {
  uint64_t count;
  while (read(fd, &count, sizeof count) > 0) {
  }
}

epoll_event event_for(uint64_t token, Interest interest) {
  epoll_event event{};
  if (interest.reads) event.events |= EPOLLIN;
  if (interest.writes) event.events |= EPOLLOUT;
  if (event.events == 0) event.events = EPOLLET;  // epoll reports ends and errors even so: once is enough
  event.data.u64 = token;
  return event;
}

}  // namespace

Loop::Loop()
    : epoll_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      wake_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")),
      timer_(checked(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create")) {
  add(wake_.get(), kWakeToken);
  add(timer_.get(), kTimerToken);
}

void Loop::add(int fd, uint64_t token, Interest interest) {
  epoll_event event = event_for(token, interest);
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

void Loop::change(int fd, uint64_t token, Interest interest) {
  epoll_event event = event_for(token, interest);
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event), "epoll_ctl");
}

void Loop::remove(int fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

// Waits for events of sockets, the timer and `wake`; returns the number of events.
int Loop::look(int64_t spin_ns, Events& events) {
  const int most = static_cast<int>(events.size());
  const int64_t until_ns = spin_ns > 0 ? monotonic_ns() + spin_ns : 0;
  for (int64_t now_ns = 0; now_ns < until_ns; now_ns = monotonic_ns()) {
    if (int count = epoll_wait(epoll_.get(), events.data(), most, 0); count != 0) return count;
    sched_yield();
  }
  return epoll_wait(epoll_.get(), events.data(), most, -1);
}

void Loop::wait(int64_t deadline_ns, int64_t spin_ns, std::vector<Ready>& ready) {
  ready.clear();
  set_timer(std::max<int64_t>(deadline_ns, 1));
  Events events;
  int count = look(spin_ns, events);
  for (int i = 0; i < count; ++i) {
    uint64_t token = events[i].data.u64;
    if (token == kWakeToken) {
      drain(wake_.get());
      awake_.exchange(false);  // acquires what the wakers wrote before
    } else if (token == kTimerToken) {
      drain(timer_.get());
      timer_at_ns_ = 0;
    } else {
      bool readable = (events[i].events & ~static_cast<uint32_t>(EPOLLOUT)) != 0;
      ready.push_back({token, readable});
    }
  }
}

// Uses an absolute timer: epoll's own timeout has a resolution of milliseconds, far too coarse to shape a fast link. A
// timer that is set too early stays set: one needless wake-up is cheaper than a system call per turn.
void Loop::set_timer(int64_t at_ns) {
  if (timer_at_ns_ != 0 && timer_at_ns_ <= at_ns) return;
  itimerspec at{};
  at.it_value.tv_sec = at_ns / 1'000'000'000;
  at.it_value.tv_nsec = at_ns % 1'000'000'000;
  checked(timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &at, nullptr), "timerfd_settime");
  timer_at_ns_ = at_ns;
}

void Loop::wake() {
  if (awake_.exchange(true)) return;
  uint64_t one = 1;
  // The only failure is a full counter, and a full counter wakes too.
  [[maybe_unused]] ssize_t written = write(wake_.get(), &one, sizeof one);
}

}  // namespace parablock
