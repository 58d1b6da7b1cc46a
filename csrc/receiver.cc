#include "receiver.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace parablock {
namespace {

constexpr int64_t kAcknowledgeNs = 500'000'000;  // longest delay, so that the sender of a slow transfer sees progress
constexpr size_t kGuessedTogether = 4;  // transfers assumed to share the window before data has come
constexpr uint32_t kMostCorruptChunks = 16;  // per transfer: beyond that, resending does not help

}  // namespace

// ---- Posting and giving up

void Receiver::post(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start,
                    std::shared_ptr<Listener> listener) {
  layout.check(buffer->size());
  layout.check_start(start);
  if (given_up_.contains(key))
    throw std::invalid_argument("transfer " + name(key) + " was cancelled on this link and cannot be posted again");
  if (withdrawn_.erase(key) > 0) {
    outbox_.remember(given_up_, key);
    outbox_.event(Event::Type::kWithdrawn, key, 0);
    return;
  }
  auto [at, is_new] = sinks_.try_emplace(key);
  if (!is_new) throw std::invalid_argument("transfer " + name(key) + " is already posted on this link");
  Sink& sink = at->second;
  sink.buffer = std::move(buffer);
  sink.layout = layout;
  sink.listener = std::move(listener);
  sink.chunks.resize(layout.chunks());
  sink.next_chunk = start / layout.chunk_bytes(0);
  std::fill_n(sink.chunks.begin(), sink.next_chunk, Chunk::kHere);
  if (sink.listener != nullptr) sink.listener->received(sink.received());
  largest_chunk_ = std::max<uint64_t>(largest_chunk_, layout.chunk_bytes(0));
  acknowledge(key, sink);
}

void Receiver::cancel(const TransferKey& key) {
  if (sinks_.erase(key) == 0) return;
  outbox_.remember(given_up_, key);
  outbox_.control({.type = FrameType::kCancel, .key = key}, {});
}

void Receiver::refuse(const TransferKey& key) {
  if (sinks_.contains(key) || given_up_.contains(key)) return;
  outbox_.remember(given_up_, key);
  outbox_.control({.type = FrameType::kCancel, .key = key}, {});
}

bool Receiver::withdrawn(const TransferKey& key, int64_t now_ns) {
  if (sinks_.erase(key) == 0) {
    if (!given_up_.contains(key)) outbox_.remember(withdrawn_, key);
    return false;
  }
  outbox_.remember(given_up_, key);
  outbox_.event(Event::Type::kWithdrawn, key, now_ns);
  return true;
}

// ---- What the sender is told

// At least two chunks: a window smaller than a chunk would stop the sender for ever.
uint64_t Receiver::window(const Sink& sink) const {
  // How many transfers come at once is unknown until their data comes.
  size_t sharing = std::max(incoming_->count(), sink.share ? 1 : kGuessedTogether);
  return std::max(window_.bytes(outbox_.limits.window_bytes, sharing), 2 * uint64_t{sink.layout.chunk_bytes(0)});
}

void Receiver::acknowledge(const TransferKey& key, Sink& sink) {
  uint64_t received = sink.received();
  sink.granted = std::max(sink.granted, std::min(sink.layout.bytes(), received + window(sink)));
  std::string payload(sizeof sink.granted, '\0');
  std::memcpy(payload.data(), &sink.granted, sizeof sink.granted);
  outbox_.control({.type = FrameType::kAck, .key = key, .offset = received}, std::move(payload));
  sink.acknowledged = received;
}

void Receiver::ask_again(const FrameHeader& header, Sink& sink) {
  ++corrupt_chunks_;
  if (++sink.corrupt_chunks > kMostCorruptChunks)
    throw ProtocolError("chunks of transfer " + name(header.key) + " failed their checksums " +
                        std::to_string(sink.corrupt_chunks) + " times: the network or a machine's memory damages data");
  outbox_.control({.type = FrameType::kResend, .key = header.key, .offset = header.offset}, {});
}

// ---- Data

