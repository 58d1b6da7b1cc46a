#include "session.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crc32c.h"

namespace parablock {
namespace {

constexpr size_t kAckPayload = 8;
constexpr size_t kDiscardBytes = 64 << 10;

std::string name(const TransferKey& key) {
  return "(kind " + std::to_string(key.kind) + ", round " + std::to_string(key.round) + ", block " +
         std::to_string(key.block) + ")";
}

}  // namespace

Session::Session(SessionLimits limits) : limits_(limits) {}

// ---- Out

void Session::push_control(FrameHeader header, std::string payload) {
  if (control_.size() >= limits_.remembered_keys) throw ProtocolError("the peer does not read what is sent to it");
  header.run = run_;
  header.length = static_cast<uint32_t>(payload.size());
  header.payload_crc = crc32c(payload.data(), payload.size());
  OutFrame frame;
  frame.header = write_header(header);
  frame.inline_payload = std::move(payload);
  control_.push_back(std::move(frame));
}

void Session::send_control(std::string message) {
  push_control({.type = FrameType::kControl, .key = {}}, std::move(message));
}

void Session::ping(int64_t now_ns) {
  ping_ns_ = now_ns;
  push_control({.type = FrameType::kPing, .key = {}, .offset = static_cast<uint64_t>(now_ns)}, {});
}

void Session::send(const TransferKey& key, std::shared_ptr<Source> source) {
  if (std::any_of(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& out) { return out.key == key; }))
    throw std::invalid_argument("transfer " + name(key) + " is already being sent on this link");
  if (refused_.erase(key) > 0) {
    events_.push_back(event(Event::Type::kRefused, key, 0));
    return;
  }
  Outgoing out{.key = key, .source = std::move(source)};
  if (auto credit = early_credit_.find(key); credit != early_credit_.end()) {
    grant(out, 0, credit->second);
    early_credit_.erase(credit);
  }
  outgoing_.push_back(std::move(out));
}

std::optional<OutFrame> Session::next_frame(int64_t now_ns) {
  if (!control_.empty()) {
    OutFrame frame = std::move(control_.front());
    control_.pop_front();
    return frame;
  }
  for (Outgoing& out : outgoing_) {
    const Layout& layout = out.source->layout();
    if (out.next_chunk >= out.source->ready_chunks()) continue;  // all sent, or not encoded yet
    uint64_t offset = layout.offset(out.next_chunk);
    uint32_t length = layout.chunk_bytes(out.next_chunk);
    if (offset + length > out.limit) continue;
    OutFrame frame;
    frame.header = write_header({.type = FrameType::kData,
                                 .key = out.key,
                                 .run = run_,
                                 .offset = offset,
                                 .length = length,
                                 .payload_crc = out.source->chunk_crc(out.next_chunk)});
    frame.payload = layout.segments(out.source->body(), out.next_chunk);
    frame.source = out.source;
    if (out.next_chunk == 0) out.first_byte_ns = now_ns;
    ++out.next_chunk;
    return frame;
  }
  return std::nullopt;
}

// ---- Posting and cancelling receives

void Session::receive(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout) {
  layout.check(buffer->size());
  if (cancelled_.contains(key))
    throw std::invalid_argument("transfer " + name(key) + " was cancelled on this link and cannot be posted again");
  auto [at, is_new] = sinks_.try_emplace(key);
  if (!is_new) throw std::invalid_argument("transfer " + name(key) + " is already posted on this link");
  at->second.buffer = std::move(buffer);
  at->second.layout = layout;
  largest_chunk_ = std::max<uint64_t>(largest_chunk_, layout.chunk_bytes(0));
  acknowledge(key, at->second);
}

// A window that no whole chunk fits into would stop the sender for ever, so a grant covers at least the next chunk.
void Session::acknowledge(const TransferKey& key, Sink& sink) {
  uint64_t window = std::max<uint64_t>(limits_.window_bytes, 2 * uint64_t{sink.layout.chunk_bytes(0)});
  uint64_t limit = std::min(sink.layout.bytes(), sink.received + window);
  std::string payload(kAckPayload, '\0');
  std::memcpy(payload.data(), &limit, kAckPayload);
  push_control({.type = FrameType::kAck, .key = key, .offset = sink.received}, std::move(payload));
  sink.acknowledged = sink.received;
}

void Session::remember(std::set<TransferKey>& keys, const TransferKey& key) {
  keys.insert(key);
  // Keys grow with the round, so the smallest is the one least likely to be asked for again.
  if (keys.size() > limits_.remembered_keys) keys.erase(keys.begin());
}

