#include "loop.h"

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

}  // namespace

Loop::Loop()
    : epoll_(checked(epoll_create1(EPOLL_CLOEXEC), "epoll_create1")),
      wake_(checked(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), "eventfd")),
      timer_(checked(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create")) {
  add(wake_.get(), kWakeToken);
  add(timer_.get(), kTimerToken);
}

void Loop::add(int fd, uint64_t token) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = token;
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

void Loop::watch_writes(int fd, uint64_t token, bool on) {
  epoll_event event{};
  event.events = EPOLLIN | (on ? static_cast<uint32_t>(EPOLLOUT) : 0u);
  event.data.u64 = token;
  checked(epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event), "epoll_ctl");
}

void Loop::remove(int fd) { epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr); }

void Loop::wait(int64_t deadline_ns, std::vector<Ready>& ready) {
  ready.clear();
  // An absolute timer: epoll's own timeout counts whole milliseconds, far too coarse to shape a fast link.
  itimerspec at{};
  at.it_value.tv_sec = std::max<int64_t>(deadline_ns, 1) / 1'000'000'000;
  at.it_value.tv_nsec = std::max<int64_t>(deadline_ns, 1) % 1'000'000'000;
  timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &at, nullptr);
  epoll_event events[64];
  int count = epoll_wait(epoll_.get(), events, 64, -1);
  for (int i = 0; i < count; ++i) {
    uint64_t token = events[i].data.u64;
    if (token == kWakeToken) {
      drain(wake_.get());
    } else if (token == kTimerToken) {
      drain(timer_.get());
    } else {
      bool readable = (events[i].events & ~static_cast<uint32_t>(EPOLLOUT)) != 0;
      ready.push_back({token, readable, (events[i].events & EPOLLOUT) != 0});
    }
  }
}

void Loop::wake() {
  uint64_t one = 1;
  // The only failure is a full counter, and a full counter wakes too.
  [[maybe_unused]] ssize_t written = write(wake_.get(), &one, sizeof one);
}

}  // namespace parablock
