#include "descriptor.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstdint>

namespace parablock {

namespace {

// The numbers of all owned descriptors, as bits: the child of a fork may take no lock and allocate nothing. Numbers
// beyond the table, which Linux allows no process by default, are left to the child.
constexpr int kMost = 1 << 20;
std::array<std::atomic<uint64_t>, kMost / 64> owned;

void note(int fd, bool is_owned) {
  if (fd < 0 || fd >= kMost) return;
  const uint64_t bit = uint64_t{1} << (fd % 64);
  if (is_owned)
    owned[fd / 64].fetch_or(bit, std::memory_order_relaxed);
  else
    owned[fd / 64].fetch_and(~bit, std::memory_order_relaxed);
}

// Runs in a forked child, before anything else does.
void let_go_of_all() {
  const int nowhere = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (int word = 0; word < kMost / 64; ++word) {
    for (uint64_t bits = owned[word].load(std::memory_order_relaxed); bits != 0; bits &= bits - 1) {
      const int fd = word * 64 + std::countr_zero(bits);
      if (nowhere >= 0)
        dup3(nowhere, fd, O_CLOEXEC);
      else
        close(fd);  // no descriptor was left for /dev/null
    }
  }
  if (nowhere >= 0) close(nowhere);
}

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, let_go_of_all);

}  // namespace

Fd::Fd(int fd) : fd_(fd) { note(fd, true); }

Fd& Fd::operator=(Fd&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

void Fd::reset() {
  if (fd_ < 0) return;
  note(fd_, false);  // before another thread can be given the number
  close(fd_);
  fd_ = -1;
}

}  // namespace parablock
