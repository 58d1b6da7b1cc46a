#include "link.h"

#include <algorithm>

namespace parablock {
namespace {

constexpr int kTurns = 16;                    // of writing, then the other links have their turn
constexpr size_t kBytesOnLine = 256 << 20;    // most bytes of frames that a lane holds with a shaper
constexpr int64_t kPingEveryNs = 5'000'000'000;
constexpr int64_t kMeasureEveryNs = 500'000'000;  // while data is expected: the window needs the round trip
constexpr int64_t kStallCheckNs = 500'000'000;
constexpr int64_t kLingerNs = 1'000'000'000;  // how long to wait for the peer's end after the last byte has left

}  // namespace

Link::Link(uint64_t id, std::string host, Channel channel, SessionLimits limits, std::shared_ptr<Incoming> incoming,
           int64_t idle_timeout_ns, int64_t opening_timeout_ns)
    : id_(id),
      host_(std::move(host)),
      session_(limits, std::move(incoming)),
      idle_timeout_ns_(idle_timeout_ns),
      opening_timeout_ns_(opening_timeout_ns),
      ping_every_ns_(std::min(kPingEveryNs, idle_timeout_ns / 3)),  // so that a peer with the same timeout hears enough
      last_ping_ns_(monotonic_ns()) {
  add_lane(std::move(channel));
}

Lane& Link::add_lane(Channel channel) {
  set_user_timeout(channel.fd(), idle_timeout_ns_);
  lanes_.push_back(std::make_unique<Lane>(std::move(channel), lanes_.size()));
  lanes_.back()->record(recorder_);
  return *lanes_.back();
}

void Link::record(Ring* ring) {
  recorder_ = {.ring = ring, .peer = static_cast<uint32_t>(id_)};
  session_.record(recorder_);
  for (auto& lane : lanes_) lane->record(recorder_);
}

bool Link::fail(std::string reason) {
  if (reason_.empty()) reason_ = std::move(reason);
  return false;
}

LinkStats Link::stats() const {
  LinkStats stats;
  stats.round_trip_ns = round_trip_ns_.load(std::memory_order_relaxed);
  stats.moved_bytes = moved_bytes_.load(std::memory_order_relaxed);
  stats.corrupt_chunks = corrupt_chunks_.load(std::memory_order_relaxed);
  for (const auto& lane : lanes_) {
    if (lane->fd() < 0) continue;  // it was refused, or has become a lane of another link
    stats.lanes.push_back(lane->stats());
    stats.bytes_in += stats.lanes.back().bytes_in;
    stats.bytes_out += stats.lanes.back().bytes_out;
  }
  return stats;
}

uint64_t Link::bytes_moved() const {
  uint64_t bytes = 0;
  for (const auto& lane : lanes_) bytes += lane->bytes_in() + lane->bytes_out();
  return bytes;
}

// ---- In

std::vector<Lane*> Link::refused_lanes() {
  std::vector<Lane*> refused;
  for (auto& lane : lanes_)
    if (lane->dropped() && lane->fd() >= 0) refused.push_back(lane.get());
  return refused;
}

bool Link::all_lanes_ended() const {
  return std::all_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->ended(); });
}

bool Link::read(Lane& lane, int64_t now_ns) {
  if (closing_) {
    lane.read_and_forget();
    return !all_lanes_ended() || fail("closed");
  }
  uint64_t before = lane.bytes_in();
  try {
    Lane::End end = lane.read(session_, now_ns);
    if (lane.unanswered() && (end || lane.ended())) lane.drop();
    if (lane.dropped()) return true;
    if (end) return fail(*end);
  } catch (const VersionError& error) {
    // The ping's header carries this side's version: the only thing that such a peer can read.
    session_.ping(now_ns);
    permanent_ = true;
    close_after_flush(now_ns + kLingerNs, error.what());
    return true;
  } catch (const ChannelError& error) {
    if (lane.unanswered()) {
      lane.drop();
      return true;
    }
    permanent_ = error.permanent;
    close_after_flush(now_ns + kLingerNs, error.what());  // lets the TLS alert leave, which tells the peer why
    return true;
  }
  if (lane.bytes_in() != before) lane.heard(now_ns);
  round_trip_ns_.store(session_.round_trip_ns(), std::memory_order_relaxed);
  moved_bytes_.store(session_.moved_bytes(), std::memory_order_relaxed);
  corrupt_chunks_.store(session_.corrupt_chunks(), std::memory_order_relaxed);
  if (!lane.ended()) return true;
  // The other lanes may still hold bytes that the peer sent earlier.
  if (first_end_ns_ == 0) first_end_ns_ = now_ns;
  return !all_lanes_ended() || fail("the peer closed the connection");
}

