// What the two halves of a session share: the run, the limits, and what they have to say: control frames to the peer,
// events to the owner and records to whoever watches.
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
    kRefused,    // the peer does not want a transfer of ours; its buffer may be reused
    kWithdrawn,  // the peer gave up a transfer that was posted here; its buffer may be reused
    kStalled,  // a transfer that had begun stands still, longer than its speed explains; `text`: which way, how far
  };
  Type type = Type::kControl;
  uint64_t link = 0;
  TransferKey key;
  std::string text;
  bool permanent = false;    // kClosed: do not retry; see TlsStream::permanent
  bool became_lane = false;  // kClosed: the connection goes on as a lane of another link
  int64_t at_ns = 0;  // CLOCK_MONOTONIC
  int64_t first_byte_ns = 0;  // kReceived, kSent: when the first byte came or left
  std::vector<std::pair<TransferKey, uint64_t>> unfinished = {};  // kClosed: posted receives, and where to resume them
};

// One frame on its way out. `source` keeps the payload segments alive while the socket may still read them.
struct OutFrame {
  HeaderBytes header;
  std::string inline_payload;
  std::array<Segment, 2> payload;
  std::shared_ptr<Source> source;
  TransferKey key;  // of a chunk, as the next
  uint32_t chunk = kWholeTransfer;

  size_t bytes() const { return header.size() + inline_payload.size() + payload[0].bytes + payload[1].bytes; }
};

// Of a peer that has not proved who it is; what a trusted one may have besides, the transport knows.
struct SessionLimits {
  size_t control_bytes = 4096;  // one incoming control message
  size_t queue_bytes = 64 << 10;  // control frames that the peer has not read yet, bookkeeping included
  uint64_t window_bytes = 256 << 20;  // the most that a sender may have under way of one transfer
  size_t remembered_keys = 64;  // credits for transfers not begun yet, and keys that were given up
};

class Outbox {
 public:
  explicit Outbox(SessionLimits given) : limits(given) {}

  // Throws ProtocolError when the peer leaves too much of it unread.
  void control(FrameHeader header, std::string payload);
  std::optional<OutFrame> next_control();
  bool has_control() const { return !control_.empty(); }
  OutFrame bare(FrameHeader header) const;  // a frame without payload that waits in no queue

  // Returns the event for what else there is to say in it; valid until the next.
  Event& event(Event::Type type, const TransferKey& key, int64_t now_ns);
  std::vector<Event> take_events();

  // Adds a key and forgets another beyond the limit.
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
