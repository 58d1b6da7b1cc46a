#include "sender.h"

#include <algorithm>
#include <stdexcept>

#include "socket.h"

namespace parablock {
namespace {

constexpr uint32_t kMostResent = 64;  // chunks per transfer: more than any ParaBlock receiver requests

}  // namespace

std::deque<Sender::Outgoing>::iterator Sender::find(const TransferKey& key) {
  return std::find_if(outgoing_.begin(), outgoing_.end(), [&](const Outgoing& out) { return out.key == key; });
}

void Sender::post(const TransferKey& key, std::shared_ptr<Source> source) {
  if (find(key) != outgoing_.end())
    throw std::invalid_argument("transfer " + name(key) + " is already being sent on this link");
  if (withdrawn_.contains(key))
    throw std::invalid_argument("transfer " + name(key) + " was withdrawn on this link and cannot be sent again");
  if (refused_.erase(key) > 0) {
    outbox_.event(Event::Type::kRefused, key, 0);
    return;
  }
  Outgoing out;
  out.key = key;
  out.source = std::move(source);
  if (auto credit = early_credit_.find(key); credit != early_credit_.end()) {
    grant(out, credit->second);
    early_credit_.erase(credit);
  }
  outgoing_.push_back(std::move(out));
}

void Sender::withdraw(const TransferKey& key) {
  auto out = find(key);
  if (out == outgoing_.end()) return;
  note_arrived(*out, out->sent());
  outgoing_.erase(out);
  outbox_.remember(withdrawn_, key);
  outbox_.control({.type = FrameType::kWithdraw, .key = key}, {});
}

std::optional<uint64_t> Sender::next_chunk_of(Outgoing& out) const {
  if (!out.again.empty()) {
    uint64_t chunk = out.again.front();
    out.again.pop_front();
    return chunk;
  }
  if (out.next_chunk >= out.source->ready_chunks()) return std::nullopt;  // all sent, or not encoded yet
  if (out.source->layout().offset_of_end(out.next_chunk + 1) > out.limit) return std::nullopt;
  return out.next_chunk++;
}

std::optional<OutFrame> Sender::next_chunk(int64_t now_ns) {
  for (Outgoing& out : outgoing_) {
    std::optional<uint64_t> chunk = next_chunk_of(out);
    if (!chunk) continue;
    const Layout& layout = out.source->layout();
    OutFrame frame;
    frame.header = write_header({.type = FrameType::kData,
                                 .key = out.key,
                                 .run = outbox_.run,
                                 .offset = layout.offset(*chunk),
                                 .length = layout.chunk_bytes(*chunk),
                                 .payload_crc = checksum(out, *chunk)});
    frame.payload = layout.segments(out.source->body(), *chunk);
    frame.source = out.source;
    frame.key = out.key;
    frame.chunk = static_cast<uint32_t>(*chunk);
    if (out.first_byte_ns == 0) {
      out.first_byte_ns = now_ns;
      out.progress.moved(0, now_ns);
    }
    return frame;
  }
  return std::nullopt;
}

// ---- From the peer

void Sender::acknowledged(const TransferKey& key, uint64_t received, uint64_t limit, int64_t now_ns) {
  if (withdrawn_.contains(key)) return;
  auto out = find(key);
  if (out == outgoing_.end()) {
    early_credit_[key] = {received, limit};
    if (early_credit_.size() > outbox_.limits.remembered_keys)
      throw ProtocolError("the peer asks for too many transfers at once");
    return;
  }
  grant(*out, {received, limit});
  if (received > out->acknowledged) {
    note_arrived(*out, received);
    out->progress.moved(received - out->acknowledged, now_ns);
    moved_bytes_ += received - out->acknowledged;
    out->acknowledged = received;
  }
  if (received < out->source->layout().bytes()) return;
  outbox_.event(Event::Type::kSent, key, now_ns).first_byte_ns = out->first_byte_ns;
  outgoing_.erase(out);
}

void Sender::grant(Outgoing& out, Credit credit) {
  const Layout& layout = out.source->layout();
  auto [received, limit] = credit;
  // Before the first byte, `received` says where to begin: the receiver has the bytes before it from a link that broke.
  if (out.next_chunk == 0 && received > 0) {
    if (!layout.is_start(received))
      throw ProtocolError("transfer " + name(out.key) + " cannot begin at " + std::to_string(received) +
                          ": no chunk of this side begins there");
    out.next_chunk = received / layout.chunk_bytes(0);
    out.acknowledged = received;
  }
  if (received > out.sent()) throw ProtocolError("the peer acknowledges bytes that were never sent");
  if (limit > layout.bytes())
    throw ProtocolError("transfer " + name(out.key) + " has " + std::to_string(layout.bytes()) +
                        " bytes here, but the peer has room for at least " + std::to_string(limit) +
                        ": the two sides cut the block differently");
  out.limit = std::max(out.limit, limit);
  // A receiver that has all bytes sent so far always grants at least one more whole chunk. So this receiver has smaller
  // chunks or a smaller body.
  if (received == out.sent() && out.next_chunk < layout.chunks() &&
      received + layout.chunk_bytes(out.next_chunk) > out.limit)
    throw ProtocolError("transfer " + name(out.key) + ": the peer has no room for the next chunk of " +
                        std::to_string(layout.chunk_bytes(out.next_chunk)) +
                        " bytes: the two sides cut the block differently");
}

void Sender::refused(const TransferKey& key, int64_t now_ns) {
  if (withdrawn_.contains(key)) return;
  auto out = find(key);
  if (out == outgoing_.end()) {
    early_credit_.erase(key);
    outbox_.remember(refused_, key);
    return;
  }
  outbox_.event(Event::Type::kRefused, key, now_ns);
  note_arrived(*out, out->sent());
  outgoing_.erase(out);
}

void Sender::asked_again(const TransferKey& key, uint64_t offset) {
  if (withdrawn_.contains(key)) return;
  auto out = find(key);
  if (out == outgoing_.end())
    throw ProtocolError("the peer asks again for a chunk of transfer " + name(key) + ", which is not being sent");
  const Layout& layout = out->source->layout();
  uint64_t chunk = offset / layout.chunk_bytes(0);
  if (offset != layout.offset(chunk) || chunk >= out->next_chunk || offset < out->acknowledged)
    throw ProtocolError("transfer " + name(key) + ": the peer asks again for a chunk at " + std::to_string(offset) +
                        ", but no chunk at that offset is under way");
  if (++out->resent > kMostResent)
    throw ProtocolError("transfer " + name(key) + ": the peer asked again for a chunk " + std::to_string(out->resent) +
                        " times: the network or a machine's memory damages data");
  out->again.push_back(chunk);
}

// Waiting for credit or for the encoder is not a stall: only bytes under way can stall.

void Sender::report_stalled(int64_t round_trip_ns, int64_t now_ns) {
  for (Outgoing& out : outgoing_) {
    uint64_t under_way = out.sent() - out.acknowledged;
    if (under_way == 0 || !out.progress.stalls(under_way, round_trip_ns, now_ns)) continue;
    outbox_.event(Event::Type::kStalled, out.key, now_ns).text =
        "nothing was acknowledged for " + seconds(out.progress.silence_ns(now_ns)) + ", with " +
        std::to_string(out.acknowledged) + " of " + std::to_string(out.source->layout().bytes()) + " bytes there";
  }
}

// ---- Records

uint32_t Sender::checksum(const Outgoing& out, uint64_t chunk) const {
  if (!outbox_.recorder || out.source->crc_known(chunk)) return out.source->chunk_crc(chunk);
  int64_t start_ns = monotonic_ns();
  uint32_t crc = out.source->chunk_crc(chunk);
  uint32_t bytes = out.source->layout().chunk_bytes(chunk);
  outbox_.recorder.note(Stage::kChecksum, out.key, chunk, bytes, start_ns, monotonic_ns());
  return crc;
}

void Sender::note_arrived(const Outgoing& out, uint64_t received) const {
  if (!outbox_.recorder || received <= out.acknowledged) return;
  uint64_t chunk_bytes = out.source->layout().chunk_bytes(0);
  uint64_t below = (received + chunk_bytes - 1) / chunk_bytes;
  int64_t now_ns = monotonic_ns();
  outbox_.recorder.note(Stage::kAcknowledged, out.key, below, received - out.acknowledged, now_ns, now_ns);
}

void Sender::note_end() const {
  for (const Outgoing& out : outgoing_) note_arrived(out, out.sent());
}

}  // namespace parablock
