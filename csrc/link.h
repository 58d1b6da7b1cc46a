// The link to one peer: a Session, the lanes that carry it, and a Shaper. Loop thread only, except `stats`.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "lane.h"
#include "session.h"
#include "shaper.h"

namespace parablock {

struct LinkStats {
  uint64_t bytes_in = 0;  // of all lanes
  uint64_t bytes_out = 0;
  int64_t round_trip_ns = 0;
  uint64_t moved_bytes = 0;  // of payload: received here, or acknowledged by the peer
  uint64_t corrupt_chunks = 0;  // chunks that failed their checksum here and were requested again
  std::vector<LaneStats> lanes;
};

class Link {
 public:
  // `host`: the host that this side connected to; empty: the peer connected. `opening_timeout_ns`: for each lane's TLS
  // handshake.
  Link(uint64_t id, std::string host, Channel channel, SessionLimits limits, std::shared_ptr<Incoming> incoming,
       int64_t idle_timeout_ns, int64_t opening_timeout_ns);

  uint64_t id() const { return id_; }
  const std::string& host() const { return host_; }
  Session& session() { return session_; }
  Shaper& shaper() { return shaper_; }

  size_t lanes() const { return lanes_.size(); }
  Lane& lane(size_t index) { return *lanes_[index]; }
  // Adds a connection; the caller respects kMaxLanes. No other thread may call `stats` meanwhile.
  Lane& add_lane(Channel channel);
  uint64_t bytes_moved() const;  // of frames, in and out
  LinkStats stats() const;  // any thread
  void record(Ring* ring);  // from now on records every stage of each chunk; null: stops

  // Each returns false when the link is over; `reason` then says why. Throw ProtocolError and std::bad_alloc.
  bool read(Lane& lane, int64_t now_ns);
  bool write(int64_t now_ns);  // checks deadlines and keep-alive, then writes the frames that may leave
  bool fail(std::string reason);  // returns false; the first reason stays

  // Lanes that the peer refused and whose connections are still open; the transport closes these.
  std::vector<Lane*> refused_lanes();

  // Back-pressure while the program is behind with this link's events: reads nothing and ignores the peer's silence.
  void pause_reads(bool paused) { reads_paused_ = paused; }

  // This side did not read for `ns`, by its own fault: does not count that time as silence or as handshake time.
  void forgive(int64_t ns, int64_t now_ns) {
    for (auto& lane : lanes_) lane->forgive(ns, now_ns);
  }

  // What the loop should watch for.
  Interest interest(const Lane& lane) const {
    return {.reads = !lane.ended() && (closing_ || !reads_paused_), .writes = lane.wants_socket()};
  }

  // The lane has bytes to read that its socket does not report.
  bool unread(const Lane& lane) const { return lane.channel().unread() && interest(lane).reads; }

  // When `write` should be called next, whatever the sockets do.
  int64_t wake_at() const;
  bool reads_paused() const { return reads_paused_; }

  // Sends what is queued, then closes, by `deadline_ns` at the latest.
  void close_after_flush(int64_t deadline_ns, std::string reason);
  const std::string& reason() const { return reason_; }
  bool permanent() const { return permanent_; }  // see TlsStream::permanent

  // Another link has taken over this link's only connection; this link is over.
  void become_lane(std::string reason) {
    became_lane_ = true;
    fail(std::move(reason));
  }
  bool became_lane() const { return became_lane_; }

 private:
  std::string overdue(const Lane& lane, int64_t now_ns) const;
  bool on_time(int64_t now_ns);
  bool fail_writing(std::string reason, int64_t now_ns);
  bool flush(int64_t now_ns);
  bool pull_frame(Lane& lane, int64_t now_ns);
  bool is_full(const Lane& lane) const;
  bool is_over(const Lane& lane) const;
  void shut_write(int64_t now_ns);
  bool all_lanes_ended() const;

  uint64_t id_;
  std::string host_;
  std::vector<std::unique_ptr<Lane>> lanes_;
  size_t first_lane_ = 0;  // the lane that begins the current turn, modulo the number of lanes
  Session session_;
  Shaper shaper_;
  int64_t idle_timeout_ns_;
  int64_t opening_timeout_ns_;
  int64_t ping_every_ns_;
  std::atomic<int64_t> round_trip_ns_{0};
  std::atomic<uint64_t> moved_bytes_{0};
  std::atomic<uint64_t> corrupt_chunks_{0};

  Recorder recorder_;
  bool line_was_busy_ = false;
  bool reads_paused_ = false;

  int64_t last_ping_ns_;
  int64_t last_measurement_ns_ = 0;  // when the round trip was last measured for the window
  int64_t stall_check_ns_ = 0;
  int64_t first_end_ns_ = 0;  // when the peer ended the first lane
  bool closing_ = false;
  bool write_shut_ = false;
  int64_t close_deadline_ns_ = 0;
  std::string reason_;
  bool permanent_ = false;
  bool became_lane_ = false;
};

}  // namespace parablock