std::optional<std::vector<Segment>> Receiver::place(const FrameHeader& header, int64_t now_ns) {
  auto found = sinks_.find(header.key);
  if (found == sinks_.end()) {
    if (!given_up_.contains(header.key) || header.length > largest_chunk_ || header.length == 0)
      throw ProtocolError("data for transfer " + name(header.key) + ", which nobody here asked for");
    return std::nullopt;
  }
  Sink& sink = found->second;
  uint64_t chunk = header.offset / sink.layout.chunk_bytes(0);
  if (header.offset >= sink.granted || header.offset != sink.layout.offset(chunk) ||
      header.length != sink.layout.chunk_bytes(chunk) || header.offset + header.length > sink.granted)
    throw ProtocolError("transfer " + name(header.key) + ": " + std::to_string(header.length) + " bytes at " +
                        std::to_string(header.offset) + " are none of its chunks of " +
                        std::to_string(sink.layout.chunk_bytes(0)) + " bytes below " + std::to_string(sink.granted) +
                        ", all that was asked for");
  if (sink.chunks[chunk] != Chunk::kMissing) return std::nullopt;  // sent twice
  sink.chunks[chunk] = Chunk::kArriving;
  if (sink.first_byte_ns == 0) {
    sink.first_byte_ns = sink.acknowledged_ns = now_ns;
    sink.share.emplace(incoming_);
  }
  auto parts = sink.layout.segments(sink.buffer->data(), chunk);
  return std::vector<Segment>(parts.begin(), parts.end());
}

void Receiver::moved(const TransferKey& key, uint64_t bytes, int64_t now_ns) {
  window_.arrived(bytes, now_ns);
  sinks_.at(key).progress.moved(bytes, now_ns);
  moved_bytes_ += bytes;
}

uint64_t Receiver::chunk_at(const FrameHeader& header) const {
  return header.offset / sinks_.at(header.key).layout.chunk_bytes(0);
}

void Receiver::chunk_arrived(const FrameHeader& header, uint32_t crc, int64_t now_ns) {
  auto found = sinks_.find(header.key);
  Sink& sink = found->second;
  const uint64_t chunk = header.offset / sink.layout.chunk_bytes(0);
  if (crc != header.payload_crc) {
    sink.chunks[chunk] = Chunk::kMissing;
    return ask_again(header, sink);
  }
  sink.chunks[chunk] = Chunk::kHere;
  if (sink.listener != nullptr) sink.listener->chunk_arrived(chunk, sink.layout.segments(sink.buffer->data(), chunk));
  while (sink.next_chunk < sink.chunks.size() && sink.chunks[sink.next_chunk] == Chunk::kHere) ++sink.next_chunk;
  if (sink.listener != nullptr) sink.listener->received(sink.received());
  bool complete = sink.next_chunk == sink.chunks.size();
  uint64_t news = sink.received() - sink.acknowledged;
  // The window may have grown since the last acknowledgement, but the sender only knows the credit granted then.
  bool all_granted = sink.granted == sink.layout.bytes();
  uint64_t under_way = all_granted ? window(sink) : std::min(window(sink), sink.granted - sink.acknowledged);
  bool due = news >= under_way / 4 || now_ns - sink.acknowledged_ns >= kAcknowledgeNs;
  if (complete || (news > 0 && due)) {
    acknowledge(header.key, sink);
    sink.acknowledged_ns = now_ns;
  }
  if (!complete) return;
  outbox_.event(Event::Type::kReceived, header.key, now_ns).first_byte_ns = sink.first_byte_ns;
  sinks_.erase(found);
}

std::vector<std::pair<TransferKey, uint64_t>> Receiver::unfinished() const {
  std::vector<std::pair<TransferKey, uint64_t>> list;
  for (const auto& [key, sink] : sinks_) list.emplace_back(key, sink.received());
  return list;
}

void Receiver::report_stalled(int64_t round_trip_ns, int64_t now_ns) {
  for (auto& [key, sink] : sinks_) {
    if (!sink.progress.stalls(sink.layout.chunk_bytes(0), round_trip_ns, now_ns)) continue;
    outbox_.event(Event::Type::kStalled, key, now_ns).text =
        "nothing came for " + seconds(sink.progress.silence_ns(now_ns)) + ", with " + std::to_string(sink.received()) +
        " of " + std::to_string(sink.layout.bytes()) + " bytes here";
  }
}

}  // namespace parablock
