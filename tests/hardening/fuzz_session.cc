// The protocol core against any peer and any program: bytes in any split and any interleaving of lanes, forged frames
// whose checksums hold, transfers posted, cancelled, withdrawn and raised in between.
//
// A model beside it reads the same bytes and knows what may have happened. It checks that nothing is ever written
// outside of a buffer that is waiting for just these bytes, that a transfer is complete only with the bytes that were
// sent, that nothing leaves beyond the credit or the watermark, and that nothing happens to a transfer after its end.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "crc32c.h"
#include "fuzz.h"
#include "session.h"

using namespace parablock;

namespace {

constexpr size_t kGuardBytes = 64;
constexpr uint8_t kGuard = 0xA5;
constexpr size_t kMostRegions = 4;  // what a link reads at once
constexpr uint64_t kRun = 7;
constexpr SessionLimits kLimits{.control_bytes = 64, .queue_bytes = 8192, .window_bytes = 100, .remembered_keys = 32};
constexpr std::array<Layout, 4> kLayouts{{
    {.units = 10, .scale_bytes = 2, .code_bytes = 7, .chunk_units = 3},
    {.units = 5, .scale_bytes = 0, .code_bytes = 16, .chunk_units = 2},
    {.units = 3, .scale_bytes = 2, .code_bytes = 64, .chunk_units = 8},
    {.units = 1, .scale_bytes = 0, .code_bytes = 1, .chunk_units = 1},
}};

// The wire order of a body: what offsets count.
std::vector<uint8_t> in_wire_order(uint8_t* body, const Layout& layout) {
  std::vector<uint8_t> bytes;
  for (uint64_t chunk = 0; chunk < layout.chunks(); ++chunk)
    for (const Segment& part : layout.segments(body, chunk))
      bytes.insert(bytes.end(), part.data, part.data + part.bytes);
  return bytes;
}

struct Incoming {
  Layout layout;
  std::shared_ptr<Buffer> buffer;
  std::shared_ptr<Watermark> watermark;
  std::vector<uint8_t> wire;   // what the peer sent, in wire order
  std::vector<bool> here;      // which chunks of it
  std::vector<bool> claimed;   // chunks that are here or on their way: others for the same place are dropped
  bool waiting = true;         // neither complete nor given up
  std::vector<uint8_t> final;  // the buffer's bytes when it stopped to be the session's

  uint64_t first_missing() const {
    return static_cast<uint64_t>(std::find(here.begin(), here.end(), false) - here.begin());
  }
  std::vector<uint8_t> now() const { return {buffer->data(), buffer->data() + buffer->size()}; }
  void end() {
    waiting = false;
    final = now();
  }
};

struct Outgoing {
  Layout layout;
  std::shared_ptr<Source> source;
  std::vector<uint8_t> wire;
  uint64_t granted = 0;
  uint64_t sent = 0;  // bytes, contiguous from the start
  uint64_t acknowledged = 0;
  bool begun = false;
  bool active = true;

  // The first acknowledgement says where to begin.
  void acknowledge(uint64_t received, uint64_t limit) {
    if (!begun && received > 0) sent = received;
    acknowledged = std::max(acknowledged, received);
    granted = std::max(granted, limit);
  }
};

// What the peer has said on one lane.
struct Lane {
  std::deque<uint8_t> unread;      // by the session
  std::vector<uint8_t> read;       // of the frame that is being read
  bool opened = false;             // its header was whole
  std::vector<bool>::size_type chunk = 0;
  bool counts = false;             // it is a chunk that somebody waits for
};

class Harness {
 public:
  explicit Harness(Input input) : input_(input), session_(kLimits) {}

  void run() {
    if (input_.take<uint8_t>() & 1) session_.set_run(kRun);
    try {
      while (!input_.empty()) {
        step();
        look_at_events();
      }
    } catch (const ProtocolError&) {  // the link is over; its last events are still taken
      session_.take_events();
    }
    for (auto& [key, in] : incoming_) {
      expect(in.waiting || in.now() == in.final, "a buffer is not touched after its transfer ended");
      check_guard(in);
    }
  }

 private:
  TransferKey key() { return {.kind = 1, .round = input_.take<uint8_t>() % 4u, .block = 0}; }