void Session::cancel_receive(const TransferKey& key) {
  auto sink = sinks_.find(key);
  if (sink == sinks_.end()) return;
  // What is left of a chunk that is half read goes nowhere: the buffer is not ours any more.
  if (in_payload_ && destination_ == Destination::kSink && header_.key == key) destination_ = Destination::kDiscard;
  remember(cancelled_, key);
  sinks_.erase(sink);
  push_control({.type = FrameType::kCancel, .key = key}, {});
}

// ---- In

const std::vector<Segment>& Session::want() {
  want_.clear();
  if (!in_payload_) {
    want_.push_back({header_bytes_.data() + header_filled_, kHeaderBytes - header_filled_});
  } else if (destination_ == Destination::kDiscard) {
    discard_.resize(kDiscardBytes);
    want_.push_back({discard_.data(), std::min(payload_left_.front().bytes, kDiscardBytes)});
  } else {
    want_ = payload_left_;
    // The header behind this payload in the same read: one system call a chunk.
    want_.push_back({header_bytes_.data(), kHeaderBytes});
  }
  return want_;
}

void Session::arrived(size_t bytes, int64_t now_ns) {
  while (bytes > 0) {
    if (!in_payload_) {
      size_t taken = std::min(bytes, kHeaderBytes - header_filled_);
      header_filled_ += taken;
      bytes -= taken;
      if (header_filled_ == kHeaderBytes) header_arrived(now_ns);
      continue;
    }
    Segment& part = payload_left_.front();
    size_t taken = std::min(bytes, part.bytes);
    if (destination_ == Destination::kSink) chunk_crc_ = crc32c(part.data, taken, chunk_crc_);  // while it is in cache
    if (destination_ != Destination::kDiscard) part.data += taken;
    part.bytes -= taken;
    bytes -= taken;
    if (part.bytes == 0) payload_left_.erase(payload_left_.begin());
    if (payload_left_.empty()) payload_arrived(now_ns);
  }
}

void Session::header_arrived(int64_t now_ns) {
  header_ = read_header(header_bytes_);
  header_filled_ = 0;
  if (run_ == 0) run_ = header_.run;
  // Before a side knows the run its frames say 0; transfers begin only after both know it.
  bool of_a_transfer =
      header_.type == FrameType::kData || header_.type == FrameType::kAck || header_.type == FrameType::kCancel;
  if (header_.run != run_ && (header_.run != 0 || of_a_transfer)) throw ProtocolError("a frame belongs to another run");
  payload_left_.clear();
  destination_ = Destination::kText;
  size_t limit = 0;
  switch (header_.type) {
    case FrameType::kData: data_header(now_ns); break;
    case FrameType::kControl: limit = limits_.control_bytes; break;
    case FrameType::kAck: limit = kAckPayload; break;
    default: break;
  }
  if (header_.type != FrameType::kData) {
    if (header_.length > limit)
      throw ProtocolError("a message of " + std::to_string(header_.length) + " bytes where at most " +
                          std::to_string(limit) + " are allowed");
    text_.resize(header_.length);
    if (header_.length > 0) payload_left_.push_back({reinterpret_cast<uint8_t*>(text_.data()), text_.size()});
  }
  in_payload_ = true;
  if (payload_left_.empty()) payload_arrived(now_ns);
}

void Session::data_header(int64_t now_ns) {
  auto found = sinks_.find(header_.key);
  if (found == sinks_.end()) {
    if (!cancelled_.contains(header_.key) || header_.length > largest_chunk_ || header_.length == 0)
      throw ProtocolError("data for transfer " + name(header_.key) + ", which nobody here asked for");
    destination_ = Destination::kDiscard;
    payload_left_.push_back({nullptr, header_.length});
    return;
  }
  Sink& sink = found->second;
  uint64_t chunk = sink.received / sink.layout.chunk_bytes(0);
  if (header_.offset != sink.received || header_.length != sink.layout.chunk_bytes(chunk))
    throw ProtocolError("transfer " + name(header_.key) + ": expected " +
                        std::to_string(sink.layout.chunk_bytes(chunk)) + " bytes at " +
                        std::to_string(sink.received) + ", got " + std::to_string(header_.length) +
                        " at " + std::to_string(header_.offset));
  if (sink.received == 0) sink.first_byte_ns = now_ns;
  destination_ = Destination::kSink;
  chunk_crc_ = 0;
  for (const Segment& part : sink.layout.segments(sink.buffer->data(), chunk))
    if (part.bytes > 0) payload_left_.push_back(part);
}

