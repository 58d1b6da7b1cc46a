// Non-blocking TCP sockets: creation, resolution, options. Every function may be called from any thread.
#pragma once

#include <cstdint>
#include <string>

#include "descriptor.h"

namespace parablock {

int64_t monotonic_ns();

constexpr size_t kLeastUnsentBytes = 256 << 10;  // the limit of a new connection

// All throw std::system_error; its message names the address.
Fd listen_tcp(const std::string& host, uint16_t port);
Fd connect_tcp(const std::string& host, uint16_t port, int64_t timeout_ns);  // each address gets a share of the time
Fd connect_to_peer_of(int fd, int64_t timeout_ns);  // another connection to the same peer address
Fd duplicate(int fd);
uint16_t local_port(const Fd& fd);

void set_link_options(int fd);              // non-blocking, TCP_NODELAY, little unsent data in the kernel
void set_unsent_limit(int fd, size_t bytes);  // most unsent bytes in the kernel, which later data queues behind
void set_user_timeout(int fd, int64_t ns);  // the kernel ends a connection whose data is unacknowledged for this long
std::string congestion_control(int fd);  // the algorithm's name; empty if the kernel gives none
std::string peer_address(int fd);  // "host:port"; "unknown" when the peer is gone
std::string peer_network(int fd);  // the addresses that one user controls: an IPv4 address, or 48 bits of IPv6

// The kernel's view of a connection; zeros if the kernel gives none.
struct TcpInfo {
  uint32_t rtt_us = 0;
  uint32_t rttvar_us = 0;
  uint32_t retransmits = 0;
  uint32_t cwnd = 0;  // segments
  uint32_t unsent_bytes = 0;  // in the send buffer
  uint64_t delivery_rate = 0;  // bytes per second
};
TcpInfo tcp_info(int fd);

}  // namespace parablock
