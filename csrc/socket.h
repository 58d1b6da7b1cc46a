// Non-blocking TCP sockets: creation, resolution, options. Every function may be called from any thread.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace parablock {

// Closes its descriptor when it goes.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd() { reset(); }

  int get() const { return fd_; }
  void reset();

 private:
  int fd_ = -1;
};

int64_t monotonic_ns();

// All throw std::system_error; its message names the address.
Fd listen_tcp(const std::string& host, uint16_t port);
Fd connect_tcp(const std::string& host, uint16_t port, int64_t timeout_ns);  // tries every address the name has
uint16_t local_port(const Fd& fd);

void set_link_options(int fd);              // non-blocking, TCP_NODELAY
std::string peer_address(int fd);           // "host:port"; "unknown" when the peer is gone

}  // namespace parablock
