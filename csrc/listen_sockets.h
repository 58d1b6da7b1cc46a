// The listening sockets of a transport, and the pauses in which their connections stay in the kernel's backlog. Loop
// thread only, except for `watch`.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "descriptor.h"
#include "loop.h"

namespace parablock {

class ListenSockets {
 public:
  static constexpr uint64_t kTokens = uint64_t{1} << 63;  // the tokens of listening sockets start here

  explicit ListenSockets(Loop& loop) : loop_(loop) {}

  void watch(const Fd& fd);  // any thread, before `add`
  void add(Fd fd) { sockets_.push_back(std::move(fd)); }
  int with_token(uint64_t token) const;  // the descriptor; negative: it is closed by now

  // For a lack of descriptors or of room: who waits in the backlog would wake the loop again and again.
  void pause(int64_t until_ns);
  void resume_when_due(int64_t now_ns);

  // Frees the ports, even in the moment in which a forked child has copies of the descriptors.
  void close();

 private:
  void set_reads(bool on);

  Loop& loop_;
  std::vector<Fd> sockets_;
  int64_t paused_until_ns_ = 0;  // 0: not paused
};

}  // namespace parablock
