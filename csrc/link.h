// One peer: a socket, its Session and its Shaper. All of it belongs to the loop thread; only the counters may be read
// elsewhere.
#pragma once

#include <sys/uio.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <string>

#include "loop.h"
#include "session.h"
#include "shaper.h"
#include "socket.h"

namespace parablock {

struct LinkCounters {
  std::atomic<uint64_t> bytes_in{0};
  std::atomic<uint64_t> bytes_out{0};
  std::atomic<int64_t> round_trip_ns{0};
};

class Link {
 public:
  Link(uint64_t id, Fd fd, SessionLimits limits, int64_t idle_timeout_ns);

  uint64_t id() const { return id_; }
  int fd() const { return fd_.get(); }
  Session& session() { return session_; }
  Shaper& shaper() { return shaper_; }
  const LinkCounters& counters() const { return counters_; }

  // Each returns false when the link is over, `reason` then says why. Throw ProtocolError and what memory throws.
  bool read(int64_t now_ns);   // reads what has come
  bool write(int64_t now_ns);  // keep-alive and deadlines, then writes what may leave
  bool fail(std::string reason);  // returns false; the first reason stays

  // Nothing is read, and the peer's silence not counted, while the program is behind with this link's events.
  void pause_reads(bool paused) { reads_paused_ = paused; }

  // What the loop should watch for, and what it was last told, which the transport keeps up to date.
  Interest interest() const { return {.reads = closing_ || !reads_paused_, .writes = wants_write_}; }
  Interest watched;

  // When `write` should be called next, whatever the socket does.
  int64_t wake_at() const;

  // Let what is queued leave, then close; at `deadline_ns` at the latest.
  void close_after_flush(int64_t deadline_ns, std::string reason);
  const std::string& reason() const { return reason_; }

 private:
  using Vectors = std::array<iovec, 16>;

  bool read_and_forget();
  bool on_time(int64_t now_ns);
  bool pull_frames(int64_t now_ns);
  bool write_ready(int64_t now_ns);
  std::pair<size_t, size_t> gather(Vectors& out, int64_t now_ns) const;
  void consumed(size_t bytes);

  uint64_t id_;
  Fd fd_;
  Session session_;
  Shaper shaper_;
  LinkCounters counters_;
  int64_t idle_timeout_ns_;
  int64_t ping_every_ns_;

  struct Departing {
    OutFrame frame;
    int64_t ready_at_ns;  // not handed to the socket before: the shaper's word
  };
  std::deque<Departing> departing_;
  size_t front_written_ = 0;  // bytes of departing_.front() the socket took: a short write resumes here
  bool wants_write_ = false;  // the socket was full, or it was other links' turn
  bool line_was_busy_ = false;
  bool reads_paused_ = false;

  int64_t last_heard_ns_;
  int64_t last_ping_ns_;
  bool closing_ = false;
  bool write_shut_ = false;
  int64_t close_deadline_ns_ = 0;
  std::string reason_;
};

}  // namespace parablock
