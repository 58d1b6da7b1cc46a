// The protocol of one link as a state machine without I/O: it says where incoming bytes belong and which frame leaves
// next. No socket, no clock, no thread of its own; the caller serialises all calls.
//
// Transfers are receiver-driven. A receiver posts a Sink for a key; that grants the sender credit; data nobody posted a
// Sink for ends the link. So every payload byte has a home, of a size this side chose, before it is read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "frame.h"
#include "transfer.h"

namespace parablock {

struct Event {
  enum class Type : uint8_t {
    kConnected,  // a peer's connection was accepted; `text`: its address
    kClosed,     // the link is gone, the last event of it; `text`: the reason
    kControl,    // `text`: the message
    kReceived,   // a posted transfer is complete in its buffer
    kSent,       // the peer acknowledged all of a transfer; its buffer may be reused
    kRefused,    // the peer does not want a transfer of ours; its buffer may be reused
  };
  Type type = Type::kControl;
  uint64_t link = 0;
  TransferKey key;
  std::string text;
  int64_t at_ns = 0;        // CLOCK_MONOTONIC
  int64_t first_byte_ns = 0;  // kReceived, kSent: when the first byte came or left
};

// One frame on its way out. `source` keeps the payload segments alive while the socket may still read them.
struct OutFrame {
  HeaderBytes header;
  std::string inline_payload;
  std::array<Segment, 2> payload;
  std::shared_ptr<Source> source;

  size_t bytes() const { return header.size() + inline_payload.size() + payload[0].bytes + payload[1].bytes; }
};

struct SessionLimits {
  size_t control_bytes = 4096;     // one incoming control message; raised once the peer has proved who it is
  uint64_t window_bytes = 64 << 20;  // data a sender may have under way beyond what was acknowledged
  size_t remembered_keys = 4096;   // credits for transfers not begun yet, and refused transfers
};

class Session {
 public:
  explicit Session(SessionLimits limits = {});

  void set_limits(SessionLimits limits) { limits_ = limits; }
  void set_run(uint64_t run) { run_ = run; }  // frames of another run end the link; 0 adopts the peer's

  void send_control(std::string message);
  void send(const TransferKey& key, std::shared_ptr<Source> source);  // throws std::invalid_argument if already posted
  // Likewise; and for a key that was cancelled, whose chunks may still be under way.
  void receive(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout);
  void cancel_receive(const TransferKey& key);  // no-op when it is complete or was never posted
  void ping(int64_t now_ns);

  // Where the next bytes go, in order. Never empty; valid until the next call of any kind.
  const std::vector<Segment>& want();
  // The first `bytes` of what `want` returned are filled. Throws ProtocolError.
  void arrived(size_t bytes, int64_t now_ns);

  // The next frame to put on the wire, if there is one: control first, then transfers in the order they were posted.
  std::optional<OutFrame> next_frame(int64_t now_ns);

  std::vector<Event> take_events();

  int64_t round_trip_ns() const { return round_trip_ns_; }  // of the last ping answered; 0 before
  bool wants_to_send_control() const { return !control_.empty(); }

 private:
  struct Outgoing {
    TransferKey key;
    std::shared_ptr<Source> source;
    uint64_t next_chunk = 0;
    uint64_t limit = 0;  // bytes the receiver granted in all
    int64_t first_byte_ns = 0;

    uint64_t sent() const { return source->layout().offset_of_end(next_chunk); }
  };
  // Where the payload of the frame being read goes.
  enum class Destination : uint8_t { kText, kSink, kDiscard };

  void push_control(FrameHeader header, std::string payload);
  void header_arrived(int64_t now_ns);
  void payload_arrived(int64_t now_ns);
  void data_header(int64_t now_ns);
  void data_arrived(int64_t now_ns);
  void acknowledged(int64_t now_ns);
  void grant(Outgoing& out, uint64_t received, uint64_t limit);
  void cancelled(int64_t now_ns);
  void acknowledge(const TransferKey& key, Sink& sink);
  void remember(std::set<TransferKey>& keys, const TransferKey& key);
  Event event(Event::Type type, const TransferKey& key, int64_t now_ns) const;

  SessionLimits limits_;
  uint64_t run_ = 0;

  // Out
  std::deque<OutFrame> control_;
  std::deque<Outgoing> outgoing_;
  std::map<TransferKey, uint64_t> early_credit_;  // granted before `send`
  std::set<TransferKey> refused_;                 // refused before `send`

  // In
  std::map<TransferKey, Sink> sinks_;
  std::set<TransferKey> cancelled_;  // data still under way for these is read and dropped
  uint64_t largest_chunk_ = 0;
  HeaderBytes header_bytes_{};
  size_t header_filled_ = 0;
  FrameHeader header_;
  bool in_payload_ = false;
  Destination destination_ = Destination::kText;
  std::string text_;
  std::vector<Segment> payload_left_;
  uint32_t chunk_crc_ = 0;  // of what has arrived of the chunk
  std::vector<Segment> want_;
  std::vector<uint8_t> discard_;

  std::vector<Event> events_;
  int64_t ping_ns_ = 0;  // of the last ping sent: the only one whose answer is believed
  int64_t round_trip_ns_ = 0;
};

}  // namespace parablock
