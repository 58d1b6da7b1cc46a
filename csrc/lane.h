// One connection of a link: moves frames between its channel and the link's session. Loop thread only, except `stats`.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <optional>
#include <stdexcept>
#include <string>

#include "channel.h"
#include "loop.h"
#include "session.h"
#include "shaper.h"

namespace parablock {

// bytes_in and bytes_out count frames with their headers; the rest is the kernel's view of the connection (TCP_INFO).
struct LaneStats {
  uint32_t rtt_us = 0;
  uint32_t rttvar_us = 0;
  uint32_t retransmits = 0;    // segments, since the connection began
  uint64_t delivery_rate = 0;  // bytes per second, as last measured by the kernel
  uint32_t cwnd = 0;           // segments
  uint64_t bytes_in = 0;
  uint64_t bytes_out = 0;
  uint32_t unsent_bytes = 0;  // handed to the socket, not yet sent
  std::string congestion_control;
};

// TLS has failed. `permanent`: see TlsStream::permanent.
struct ChannelError : std::runtime_error {
  ChannelError(const std::string& why, bool is_permanent) : std::runtime_error(why), permanent(is_permanent) {}
  bool permanent;
};

class Lane {
 public:
  Lane(Channel channel, size_t index)
      : channel_(std::move(channel)), index_(index), since_ns_(monotonic_ns()), heard_ns_(since_ns_) {}

  int fd() const { return channel_.fd(); }
  size_t index() const { return index_; }
  Channel& channel() { return channel_; }
  const Channel& channel() const { return channel_; }

  // Both return the reason if the link is over. Throw ProtocolError, ChannelError and std::bad_alloc.
  using End = std::optional<std::string>;
  End read(Session& session, int64_t now_ns);
  End write(int64_t now_ns);  // writes the frames that may leave
  void read_and_forget();     // reads and discards: the link is closing
  uint64_t bytes_in() const { return bytes_in_.load(std::memory_order_relaxed); }
  uint64_t bytes_out() const { return bytes_out_.load(std::memory_order_relaxed); }

  // The frame leaves no earlier than the shaper allows. Its header goes ahead, so that the peer sees when it begins.
  void put(OutFrame frame, Passage passage);
  void record(Recorder recorder) { recorder_ = recorder; }
  bool empty() const { return departing_.empty() && (dropped_ || !channel_.unsent()); }
  bool full(size_t bytes) const { return departing_bytes_ >= bytes; }
  // Bytes to hand to the socket at once; also the limit of unsent bytes in the socket.
  size_t batch_bytes() const { return batch_bytes_; }
  int64_t next_ready_ns() const;

  bool opening() const { return channel_.opening(); }
  int64_t since_ns() const { return since_ns_; }
  bool wants_socket() const { return blocked_ && (!opening() || channel_.unsent()); }  // else waits for the peer

  int64_t heard_ns() const { return heard_ns_; }  // the last sign of life on this lane
  void heard(int64_t now_ns) { heard_ns_ = now_ns; }
  void forgive(int64_t ns, int64_t now_ns) {
    since_ns_ = std::min(since_ns_ + ns, now_ns);
    heard_ns_ = std::min(heard_ns_ + ns, now_ns);
  }

  // Asks the peer to accept this connection as a lane. The peer may refuse, so nothing else may leave before the
  // answer.
  void ask(OutFrame attach) {
    asked_ = true;
    put(std::move(attach), {});
  }
  bool unanswered() const { return asked_ && bytes_in() == 0; }
  // The peer refused this lane or never answered: the link goes on without it.
  bool dropped() const { return dropped_; }
  void drop();

  bool ended() const { return ended_; }      // the peer will send nothing more here
  bool blocked() const { return blocked_; }  // the socket is full, or other links have their turn
  void set_blocked(bool blocked) { blocked_ = blocked; }

  Interest watched;  // as last given to the loop; the transport maintains it

  LaneStats stats() const;  // any thread

 private:
  using Vectors = std::array<iovec, 16>;
  struct Departing {
    OutFrame frame;
    Passage passage;
    int64_t put_ns;  // only while recording
  };

  std::pair<size_t, size_t> gather(Vectors& out, int64_t now_ns) const;
  void consumed(size_t bytes);
  void follow_rate(int64_t now_ns);
  void note_sent(const Departing& departed, int64_t now_ns);

  Channel channel_;
  size_t index_;
  int64_t since_ns_;
  int64_t heard_ns_;
  std::atomic<uint64_t> bytes_in_{0};
  std::atomic<uint64_t> bytes_out_{0};

  std::deque<Departing> departing_;
  size_t departing_bytes_ = 0;
  size_t batch_bytes_ = kLeastUnsentBytes;
  int64_t rate_since_ns_ = 0;   // when the rate was last measured, and bytes_out then
  uint64_t rate_bytes_ = 0;
  size_t front_written_ = 0;  // bytes of departing_.front() that the socket took
  Recorder recorder_;
  int64_t write_began_ns_ = 0;  // only while recording
  int64_t last_sent_ns_ = 0;    // only while recording: when the socket had the whole previous frame
  bool blocked_ = false;
  bool ended_ = false;
  bool asked_ = false;
  bool dropped_ = false;
};

}  // namespace parablock
