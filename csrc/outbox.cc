#include "outbox.h"

#include <cstdio>

#include "crc32c.h"

namespace parablock {
namespace {

size_t cost(const OutFrame& frame) { return sizeof frame + frame.inline_payload.size(); }

}  // namespace

std::string name(const TransferKey& key) {
  return "(kind " + std::to_string(key.kind) + ", round " + std::to_string(key.round) + ", block " +
         std::to_string(key.block) + ")";
}

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3g s", static_cast<double>(ns) / 1e9);
  return text;
}

OutFrame Outbox::bare(FrameHeader header) const {
  header.run = run;
  header.payload_crc = crc32c(nullptr, 0);
  OutFrame frame;
  frame.header = write_header(header);
  return frame;
}

void Outbox::control(FrameHeader header, std::string payload) {
  header.run = run;
  header.length = static_cast<uint32_t>(payload.size());
  header.payload_crc = crc32c(payload.data(), payload.size());
  OutFrame frame;
  frame.header = write_header(header);
  frame.inline_payload = std::move(payload);
  if (queued_bytes_ + cost(frame) > limits.queue_bytes)
    throw ProtocolError("the peer does not read what is sent to it: more than " + std::to_string(limits.queue_bytes) +
                        " bytes of messages wait");
  queued_bytes_ += cost(frame);
  control_.push_back(std::move(frame));
}

std::optional<OutFrame> Outbox::next_control() {
  if (control_.empty()) return std::nullopt;
  OutFrame frame = std::move(control_.front());
  control_.pop_front();
  queued_bytes_ -= cost(frame);
  return frame;
}

Event& Outbox::event(Event::Type type, const TransferKey& key, int64_t now_ns) {
  Event event;
  event.type = type;
  event.key = key;
  event.at_ns = now_ns;
  events_.push_back(std::move(event));
  return events_.back();
}

std::vector<Event> Outbox::take_events() {
  std::vector<Event> taken;
  taken.swap(events_);
  return taken;
}

void Outbox::remember(std::set<TransferKey>& keys, const TransferKey& key) const {
  keys.insert(key);
  // Within a kind, keys grow with the round, so a small key is less likely to be needed again.
  if (keys.size() > limits.remembered_keys) keys.erase(*keys.begin() == key ? std::next(keys.begin()) : keys.begin());
}

}  // namespace parablock
