// One peer: a socket, its Session and its Shaper. All of it belongs to the loop thread; only the counters may be read
// elsewhere.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

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

  // Reads what has come. Returns false when the link is over; `reason` says why.
  bool read(int64_t now_ns);
  // Writes what may leave. Likewise. Sets `wants_write` when the socket is full.
  bool write(int64_t now_ns);
  // Keep-alive and deadlines. Likewise.
  bool tick(int64_t now_ns);

  bool wants_write() const { return wants_write_; }
  // When `write` or `tick` should be called next, whatever the socket does.
  int64_t wake_at() const;

  // Let what is queued leave, then close; at `deadline_ns` at the latest.
  void close_after_flush(int64_t deadline_ns, std::string reason);
  const std::string& reason() const { return reason_; }

 private:
  bool fail(std::string reason);
  bool read_and_forget();
  bool pull_frames(int64_t now_ns);
  bool write_ready(int64_t now_ns);
  size_t gather(std::vector<iovec>& out, int64_t now_ns) const;
  void consumed(size_t bytes);

  uint64_t id_;
  Fd fd_;
  Session session_;
  Shaper shaper_;
  LinkCounters counters_;
  int64_t idle_timeout_ns_;

  struct Departing {
    OutFrame frame;
    int64_t ready_at_ns;  // not handed to the socket before: the shaper's word
  };
  std::deque<Departing> departing_;
  size_t front_written_ = 0;  // bytes of departing_.front() the socket took: a short write resumes here
  bool wants_write_ = false;
  bool line_was_busy_ = false;

  int64_t last_heard_ns_;
  int64_t last_ping_ns_;
  bool closing_ = false;
  bool write_shut_ = false;
  int64_t close_deadline_ns_ = 0;
  std::string reason_;
};

}  // namespace parablock
