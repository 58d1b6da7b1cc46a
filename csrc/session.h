// The protocol of one link as a state machine without I/O: it says where incoming bytes belong and which frame leaves
// next. No socket, no clock but that of its records, no thread of its own; the caller serialises all calls.
//
// Transfers are receiver-driven. A receiver posts a Buffer for a key; that grants the sender credit; data nobody asked
// for ends the link. So every payload byte has a home, of a size this side chose, before it is read.
//
// A link has 1 to kMaxLanes byte streams. Lane 0 carries everything but chunks; chunks take whichever lane is free. So
// that silence tells on every lane, a ping leaves on each; only that on lane 0 is answered.
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
  // `incoming`: shared with the other sessions of a transport; null: there are none.
  explicit Session(SessionLimits limits = {}, std::shared_ptr<Incoming> incoming = nullptr);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  void set_limits(SessionLimits limits) { outbox_.limits = limits; }
  void set_run(uint64_t run) { outbox_.run = run; }  // frames of another run end the link; 0 adopts the peer's
  // From now on notes what happens to each chunk, by a clock of its own.
  void record(Recorder recorder);
  void note_end() const { sender_.note_end(); }

  void send_control(std::string message);
  // Throw std::invalid_argument if the key is already posted, or was given up and may still be under way.
  void send(const TransferKey& key, std::shared_ptr<Source> source);
  // `start`: what the buffer has already, from another link that broke; the first acknowledgement tells the sender,
  // which begins there. `watermark` may be null.
  void receive(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start = 0,
               std::shared_ptr<Watermark> watermark = nullptr);
  // No-ops when it is over or was never posted. The buffer is not touched any more, but for frames already handed out.
  void cancel_send(const TransferKey& key);
  void cancel_receive(const TransferKey& key);
  void refuse_receive(const TransferKey& key) { receiver_.refuse(key); }
  void ping(int64_t now_ns);
  void owe_ping(size_t lane) { ping_due_[lane] = true; }  // a new one beside the first: the peer waits for it
  void report_stalled(int64_t now_ns);

  // Where a lane's next bytes go, in order. Never empty; valid until the next call of any kind.
  const std::vector<Segment>& want(size_t lane = 0) { return readers_[lane].want(); }
  // The first `bytes` of what `want` returned are filled. Throws ProtocolError.
  void arrived(size_t bytes, int64_t now_ns, size_t lane = 0);

  // The next frame to put on a lane, if there is one: control first, then transfers in the order they were posted.
  std::optional<OutFrame> next_frame(int64_t now_ns, size_t lane = 0);

  // Whether the lane's next frame is none of a transfer.
  bool control_waits(size_t lane) const { return lane == 0 ? outbox_.has_control() : ping_due_[lane]; }

  // Posted receives and their contiguous bytes.
  std::vector<std::pair<TransferKey, uint64_t>> unfinished() const { return receiver_.unfinished(); }

  std::vector<Event> take_events() { return outbox_.take_events(); }

  // The key with which the peer asked that this connection become a lane of another link; once.
  std::optional<std::string> take_attach_key();
  bool asks_to_attach() const { return attach_key_.has_value(); }  // and nothing more is to be read until it is taken

  bool expects_data() const { return receiver_.expects_data(); }
  bool sends_data() const { return sender_.has_transfers(); }  // which is there, or may be any moment
  bool ping_under_way() const { return ping_ns_ != 0; }
  int64_t round_trip_ns() const { return round_trip_ns_; }  // as measured last; 0 before
  // Payload that has come, and payload that the peer has said to have.
  uint64_t moved_bytes() const { return receiver_.moved_bytes() + sender_.moved_bytes(); }
  uint64_t corrupt_chunks() const { return receiver_.corrupt_chunks(); }  // that failed their checksum here

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
  bool heard_ = false;  // a whole header
  std::optional<std::string> attach_key_;
  std::array<bool, kMaxLanes> ping_due_{};  // on the lanes beside the first: a ping has yet to leave there
  int64_t ping_ns_ = 0;  // of the ping that measures, until its answer is here: no other is believed; 0: none
  int64_t round_trip_ns_ = 0;
};

// The frame with which a connection asks to become a lane.
OutFrame attach_frame(std::string key);

}  // namespace parablock
