#include "lane.h"

#include <algorithm>
#include <bit>
#include <cerrno>

namespace parablock {
namespace {

constexpr int kReadsPerTurn = 16;  // then the other lanes have their turn
constexpr size_t kSegmentsPerFrame = 4;
constexpr size_t kMostUnsentBytes = 1 << 20;
constexpr int64_t kRateEveryNs = 4'000'000;
constexpr int64_t kAheadNs = 4'000'000;

bool is_later(int error) { return error == EAGAIN || error == EWOULDBLOCK; }

}  // namespace

// ---- In

void Lane::read_and_forget() {
  uint8_t scratch[16 << 10];
  for (int turn = 0; turn < kReadsPerTurn && !ended_; ++turn) {
    iovec vector{scratch, sizeof scratch};
    ssize_t count = channel_.read(&vector, 1);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && is_later(errno)) return;
    ended_ = count <= 0;
  }
}

Lane::End Lane::read(Session& session, int64_t now_ns) {
  for (int turn = 0; turn < kReadsPerTurn; ++turn) {
    iovec vectors[kSegmentsPerFrame];
    size_t used = 0;
    size_t offered = 0;
    for (const Segment& region : session.want(index_)) {
      vectors[used++] = {region.data, region.bytes};
      offered += region.bytes;
    }
    ssize_t count = channel_.read(vectors, used);
    if (count == 0) {
      ended_ = true;
      return std::nullopt;
    }
    if (count < 0) {
      if (errno == EINTR) continue;
      if (is_later(errno)) return std::nullopt;
      if (errno == EPROTO) throw ChannelError(channel_.failure(errno), channel_.permanent());
      return "reading failed: " + channel_.failure(errno);
    }
    bytes_in_.fetch_add(static_cast<uint64_t>(count), std::memory_order_relaxed);
    session.arrived(static_cast<size_t>(count), now_ns, index_);
    if (session.asks_to_attach()) return std::nullopt;  // the next bytes belong to another link's session
    // A short read means that the socket is empty: saves the read that would return EAGAIN.
    if (static_cast<size_t>(count) < offered) return std::nullopt;
  }
  return std::nullopt;
}

// ---- Out

void Lane::put(OutFrame frame, Passage passage) {
  departing_bytes_ += frame.bytes();
  if (frame.bytes() == frame.header.size()) passage.first_ns = passage.last_ns;
  departing_.push_back({std::move(frame), passage, recorder_ ? monotonic_ns() : 0});
}

int64_t Lane::next_ready_ns() const {
  if (departing_.empty()) return 0;
  const Departing& next = departing_.front();
  return front_written_ < next.frame.header.size() ? next.passage.first_ns : next.passage.last_ns;
}

// Collects the segments of the frames that may leave, in order; of the last one perhaps only the header. Returns the
// number of segments and of bytes.
std::pair<size_t, size_t> Lane::gather(Vectors& out, int64_t now_ns) const {
  size_t skip = front_written_;
  size_t count = 0;
  size_t total = 0;
  auto add = [&](const void* data, size_t bytes) {
    if (skip >= bytes) {
      skip -= bytes;
      return;
    }
    out[count++] = {const_cast<uint8_t*>(static_cast<const uint8_t*>(data)) + skip, bytes - skip};
    total += bytes - skip;
    skip = 0;
  };
  for (const Departing& departing : departing_) {
    if (departing.passage.first_ns > now_ns || count + kSegmentsPerFrame > out.size()) break;
    const OutFrame& frame = departing.frame;
    add(frame.header.data(), frame.header.size());
    if (departing.passage.last_ns > now_ns) break;
    add(frame.inline_payload.data(), frame.inline_payload.size());
    for (const Segment& part : frame.payload) add(part.data, part.bytes);
  }
  return {count, total};
}

void Lane::consumed(size_t bytes) {
  bytes_out_.fetch_add(bytes, std::memory_order_relaxed);
  front_written_ += bytes;
  const int64_t now_ns = recorder_ ? monotonic_ns() : 0;
  while (!departing_.empty() && front_written_ >= departing_.front().frame.bytes()) {
    size_t done = departing_.front().frame.bytes();
    front_written_ -= done;
    departing_bytes_ -= done;
    if (recorder_) note_sent(departing_.front(), now_ns);
    departing_.pop_front();
  }
}

// Frames queue for the socket, so the record of a frame begins where that of the previous frame ended. Frames that left
// in the same call get overlapping records: the peer may have had any of them before the call returned.
void Lane::note_sent(const Departing& departed, int64_t now_ns) {
  bool first_of_call = last_sent_ns_ <= write_began_ns_;
  int64_t start_ns = first_of_call ? std::max(departed.put_ns, last_sent_ns_) : write_began_ns_;
  last_sent_ns_ = now_ns;
  const OutFrame& frame = departed.frame;
  if (frame.chunk == kWholeTransfer) return;
  recorder_.note(Stage::kSend, frame.key, frame.chunk, frame.bytes() - frame.header.size(), start_ns, now_ns, index_);
}

// Feeds a fast connection in larger batches, which cost both ends less: a few milliseconds' worth of bytes at the
// current rate, within limits. A control message waits behind at most one batch. A batch smaller than a chunk cuts each
// chunk in two, and then both ends wake more often. So the span is long enough that sixteen links that share a path of
// several GB/s still send whole chunks of the default size.

void Lane::follow_rate(int64_t now_ns) {
  const int64_t span_ns = now_ns - rate_since_ns_;
  if (span_ns < kRateEveryNs) return;
  const uint64_t bytes = bytes_out() - rate_bytes_;
  rate_since_ns_ = now_ns;
  rate_bytes_ += bytes;
  const double taken = static_cast<double>(bytes) * kAheadNs / static_cast<double>(span_ns);
  const size_t ahead =
      std::bit_floor(std::clamp<size_t>(static_cast<size_t>(taken), kLeastUnsentBytes, kMostUnsentBytes));
  if (ahead == batch_bytes_) return;
  batch_bytes_ = ahead;
  set_unsent_limit(fd(), ahead);
}

void Lane::drop() {
  dropped_ = true;
  ended_ = true;
  blocked_ = false;
  departing_.clear();
  departing_bytes_ = front_written_ = 0;
}

Lane::End Lane::write(int64_t now_ns) {
  follow_rate(now_ns);
  while (true) {
    Vectors vectors;
    auto [used, total] = gather(vectors, now_ns);
    if (total == 0 && !channel_.unsent()) return std::nullopt;
    if (recorder_) write_began_ns_ = monotonic_ns();
    ssize_t count = channel_.write(vectors.data(), used);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && !is_later(errno)) return "writing failed: " + channel_.failure(errno);
    if (count > 0) consumed(static_cast<size_t>(count));
    if (count < static_cast<ssize_t>(total)) {
      blocked_ = true;
      return std::nullopt;
    }
  }
}

LaneStats Lane::stats() const {
  TcpInfo tcp = tcp_info(fd());
  return {.rtt_us = tcp.rtt_us,
          .rttvar_us = tcp.rttvar_us,
          .retransmits = tcp.retransmits,
          .delivery_rate = tcp.delivery_rate,
          .cwnd = tcp.cwnd,
          .bytes_in = bytes_in_.load(std::memory_order_relaxed),
          .bytes_out = bytes_out_.load(std::memory_order_relaxed),
          .unsent_bytes = tcp.unsent_bytes,
          .congestion_control = congestion_control(fd())};
}

}  // namespace parablock
