#include "socket.h"

#include <fcntl.h>
#include <linux/tcp.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <memory>
#include <system_error>

namespace parablock {
namespace {

constexpr int kBacklog = 512;

std::system_error failure(int error, const std::string& what) {
  return std::system_error(error, std::generic_category(), what);
}

// Without its port: 4 bytes of IPv4 or 16 of IPv6.
std::string address_bytes(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    const in_addr& v4 = reinterpret_cast<const sockaddr_in*>(address)->sin_addr;
    return std::string(reinterpret_cast<const char*>(&v4), sizeof v4);
  }
  const in6_addr& v6 = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
  const std::string bytes(reinterpret_cast<const char*>(v6.s6_addr), sizeof v6);
  return IN6_IS_ADDR_V4MAPPED(&v6) ? bytes.substr(12) : bytes;
}

bool is_loopback(const sockaddr* address) {
  const std::string bytes = address_bytes(address);
  return bytes.size() == 4 ? bytes[0] == 127 : bytes == std::string(15, '\0') + '\1';
}

std::string endpoint(const std::string& host, uint16_t port) { return host + ":" + std::to_string(port); }

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

AddressList resolve(const std::string& host, uint16_t port, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  int status = getaddrinfo(host.empty() ? nullptr : host.c_str(), std::to_string(port).c_str(), &hints, &found);
  if (status != 0)
    throw failure(status == EAI_SYSTEM ? errno : EADDRNOTAVAIL,
                  "cannot resolve " + endpoint(host, port) + " (" + gai_strerror(status) + ")");
  return AddressList(found, &freeaddrinfo);
}

// To listen at this address or connect to it.
Fd open_socket(const sockaddr* address) {
  Fd fd(socket(address->sa_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  // On loopback nothing can be congested, and timers that space the segments cost more than their CRC-32C. BBR sets
  // such timers, and a connection that began with BBR keeps them. Reno sets none, and every kernel has it.
  constexpr char kReno[] = "reno";
  if (fd.get() >= 0 && is_loopback(address)) setsockopt(fd.get(), IPPROTO_TCP, TCP_CONGESTION, kReno, sizeof kReno - 1);
  return fd;
}

// Waits for a non-blocking connect; returns its error, 0 for success.
int finish_connect(int fd, int64_t deadline_ns) {
  while (true) {
    int64_t left_ns = deadline_ns - monotonic_ns();
    if (left_ns <= 0) return ETIMEDOUT;
    pollfd waiting{fd, POLLOUT, 0};
    int count = poll(&waiting, 1, static_cast<int>(left_ns / 1'000'000 + 1));
    if (count < 0 && errno != EINTR) return errno;
    if (count <= 0) continue;
    int error = 0;
    socklen_t length = sizeof error;
    getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
    return error;
  }
}

}  // namespace

int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

Fd listen_tcp(const std::string& host, uint16_t port) {
  AddressList addresses = resolve(host, port, AI_PASSIVE);
  int error = EADDRNOTAVAIL;
  for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next) {
    Fd fd = open_socket(at->ai_addr);
    if (fd.get() < 0) {
      error = errno;
      continue;
    }
    int on = 1;
    setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd.get(), at->ai_addr, at->ai_addrlen) == 0 && listen(fd.get(), kBacklog) == 0) return fd;
    error = errno;
  }
  throw failure(error, "cannot listen on " + endpoint(host, port));
}

Fd connect_tcp(const std::string& host, uint16_t port, int64_t timeout_ns) {
  int64_t deadline_ns = monotonic_ns() + timeout_ns;
  AddressList addresses = resolve(host, port, 0);
  int error = EADDRNOTAVAIL;
  int64_t addresses_left = 0;
  for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next) ++addresses_left;
  for (const addrinfo* at = addresses.get(); at != nullptr; at = at->ai_next, --addresses_left) {
    Fd fd = open_socket(at->ai_addr);
    if (fd.get() < 0) {
      error = errno;
      continue;
    }
    error = connect(fd.get(), at->ai_addr, at->ai_addrlen) == 0 ? 0 : errno;
    // An address that does not answer uses up only its share of the time.
    const int64_t now_ns = monotonic_ns();
    if (error == EINPROGRESS) error = finish_connect(fd.get(), now_ns + (deadline_ns - now_ns) / addresses_left);
    if (error == 0) return fd;
  }
  throw failure(error, "cannot connect to " + endpoint(host, port));
}

Fd duplicate(int fd) {
  Fd copy(fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (copy.get() < 0) throw failure(errno, "dup");
  return copy;
}

uint16_t local_port(const Fd& fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &length) != 0) throw failure(errno, "getsockname");
  in_port_t port = address.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6&>(address).sin6_port
                                                 : reinterpret_cast<sockaddr_in&>(address).sin_port;
  return ntohs(port);
}

Fd connect_to_peer_of(int fd, int64_t timeout_ns) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0) throw failure(errno, "getpeername");
  Fd other = open_socket(reinterpret_cast<sockaddr*>(&address));
  if (other.get() < 0) throw failure(errno, "socket");
  int error = connect(other.get(), reinterpret_cast<sockaddr*>(&address), length) == 0 ? 0 : errno;
  if (error == EINPROGRESS) error = finish_connect(other.get(), monotonic_ns() + timeout_ns);
  if (error != 0) throw failure(error, "cannot open another connection to " + peer_address(fd));
  return other;
}

void set_link_options(int fd) {
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  int on = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  // Do not set the buffer sizes: the kernel adapts them to bandwidth x delay, but only while they are not set.
  set_unsent_limit(fd, kLeastUnsentBytes);
}

void set_unsent_limit(int fd, size_t bytes) {
  const int limit = static_cast<int>(bytes);
  setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &limit, sizeof limit);
}

void set_user_timeout(int fd, int64_t ns) {
  auto ms = static_cast<unsigned>(std::clamp<int64_t>(ns / 1'000'000, 1, std::numeric_limits<int>::max()));
  setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &ms, sizeof ms);
}

TcpInfo tcp_info(int fd) {
  ::tcp_info kernel{};
  socklen_t length = sizeof kernel;
  if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &kernel, &length) != 0) return {};
  return {.rtt_us = kernel.tcpi_rtt,
          .rttvar_us = kernel.tcpi_rttvar,
          .retransmits = kernel.tcpi_total_retrans,
          .cwnd = kernel.tcpi_snd_cwnd,
          .unsent_bytes = kernel.tcpi_notsent_bytes,
          .delivery_rate = kernel.tcpi_delivery_rate};
}

std::string congestion_control(int fd) {
  char name[16] = {};  // the kernel's TCP_CA_NAME_MAX
  socklen_t length = sizeof name;
  if (getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &length) != 0) return {};
  return std::string(name, strnlen(name, sizeof name));
}

std::string peer_address(int fd) {
  sockaddr_storage address{};
  socklen_t length = sizeof address;
  char host[NI_MAXHOST];
  char port[NI_MAXSERV];
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&address), &length) != 0 ||
      getnameinfo(reinterpret_cast<sockaddr*>(&address), length, host, sizeof host, port, sizeof port,
                  NI_NUMERICHOST | NI_NUMERICSERV) != 0)
    return "unknown";
  return std::string(host) + ":" + port;
}

std::string peer_network(int fd) {
  sockaddr_storage peer{};
  socklen_t length = sizeof peer;
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) != 0) return "unknown";
  const std::string address = address_bytes(reinterpret_cast<sockaddr*>(&peer));
  return address.substr(0, address.size() == 4 ? 4 : 6);
}

}  // namespace parablock
