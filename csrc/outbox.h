// What the two halves of a session share: the run, the limits, and their output, which is control frames to the peer,
// events to the owner and records to the timeline.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "frame.h"
#include "ring.h"
#include "transfer.h"

namespace parablock {

struct Event {
  enum class Type : uint8_t {
    kConnected,  // a peer's connection was accepted; `text`: its address
    kClosed,     // the link is gone, the last event of it; `text`: the reason
    kControl,    // `text`: the message
    kReceived,   // a posted transfer is complete in its buffer
    kSent,       // the peer acknowledged all of a transfer; its buffer may be reused
    kRefused,    // the peer does not want a transfer of this side; its buffer may be reused
    kWithdrawn,  // the peer gave up a transfer that was posted here; its buffer may be reused
    kStalled,  // a transfer has stood still for longer than its speed explains; `text`: direction and progress
  };
  Type type = Type::kControl;
  uint64_t link = 0;
  TransferKey key;
  std::string text;
  bool permanent = false;    // kClosed: a permanent error, do not retry; see TlsStream::permanent
  bool became_lane = false;  // kClosed: the connection goes on as a lane of another link
  int64_t at_ns = 0;  // CLOCK_MONOTONIC
  int64_t first_byte_ns = 0;  // kReceived, kSent: when the first byte came or left
  std::vector<std::pair<TransferKey, uint64_t>> unfinished = {};  // kClosed: posted receives, and where to resume them
};

// One outgoing frame. `source` keeps the payload segments alive while the socket may still read them.
struct OutFrame {
  HeaderBytes header;
  std::string inline_payload;
  std::array<Segment, 2> payload;
  std::shared_ptr<Source> source;
  TransferKey key;  // of a data frame's transfer
  uint32_t chunk = kWholeTransfer;  // of a data frame

  size_t bytes() const { return header.size() + inline_payload.size() + payload[0].bytes + payload[1].bytes; }
};

// The defaults are for a peer that has not proved its identity; Transport::trust raises them.
struct SessionLimits {
  size_t control_bytes = 4096;  // one incoming control message
  size_t queue_bytes = 64 << 10;  // control frames that wait for the peer to read, bookkeeping included
  uint64_t window_bytes = 256 << 20;  // the most bytes of one transfer that a sender may have under way
  size_t remembered_keys = 64;  // keys in each set of given-up keys, and credits for transfers not begun yet
};

class Outbox {
 public:
  explicit Outbox(SessionLimits given) : limits(given) {}

  // Queues a control frame. Throws ProtocolError when the peer leaves too many of them unread.
  void control(FrameHeader header, std::string payload);
  std::optional<OutFrame> next_control();
  bool has_control() const { return !control_.empty(); }
  OutFrame bare(FrameHeader header) const;  // a frame without payload, not queued

  // Queues an event and returns it, so that the caller can fill in further fields; valid until the next call.
  Event& event(Event::Type type, const TransferKey& key, int64_t now_ns);
  std::vector<Event> take_events();

  // Adds a key; beyond the limit, forgets another key.
  void remember(std::set<TransferKey>& keys, const TransferKey& key) const;

  SessionLimits limits;
  uint64_t run = 0;
  Recorder recorder;

 private:
  std::deque<OutFrame> control_;
  size_t queued_bytes_ = 0;
  std::vector<Event> events_;
};

std::string name(const TransferKey& key);  // for messages

// "12.3 s"
std::string seconds(int64_t ns);

}  // namespace parablock