  void step() {
    switch (input_.take<uint8_t>() % 14) {
      case 0: return post();
      case 1: return send();
      case 2: return cancel();
      case 3: return raise();
      case 4: return pull();
      case 5: return feed();
      case 6: return session_.ping(now_ns_ += 1000);
      case 7: return session_.send_control(std::string(input_.take<uint8_t>() % 80, 'm'));
      case 8: return withdraw();
      case 9: return session_.report_stalled(now_ns_ += 100'000'000'000);
      case 10: session_.take_attach_key(); return;
      case 11: return read(input_.take<uint8_t>() % kMaxLanes, input_.take<uint8_t>());
      default: return forge();
    }
  }

  void post() {
    TransferKey key = this->key();
    Layout layout = kLayouts[input_.take<uint8_t>() % kLayouts.size()];
    uint64_t start = input_.take<uint8_t>() % layout.chunks();  // chunks that came over a link that broke
    auto known = incoming_.find(key);
    // A complete transfer may come again in no run; a session forgets it, a program does not.
    if (known != incoming_.end() && !known->second.waiting && !given_up_.contains(key)) return;
    auto buffer = std::make_shared<Buffer>(layout.bytes() + kGuardBytes);
    std::fill_n(buffer->data(), layout.bytes(), uint8_t{0x5A});
    std::fill_n(buffer->data() + layout.bytes(), kGuardBytes, kGuard);
    auto watermark = std::make_shared<Watermark>([] {});
    try {
      session_.receive(key, buffer, layout, layout.offset(start), watermark);
      expect(known == incoming_.end() && !refused_here_.contains(key), "a transfer is posted once, if at all");
    } catch (const std::invalid_argument&) {
      expect(known != incoming_.end() || refused_here_.contains(key), "only what is known already is refused");
      return;
    }
    Incoming& in = incoming_[key];
    in = {.layout = layout,
          .buffer = buffer,
          .watermark = watermark,
          .wire = in_wire_order(buffer->data(), layout),
          .here = std::vector<bool>(layout.chunks()),
          .claimed = {},
          .final = {}};
    std::fill_n(in.here.begin(), start, true);
    in.claimed = in.here;
    if (withdrawn_by_peer_.contains(key)) give_up(key, in);
  }

  void give_up(const TransferKey& key, Incoming& in) {
    given_up_.insert(key);
    in.end();
  }

  void send() {
    TransferKey key = this->key();
    if (outgoing_.contains(key)) return;
    Layout layout = kLayouts[input_.take<uint8_t>() % kLayouts.size()];
    auto buffer = std::make_shared<Buffer>(layout.bytes());
    for (size_t at = 0; at < layout.bytes(); ++at) buffer->data()[at] = static_cast<uint8_t>(at * 31 + key.round);
    auto source = std::make_shared<Source>(buffer, layout, input_.take<uint8_t>() % (layout.chunks() + 1), [] {});
    Outgoing& out = outgoing_[key];
    out.layout = layout;
    out.source = source;
    out.wire = in_wire_order(buffer->data(), layout);
    if (auto credit = early_credit_.find(key); credit != early_credit_.end())
      out.acknowledge(credit->second.first, credit->second.second);
    session_.send(key, std::move(source));
  }

  void cancel() {
    auto byte = input_.take<uint8_t>();
    TransferKey key{.kind = 1, .round = byte % 4u, .block = 0};
    if (byte >= 128) {  // of what is posted, was complete or was given up, it changes nothing
      if (!incoming_.contains(key)) refused_here_.insert(key);
      return session_.refuse_receive(key);
    }
    auto in = incoming_.find(key);
    if (in != incoming_.end() && in->second.waiting) give_up(key, in->second);
    session_.cancel_receive(key);
  }

  void withdraw() {
    TransferKey key = this->key();
    auto out = outgoing_.find(key);
    session_.cancel_send(key);
    if (out != outgoing_.end() && out->second.active) end(out->second);
  }

  void raise() {
    TransferKey key = this->key();
    auto chunks = input_.take<uint8_t>();
    if (auto out = outgoing_.find(key); out != outgoing_.end()) out->second.source->raise(chunks);
  }

  void pull() {
    for (int count = input_.take<uint8_t>() % 8; count > 0; --count) {
      std::optional<OutFrame> frame = session_.next_frame(now_ns_, input_.take<uint8_t>() % kMaxLanes);
      if (!frame) return;
      FrameHeader header = header_of(frame->header);
      std::vector<uint8_t> payload(frame->inline_payload.begin(), frame->inline_payload.end());
      for (const Segment& part : frame->payload) payload.insert(payload.end(), part.data, part.data + part.bytes);
      expect(header.length == payload.size(), "a frame is as long as it says");
      expect(header.payload_crc == crc32c(payload.data(), payload.size()), "a frame's checksum holds");
      if (header.type != FrameType::kData) continue;
      Outgoing& out = outgoing_.at(header.key);
      uint64_t end = header.offset + header.length;
      expect(out.active, "nothing is sent of a transfer that is over");
      expect(header.offset <= out.sent, "no chunk is left out");
      expect(end <= out.granted, "nothing is sent beyond the credit");
      expect(end <= out.layout.offset_of_end(out.source->ready_chunks()), "nothing is sent above the watermark");
      expect(std::equal(payload.begin(), payload.end(), out.wire.begin() + static_cast<int64_t>(header.offset)),
             "what is sent is what was given");
      out.sent = std::max(out.sent, end);
      out.begun = true;
    }
  }

  // ---- What comes from the peer

  // Any bytes.
  void feed() {
    std::span<const uint8_t> bytes = input_.take_bytes(input_.take<uint8_t>());
    say(0, bytes);
    read(0, input_.take<uint8_t>());
  }

  // A frame that is well formed, and often just the one that is due.
  void forge() {
    FrameHeader header;
    header.type = static_cast<FrameType>(1 + input_.take<uint8_t>() % static_cast<uint8_t>(FrameType::kWithdraw));
    header.key = header.type == FrameType::kControl ? TransferKey{} : key();
    auto choice = input_.take<uint8_t>();
    header.run = choice & 1 ? kRun : 0;
    std::vector<uint8_t> payload;
    size_t lane = 0;
    if (header.type == FrameType::kAck) {
      auto out = outgoing_.find(header.key);
      uint64_t limit = out == outgoing_.end() ? kLayouts[0].bytes() : out->second.layout.bytes();
      header.offset = out == outgoing_.end() ? 0 : out->second.sent;
      if (choice & 2) limit = input_.take<uint8_t>();
      if (choice & 4) header.offset = input_.take<uint8_t>();
      payload.resize(sizeof limit);
      std::memcpy(payload.data(), &limit, sizeof limit);
    } else if (header.type == FrameType::kData) {
      lane = input_.take<uint8_t>() % kMaxLanes;
      payload = forge_chunk(header, choice);
    } else if (header.type == FrameType::kResend) {
      header.offset = choice & 2 ? input_.take<uint64_t>() : input_.take<uint8_t>() % 8 * 27u;
    } else if (header.type == FrameType::kControl || header.type == FrameType::kAttach || choice & 2) {
      payload.resize(input_.take<uint8_t>() % 80, choice);
    }
    header.length = static_cast<uint32_t>(payload.size());
    header.payload_crc = crc32c(payload.data(), payload.size());
    if (choice & 8) header.payload_crc ^= 1;
    say(lane, write_header(header));
    say(lane, payload);
    if (!(choice & 16)) read(lane, input_.take<uint8_t>());
  }

  std::vector<uint8_t> forge_chunk(FrameHeader& header, uint8_t choice) {
    auto in = incoming_.find(header.key);
    size_t length = choice & 2 ? input_.take<uint8_t>() : 27;
    if (in != incoming_.end()) {
      const Layout& layout = in->second.layout;
      uint64_t chunk = std::min(in->second.first_missing(), layout.chunks() - 1);
      if (choice & 32) chunk = input_.take<uint8_t>() % layout.chunks();
      header.offset = layout.offset(chunk);
      if (!(choice & 2)) length = layout.chunk_bytes(chunk);
    }
    if (choice & 4) header.offset = input_.take<uint64_t>();
    std::vector<uint8_t> payload(length, choice);
    input_.fill(payload.data(), length % 5);
    return payload;
  }

  template <typename Bytes>
  void say(size_t lane, const Bytes& bytes) {
    lanes_[lane].unread.insert(lanes_[lane].unread.end(), bytes.begin(), bytes.end());
  }

  // Lets the session read a lane: at most `how` bytes a read where that is less than 128, else as many bytes in all.
  void read(size_t lane, uint8_t how) {
    std::deque<uint8_t>& unread = lanes_[lane].unread;
    size_t left = how < 128 ? unread.size() : std::min<size_t>(unread.size(), how - 127u);
    size_t most = how == 0 || how >= 128 ? left : how;
    while (left > 0) {
      check_regions();
      size_t taken = 0;
      for (const Segment& region : session_.want(lane)) {
        size_t count = std::min({region.bytes, most - taken, left - taken});
        std::copy_n(unread.begin() + static_cast<int64_t>(taken), count, region.data);
        taken += count;
      }
      lanes_[lane].read.insert(lanes_[lane].read.end(), unread.begin(), unread.begin() + static_cast<int64_t>(taken));
      unread.erase(unread.begin(), unread.begin() + static_cast<int64_t>(taken));
      session_.arrived(taken, now_ns_ += 1000, lane);
      follow(lanes_[lane]);
      look_at_events();
      left -= taken;
    }
  }

  void check_regions() {
    std::vector<Segment> others;  // parts of buffers that other lanes fill
    for (size_t lane = 0; lane < kMaxLanes; ++lane) {
      const std::vector<Segment>& regions = session_.want(lane);
      expect(!regions.empty() && regions.size() <= kMostRegions, "there is somewhere to read to, in few pieces");
      for (const Segment& region : regions) {
        expect(region.bytes > 0, "no region is empty");
        for (const Segment& other : others) expect(apart(region, other), "two lanes never fill the same bytes");
        for (auto& [key, in] : incoming_) {
          Segment all{in.buffer->data(), in.buffer->size()};
          Segment body{in.buffer->data(), in.layout.bytes()};
          if (apart(region, all)) continue;
          bool inside = region.data >= body.data && region.data + region.bytes <= body.data + body.bytes;
          expect(inside && in.waiting, "bytes go only into a buffer that waits for them");
        }
      }
      others.insert(others.end(), regions.begin(), regions.end());
    }
  }

  static bool apart(const Segment& a, const Segment& b) {
    return a.data + a.bytes <= b.data || b.data + b.bytes <= a.data;
  }

  // Lets the model read what the session has read of a lane.
  void follow(Lane& lane) {
    while (lane.read.size() >= kHeaderBytes) {
      HeaderBytes bytes;
      std::copy_n(lane.read.begin(), kHeaderBytes, bytes.begin());
      FrameHeader header = header_of(bytes);
      if (!lane.opened) open(lane, header);
      if (lane.read.size() < kHeaderBytes + header.length) return;
      auto payload_begin = lane.read.begin() + kHeaderBytes;
      std::vector<uint8_t> payload(payload_begin, payload_begin + header.length);
      lane.read.erase(lane.read.begin(), payload_begin + header.length);
      lane.opened = false;
      bool holds = crc32c(payload.data(), payload.size()) == header.payload_crc;
      if (header.type == FrameType::kData) {
        if (lane.counts) take_chunk(incoming_.at(header.key), lane.chunk, payload, holds);
      } else if (holds) {
        take_message(header, payload);
      }
    }
  }

  // Of bytes that the session took, or gave, for a header.
  static FrameHeader header_of(const HeaderBytes& bytes) {
    try {
      return read_header(bytes);
    } catch (const ProtocolError&) {
      expect(false, "the session sees the same frames as the model");
      throw;
    }
  }

  void open(Lane& lane, const FrameHeader& header) {
    lane.opened = true;
    lane.counts = false;
    auto found = incoming_.find(header.key);
    if (header.type != FrameType::kData || found == incoming_.end() || !found->second.waiting) return;
    Incoming& in = found->second;
    expect(header.offset < in.wire.size() && header.length <= in.wire.size() - header.offset,
           "no chunk beyond a transfer's end is accepted");
    lane.chunk = header.offset / in.layout.chunk_bytes(0);
    lane.counts = !in.claimed[lane.chunk];
    in.claimed[lane.chunk] = true;
  }

  void take_chunk(Incoming& in, size_t chunk, const std::vector<uint8_t>& payload, bool holds) {
    in.claimed[chunk] = in.here[chunk] = holds;
    auto at = in.wire.begin() + static_cast<int64_t>(in.layout.offset(chunk));
    if (holds) std::copy(payload.begin(), payload.end(), at);
  }

  void take_message(const FrameHeader& header, const std::vector<uint8_t>& payload) {
    if (header.type == FrameType::kControl) messages_.emplace_back(payload.begin(), payload.end());
    if (header.type == FrameType::kCancel) refused_.insert(header.key);
    if (header.type == FrameType::kWithdraw) {
      auto in = incoming_.find(header.key);
      if (in == incoming_.end() || in->second.waiting) withdrawn_by_peer_.insert(header.key);
      if (in != incoming_.end() && in->second.waiting) give_up(header.key, in->second);
    }
    if (header.type == FrameType::kAck) {
      uint64_t limit = 0;
      std::memcpy(&limit, payload.data(), sizeof limit);
      auto out = outgoing_.find(header.key);
      if (out == outgoing_.end()) {
        early_credit_[header.key] = {header.offset, limit};
      } else if (out->second.active) {
        out->second.acknowledge(header.offset, limit);
      }
    }
  }

  // ---- What the session says has happened

  void look_at_events() {
    for (auto& [key, in] : incoming_)
      expect(in.watermark->received() <= in.layout.offset_of_end(in.first_missing()),
             "a receive's watermark is never above what is there");
    for (const Event& event : session_.take_events()) {
      switch (event.type) {
        case Event::Type::kControl:
          expect(!messages_.empty() && messages_.front() == event.text, "messages come once, whole and in order");
          messages_.pop_front();
          break;
        case Event::Type::kReceived: received(incoming_.at(event.key)); break;
        case Event::Type::kSent:
          expect(outgoing_.at(event.key).acknowledged == outgoing_.at(event.key).wire.size(),
                 "a transfer is sent when the peer has said that it has all of it");
          end(outgoing_.at(event.key));
          break;
        case Event::Type::kRefused:
          expect(refused_.contains(event.key), "only what the peer refused is refused");
          end(outgoing_.at(event.key));
          break;
        case Event::Type::kWithdrawn:
          expect(withdrawn_by_peer_.erase(event.key) == 1, "only what the peer gave up is withdrawn, and once");
          break;
        case Event::Type::kStalled: break;
        default: expect(false, "a session has no other events");
      }
    }
  }

  void received(Incoming& in) {
    expect(in.waiting, "a transfer is complete once, and never after it was cancelled");
    expect(in.first_missing() == in.here.size(), "a transfer is complete only with all of its bytes");
    expect(in_wire_order(in.buffer->data(), in.layout) == in.wire, "what arrived is what was sent");
    expect(in.watermark->received() == in.wire.size(), "a receive's watermark rises to its end");
    in.end();
  }

  void end(Outgoing& out) {
    expect(out.active, "a transfer ends once");
    out.active = false;
    expect(out.source.use_count() == 1, "nobody holds a buffer whose transfer is over");
  }

  void check_guard(const Incoming& in) {
    const uint8_t* guard = in.buffer->data() + in.layout.bytes();
    expect(std::all_of(guard, guard + kGuardBytes, [](uint8_t byte) { return byte == kGuard; }),
           "nothing is written behind a transfer");
  }

  Input input_;
  Session session_;
  int64_t now_ns_ = 0;
  std::array<Lane, kMaxLanes> lanes_;
  std::map<TransferKey, Incoming> incoming_;
  std::map<TransferKey, Outgoing> outgoing_;
  std::map<TransferKey, std::pair<uint64_t, uint64_t>> early_credit_;  // received, limit
  std::set<TransferKey> given_up_;           // receives, by either side
  std::set<TransferKey> refused_here_;       // receives, before they were posted
  std::set<TransferKey> refused_;            // sends, by the peer
  std::set<TransferKey> withdrawn_by_peer_;  // and not told to the owner yet
  std::deque<std::string> messages_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Harness(Input(data, size)).run();
  return 0;
}
