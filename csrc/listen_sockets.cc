#include "listen_sockets.h"

#include <sys/socket.h>

namespace parablock {
namespace {

uint64_t token_of(const Fd& fd) { return ListenSockets::kTokens + static_cast<uint64_t>(fd.get()); }

}  // namespace

void ListenSockets::watch(const Fd& fd) { loop_.add(fd.get(), token_of(fd)); }

int ListenSockets::with_token(uint64_t token) const {
  for (const Fd& fd : sockets_)
    if (token_of(fd) == token) return fd.get();
  return -1;
}

void ListenSockets::pause(int64_t until_ns) {
  paused_until_ns_ = until_ns;
  set_reads(false);
}

void ListenSockets::resume_when_due(int64_t now_ns) {
  if (paused_until_ns_ == 0 || now_ns < paused_until_ns_) return;
  paused_until_ns_ = 0;
  set_reads(true);
}

void ListenSockets::close() {
  for (const Fd& fd : sockets_) {
    loop_.remove(fd.get());
    shutdown(fd.get(), SHUT_RDWR);
  }
  sockets_.clear();
}

void ListenSockets::set_reads(bool on) {
  for (const Fd& fd : sockets_) loop_.change(fd.get(), token_of(fd), {.reads = on});
}

}  // namespace parablock