// ---- Out

bool Link::is_full(const Lane& lane) const { return lane.full(shaper_.active() ? kBytesOnLine : lane.batch_bytes()); }

// Nothing is written to a lane any more that the peer refused or has ended. A write could fail, which would end the
// link before the program has taken what the other lanes still hold.
bool Link::is_over(const Lane& lane) const { return lane.dropped() || (lane.ended() && !closing_); }

// Puts the next frame on a lane; false when there is no frame or no room.
bool Link::pull_frame(Lane& lane, int64_t now_ns) {
  if (lane.index() > 0 && (lane.opening() || lane.unanswered())) return false;  // lane 0 can take it
  if (lane.blocked() || is_full(lane)) return false;
  if (closing_ && !session_.control_waits(lane.index())) {  // closing abandons unfinished transfers
    if (lane.index() == 0 || is_over(*lanes_[0])) line_was_busy_ = false;
    return false;
  }
  if (shaper_.active() && shaper_.free_at() > now_ns) {
    line_was_busy_ = true;
    return false;
  }
  std::optional<OutFrame> frame = session_.next_frame(now_ns, lane.index());
  if (!frame) {
    if (lane.index() == 0 || is_over(*lanes_[0])) line_was_busy_ = false;  // nothing else waits for the shaper
    return false;
  }
  Passage passage;  // at once
  if (shaper_.active()) passage = shaper_.transmit(frame->bytes(), now_ns, line_was_busy_);
  lane.put(std::move(*frame), passage);
  return true;
}

// The peer is gone, but bytes that it sent before may still be in the sockets: reads them, so that they need not travel
// again when the peer reconnects.
bool Link::fail_writing(std::string reason, int64_t now_ns) {
  if (closing_) return fail(std::move(reason));  // incoming bytes are discarded anyway
  for (auto& lane : lanes_) {
    for (int turn = 0; turn < kTurns && !reads_paused_ && !lane->ended(); ++turn) {
      uint64_t before = lane->bytes_in();
      try {
        if (lane->read(session_, now_ns) || lane->bytes_in() == before) break;
      } catch (const ChannelError&) {
        break;
      }
    }
  }
  return fail(std::move(reason));
}

// The lanes take turns, and each takes as many frames as it has room for. Each turn begins with the next lane.
bool Link::flush(int64_t now_ns) {
  for (auto& lane : lanes_) lane->set_blocked(false);
  bool moved = true;
  for (int turn = 0; moved; ++turn) {
    moved = false;
    ++first_lane_;
    // With a shaper all lanes share one queue, and a message must not wait behind the other lanes' chunks.
    for (auto& lane : lanes_)
      while (shaper_.active() && !is_over(*lane) && session_.control_waits(lane->index()) && pull_frame(*lane, now_ns))
        moved = true;
    for (size_t i = 0; i < lanes_.size(); ++i) {
      Lane* lane = lanes_[(first_lane_ + i) % lanes_.size()].get();
      if (lane->blocked() || is_over(*lane)) continue;
      Lane::End end = lane->write(now_ns);
      if (end && lane->unanswered()) {
        lane->drop();
        continue;
      }
      if (end) return fail_writing(*end, now_ns);
      if (turn == kTurns) lane->set_blocked(true);
      if (lane->blocked()) line_was_busy_ = false;  // frames wait for the socket, not for the shaper
      while (pull_frame(*lane, now_ns)) moved = true;
    }
  }
  return true;
}

