// The protocol of one link as a state machine without I/O: says where incoming bytes belong and which frame leaves
// next. Has no socket, no thread, and no clock except for its records; the caller serialises all calls.
//
// Transfers are receiver-driven. Posting a Buffer for a key grants the sender credit; data that this side did not ask
// for ends the link. So every payload byte has a buffer, of a size that this side chose, before it is read.
//
// A link has 1 to kMaxLanes byte streams. Lane 0 carries everything but chunks; chunks take any free lane. A ping
// leaves on every lane, so that a dead lane shows by its silence; only the ping on lane 0 is answered.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "frame.h"
#include "outbox.h"
#include "reader.h"
#include "receiver.h"
#include "sender.h"
#include "transfer.h"

namespace parablock {

constexpr size_t kMaxLanes = 4;

class Session {
 public:
  // `incoming`: shared by all sessions of a transport; null: this session is the only one.
  explicit Session(SessionLimits limits = {}, std::shared_ptr<Incoming> incoming = nullptr);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void set_limits(SessionLimits limits) { outbox_.limits = limits; }
  void set_run(uint64_t run) { outbox_.run = run; }  // frames of another run end the link; 0 adopts the peer's
  // From now on records every stage of each chunk; reads the clock itself.
  void record(Recorder recorder);
  void note_end() const { sender_.note_end(); }

  void send_control(std::string message);
  // `send` and `receive` throw std::invalid_argument if the key is already posted, or was given up and may still be
  // under way.
  void send(const TransferKey& key, std::shared_ptr<Source> source);
  // `start`: the bytes that the buffer already has from another link that broke; the first acknowledgement makes the
  // sender begin there. `listener` may be null.
  void receive(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start = 0,
               std::shared_ptr<Listener> listener = nullptr);
  // No-ops when the transfer is over or was never posted. Afterwards the session does not touch the buffer; frames that
  // next_frame has returned still refer to it.
  void cancel_send(const TransferKey& key);
  void cancel_receive(const TransferKey& key);
  void refuse_receive(const TransferKey& key) { receiver_.refuse(key); }
  void ping(int64_t now_ns);
  void owe_ping(size_t lane) { ping_due_[lane] = true; }  // for a new lane: the peer uses it after the first ping
  void report_stalled(int64_t now_ns);

  // Where a lane's next bytes go, in order. Never empty; valid until the next call of any function.
  const std::vector<Segment>& want(size_t lane = 0) { return readers_[lane].want(); }
  // The first `bytes` of what `want` returned are filled. Throws ProtocolError.
  void arrived(size_t bytes, int64_t now_ns, size_t lane = 0);

  // The next frame for a lane, if any: control first, then transfers in the order they were posted.
  std::optional<OutFrame> next_frame(int64_t now_ns, size_t lane = 0);

  // Whether the lane's next frame is a control frame or a ping, not a chunk.
  bool control_waits(size_t lane) const { return lane == 0 ? outbox_.has_control() : ping_due_[lane]; }

  // Posted receives and their contiguous bytes.
  std::vector<std::pair<TransferKey, uint64_t>> unfinished() const { return receiver_.unfinished(); }

  std::vector<Event> take_events() { return outbox_.take_events(); }

  // The key with which the peer asked to make this connection a lane of another link; returned once.
  std::optional<std::string> take_attach_key();
  bool asks_to_attach() const { return attach_key_.has_value(); }  // the caller must stop reading until it is taken

  bool expects_data() const { return receiver_.expects_data(); }
  bool sends_data() const { return sender_.has_transfers(); }  // there is data to send, or may be any moment
  bool ping_under_way() const { return ping_ns_ != 0; }
  int64_t round_trip_ns() const { return round_trip_ns_; }  // last measured; 0 before the first measurement
  // Payload received here, and payload acknowledged by the peer.
  uint64_t moved_bytes() const { return receiver_.moved_bytes() + sender_.moved_bytes(); }
  uint64_t corrupt_chunks() const { return receiver_.corrupt_chunks(); }  // chunks that failed their checksum here

 private:
  void header_arrived(FrameReader& reader, size_t lane, int64_t now_ns);
  void frame_arrived(FrameReader& reader, size_t lane, int64_t now_ns);
  void note_chunk(const FrameReader& reader, size_t lane) const;
  void message_arrived(FrameReader& reader, size_t lane, int64_t now_ns);
  void drop_data_of(const TransferKey& key);

  Outbox outbox_;
  Sender sender_;
  Receiver receiver_;
  std::array<FrameReader, kMaxLanes> readers_;
  bool heard_ = false;  // a whole header has come
  std::optional<std::string> attach_key_;
  std::array<bool, kMaxLanes> ping_due_{};  // lanes other than lane 0 that still have to send a ping
  int64_t ping_ns_ = 0;  // when the measuring ping was sent, until its pong comes; other pongs are ignored; 0: no ping
  int64_t round_trip_ns_ = 0;
};

// The frame with which a connection asks to become a lane.
OutFrame attach_frame(std::string key);

}  // namespace parablock