void Session::payload_arrived(int64_t now_ns) {
  in_payload_ = false;
  if (destination_ == Destination::kDiscard) return;
  if (destination_ == Destination::kSink) return data_arrived(now_ns);
  if (crc32c(text_.data(), text_.size()) != header_.payload_crc) throw ProtocolError("a message failed its checksum");
  switch (header_.type) {
    case FrameType::kControl: {
      Event control = event(Event::Type::kControl, {}, now_ns);
      control.text = std::move(text_);
      text_.clear();
      events_.push_back(std::move(control));
      break;
    }
    case FrameType::kAck: acknowledged(now_ns); break;
    case FrameType::kCancel: cancelled(now_ns); break;
    case FrameType::kPing: push_control({.type = FrameType::kPong, .key = {}, .offset = header_.offset}, {}); break;
    case FrameType::kPong:
      if (header_.offset == static_cast<uint64_t>(ping_ns_)) round_trip_ns_ = now_ns - ping_ns_;
      break;
    case FrameType::kData: break;
  }
}

void Session::data_arrived(int64_t now_ns) {
  auto found = sinks_.find(header_.key);
  Sink& sink = found->second;
  if (chunk_crc_ != header_.payload_crc)
    throw ProtocolError("a chunk of transfer " + name(header_.key) + " failed its checksum");
  sink.received += header_.length;
  bool complete = sink.received == sink.layout.bytes();
  if (complete || sink.received - sink.acknowledged >= limits_.window_bytes / 4) acknowledge(header_.key, sink);
  if (!complete) return;
  Event received = event(Event::Type::kReceived, header_.key, now_ns);
  received.first_byte_ns = sink.first_byte_ns;
  events_.push_back(std::move(received));
  sinks_.erase(found);
}

void Session::acknowledged(int64_t now_ns) {
  if (text_.size() != kAckPayload) throw ProtocolError("an acknowledgement without its credit");
  uint64_t limit;
  std::memcpy(&limit, text_.data(), kAckPayload);
  auto out = std::find_if(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& o) { return o.key == header_.key; });
  if (out == outgoing_.end()) {
    if (header_.offset > 0) throw ProtocolError("the peer acknowledges bytes that were never sent");
    early_credit_[header_.key] = limit;
    if (early_credit_.size() > limits_.remembered_keys)
      throw ProtocolError("the peer asks for too many transfers at once");
    return;
  }
  grant(*out, header_.offset, limit);
  if (header_.offset < out->source->layout().bytes()) return;
  Event done = event(Event::Type::kSent, header_.key, now_ns);
  done.first_byte_ns = out->first_byte_ns;
  events_.push_back(std::move(done));
  outgoing_.erase(out);
}

void Session::grant(Outgoing& out, uint64_t received, uint64_t limit) {
  const Layout& layout = out.source->layout();
  if (received > out.sent()) throw ProtocolError("the peer acknowledges bytes that were never sent");
  if (limit > layout.bytes())
    throw ProtocolError("transfer " + name(out.key) + " has " + std::to_string(layout.bytes()) +
                        " bytes here, but the peer has room for at least " + std::to_string(limit) +
                        ": the two sides cut the block differently");
  out.limit = std::max(out.limit, limit);
  // A receiver that has everything always grants a whole chunk more, so this one has smaller chunks or a smaller body.
  if (received == out.sent() && out.next_chunk < layout.chunks() &&
      received + layout.chunk_bytes(out.next_chunk) > out.limit)
    throw ProtocolError("transfer " + name(out.key) + ": the peer has no room for the next chunk of " +
                        std::to_string(layout.chunk_bytes(out.next_chunk)) +
                        " bytes: the two sides cut the block differently");
}

void Session::cancelled(int64_t now_ns) {
  auto out = std::find_if(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& o) { return o.key == header_.key; });
  if (out == outgoing_.end()) {
    early_credit_.erase(header_.key);
    remember(refused_, header_.key);
    return;
  }
  events_.push_back(event(Event::Type::kRefused, header_.key, now_ns));
  outgoing_.erase(out);
}

Event Session::event(Event::Type type, const TransferKey& key, int64_t now_ns) const {
  Event event;
  event.type = type;
  event.key = key;
  event.at_ns = now_ns;
  return event;
}

std::vector<Event> Session::take_events() {
  std::vector<Event> taken;
  taken.swap(events_);
  return taken;
}

}  // namespace parablock