bool Link::write(int64_t now_ns) {
  if (!on_time(now_ns)) return false;
  if (write_shut_) return true;
  if (!flush(now_ns)) return false;
  // A message may still wait in the session while a TLS handshake holds up the lane.
  bool empty = !session_.control_waits(0) &&
               std::all_of(lanes_.begin(), lanes_.end(), [](const auto& lane) { return lane->empty(); });
  if (closing_ && empty) shut_write(now_ns);
  return true;
}

// Half-closes and waits for the peer's end: closing with unread input would reset the connection and could destroy the
// bytes just written.
void Link::shut_write(int64_t now_ns) {
  for (auto& lane : lanes_) {
    if (lane->dropped() || lane->channel().shut_write()) continue;
    lane->set_blocked(true);
    return;
  }
  write_shut_ = true;
  close_deadline_ns_ = std::min(close_deadline_ns_, now_ns + kLingerNs);
}

// Why this lane has timed out; empty: it has not.
std::string Link::overdue(const Lane& lane, int64_t now_ns) const {
  if (lane.opening() && now_ns - lane.since_ns() >= opening_timeout_ns_)
    return "the TLS handshake was not over after " + seconds(opening_timeout_ns_);
  if (now_ns - lane.heard_ns() > idle_timeout_ns_)
    return "nothing was heard from the peer for " + seconds(idle_timeout_ns_) +
           (lane.index() > 0 ? " on one of the link's lanes" : "");
  return "";
}

bool Link::on_time(int64_t now_ns) {
  if (closing_ && now_ns >= close_deadline_ns_) return fail("closed");
  if (closing_) return true;
  for (auto& lane : lanes_) {
    if (lane->dropped()) continue;
    if (reads_paused_) lane->heard(now_ns);
    std::string why = overdue(*lane, now_ns);
    if (why.empty()) continue;
    if (!lane->unanswered()) return fail(std::move(why));
    lane->drop();  // the connection may still wait in the backlog of a server that has no room
  }
  // Do not let the linger time run while reads are paused: the other lanes cannot deliver what they still hold.
  if (first_end_ns_ != 0 && reads_paused_) first_end_ns_ = now_ns;
  if (first_end_ns_ != 0 && now_ns - first_end_ns_ >= kLingerNs) return fail("the peer closed one of the link's lanes");
  bool measure =
      session_.expects_data() && !session_.ping_under_way() && now_ns - last_measurement_ns_ >= kMeasureEveryNs;
  if (measure) last_measurement_ns_ = now_ns;
  if (measure || now_ns - last_ping_ns_ >= ping_every_ns_) {
    last_ping_ns_ = now_ns;
    session_.ping(now_ns);
  }
  if (now_ns >= stall_check_ns_) {
    stall_check_ns_ = now_ns + kStallCheckNs;
    session_.report_stalled(now_ns);
  }
  return true;
}

int64_t Link::wake_at() const {
  int64_t at = last_ping_ns_ + ping_every_ns_;
  for (const auto& lane : lanes_)
    if (!lane->dropped()) at = std::min(at, lane->heard_ns() + idle_timeout_ns_ + 1);
  if (first_end_ns_ != 0) at = std::min(at, first_end_ns_ + kLingerNs);
  if (closing_) at = close_deadline_ns_;
  for (const auto& lane : lanes_) {
    if (unread(*lane)) return 0;
    if (!closing_ && !lane->dropped() && lane->opening()) at = std::min(at, lane->since_ns() + opening_timeout_ns_);
  }
  if (write_shut_) return at;
  bool blocked = false;
  bool full = true;
  for (const auto& lane : lanes_) {
    blocked = blocked || lane->blocked();
    full = full && is_full(*lane);
    if (!lane->blocked() && !lane->empty() && !is_over(*lane)) at = std::min(at, lane->next_ready_ns());
  }
  if (line_was_busy_ && shaper_.active() && !blocked && !full) at = std::min(at, shaper_.free_at());
  return at;
}

void Link::close_after_flush(int64_t deadline_ns, std::string reason) {
  if (closing_) return;
  closing_ = true;
  close_deadline_ns_ = deadline_ns;
  reason_ = std::move(reason);
}

}  // namespace parablock
