#include "session.h"

#include <cstring>
#include <utility>

#include "crc32c.h"
#include "socket.h"

namespace parablock {
namespace {

constexpr size_t kAckPayload = 8;

bool names_a_transfer(FrameType type) {
  return type != FrameType::kControl && type != FrameType::kPing && type != FrameType::kPong &&
         type != FrameType::kAttach;
}

FrameHeader ping_header(int64_t now_ns) {
  return {.type = FrameType::kPing, .key = {}, .offset = static_cast<uint64_t>(now_ns)};
}

}  // namespace

OutFrame attach_frame(std::string key) {
  OutFrame frame;
  frame.header = write_header({.type = FrameType::kAttach,
                               .key = {},
                               .length = static_cast<uint32_t>(key.size()),
                               .payload_crc = crc32c(key.data(), key.size())});
  frame.inline_payload = std::move(key);
  return frame;
}

Session::Session(SessionLimits limits, std::shared_ptr<Incoming> incoming)
    : outbox_(limits),
      sender_(outbox_),
      receiver_(outbox_, incoming != nullptr ? std::move(incoming) : std::make_shared<Incoming>()) {}

void Session::record(Recorder recorder) {
  outbox_.recorder = recorder;
  for (FrameReader& reader : readers_) reader.time_payloads(static_cast<bool>(recorder));
}

// ---- Out

void Session::send_control(std::string message) {
  outbox_.control({.type = FrameType::kControl, .key = {}}, std::move(message));
}

// While the pong of a measuring ping is outstanding, further pings only show that the link is alive. If each ping
// started a new measurement, a round trip longer than the ping interval would never be measured.
void Session::ping(int64_t now_ns) {
  if (ping_ns_ == 0) ping_ns_ = now_ns;
  outbox_.control(ping_header(now_ns), {});
  ping_due_.fill(true);
}

void Session::send(const TransferKey& key, std::shared_ptr<Source> source) { sender_.post(key, std::move(source)); }

void Session::receive(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start,
                      std::shared_ptr<Listener> listener) {
  receiver_.post(key, std::move(buffer), layout, start, std::move(listener));
}

void Session::cancel_send(const TransferKey& key) { sender_.withdraw(key); }

void Session::cancel_receive(const TransferKey& key) {
  if (!receiver_.expects(key)) return;
  drop_data_of(key);  // first, because queueing the message to the peer may throw
  receiver_.cancel(key);
}

void Session::drop_data_of(const TransferKey& key) {
  for (FrameReader& reader : readers_) reader.drop_data_of(key);
}

std::optional<OutFrame> Session::next_frame(int64_t now_ns, size_t lane) {
  if (lane == 0) {
    if (std::optional<OutFrame> control = outbox_.next_control()) return control;
  } else if (std::exchange(ping_due_[lane], false)) {
    return outbox_.bare(ping_header(ping_ns_));
  }
  return sender_.next_chunk(now_ns);
}

void Session::report_stalled(int64_t now_ns) {
  sender_.report_stalled(round_trip_ns_, now_ns);
  receiver_.report_stalled(round_trip_ns_, now_ns);
}

std::optional<std::string> Session::take_attach_key() { return std::exchange(attach_key_, std::nullopt); }

// ---- In

void Session::arrived(size_t bytes, int64_t now_ns, size_t lane) {
  FrameReader& reader = readers_[lane];
  while (bytes > 0) {
    size_t before = bytes;
    bool of_a_chunk = reader.reads_data_of(reader.header().key);
    bool whole = reader.take(bytes);
    if (of_a_chunk) receiver_.moved(reader.header().key, before - bytes, now_ns);
    if (!whole) continue;
    if (reader.at_header()) header_arrived(reader, lane, now_ns);
    if (reader.payload_whole()) {
      frame_arrived(reader, lane, now_ns);
      reader.next_frame();
    }
  }
}

void Session::header_arrived(FrameReader& reader, size_t lane, int64_t now_ns) {
  const FrameHeader& header = reader.header();
  bool first = !std::exchange(heard_, true);
  if (outbox_.run == 0) outbox_.run = header.run;
  // Frames carry run 0 until their sender knows the run; transfers begin only after both sides know it.
  if (header.run != outbox_.run && (header.run != 0 || names_a_transfer(header.type)))
    throw ProtocolError("a frame belongs to another run");
  if (header.type == FrameType::kData) {
    if (auto into = receiver_.place(header, now_ns)) {
      reader.place(std::move(*into));
    } else {
      reader.drop();
    }
    return;
  }
  if (lane > 0 && header.type != FrameType::kPing)
    throw ProtocolError("only chunks and pings may come on a lane other than the first");
  if (header.type == FrameType::kAttach && !first) throw ProtocolError("only a new connection can become a lane");
  size_t limit = 0;
  if (header.type == FrameType::kControl) limit = outbox_.limits.control_bytes;
  if (header.type == FrameType::kAck) limit = kAckPayload;
  if (header.type == FrameType::kAttach) limit = kLaneKeyBytes;
  if (header.length > limit)
    throw ProtocolError("a message of " + std::to_string(header.length) + " bytes where at most " +
                        std::to_string(limit) + " are allowed");
  reader.place_text();
}

void Session::note_chunk(const FrameReader& reader, size_t lane) const {
  const FrameHeader& header = reader.header();
  uint64_t chunk = receiver_.chunk_at(header);
  int64_t checked_ns = monotonic_ns();
  int64_t check_began_ns = checked_ns - reader.checking_ns();
  outbox_.recorder.note(Stage::kVerify, header.key, chunk, header.length, check_began_ns, checked_ns, lane);
  outbox_.recorder.note(Stage::kReceive, header.key, chunk, header.length, reader.began_ns(), monotonic_ns(), lane);
}

void Session::frame_arrived(FrameReader& reader, size_t lane, int64_t now_ns) {
  if (reader.dropped()) return;
  if (outbox_.recorder && reader.header().type == FrameType::kData) note_chunk(reader, lane);
  if (reader.header().type == FrameType::kData)
    return receiver_.chunk_arrived(reader.header(), reader.payload_crc(), now_ns);
  if (reader.payload_crc() != reader.header().payload_crc) throw ProtocolError("a message failed its checksum");
  message_arrived(reader, lane, now_ns);
}

void Session::message_arrived(FrameReader& reader, size_t lane, int64_t now_ns) {
  const FrameHeader& header = reader.header();
  switch (header.type) {
    case FrameType::kControl:
      outbox_.event(Event::Type::kControl, {}, now_ns).text = std::exchange(reader.text(), {});
      break;
    case FrameType::kAck: {
      if (reader.text().size() != kAckPayload) throw ProtocolError("an acknowledgement without its credit");
      uint64_t limit;
      std::memcpy(&limit, reader.text().data(), kAckPayload);
      sender_.acknowledged(header.key, header.offset, limit, now_ns);
      break;
    }
    case FrameType::kCancel: sender_.refused(header.key, now_ns); break;
    case FrameType::kResend: sender_.asked_again(header.key, header.offset); break;
    case FrameType::kWithdraw:
      if (receiver_.withdrawn(header.key, now_ns)) drop_data_of(header.key);
      break;
    case FrameType::kPing:
      if (lane > 0) break;  // on other lanes a ping only proves that the lane is alive
      outbox_.control({.type = FrameType::kPong, .key = {}, .offset = header.offset}, {});
      break;
    case FrameType::kPong:
      if (ping_ns_ == 0 || header.offset != static_cast<uint64_t>(ping_ns_)) break;
      round_trip_ns_ = now_ns - std::exchange(ping_ns_, 0);
      receiver_.measured_round_trip(round_trip_ns_);
      break;
    case FrameType::kAttach: attach_key_ = std::exchange(reader.text(), {}); break;
    case FrameType::kData: break;
  }
}

}  // namespace parablock
