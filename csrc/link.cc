#include "link.h"

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace parablock {
namespace {

constexpr int kReadsPerTurn = 16;      // then other links get theirs
constexpr int kWritesPerTurn = 16;     // likewise
constexpr size_t kFramesAhead = 4;     // pulled before the socket takes them: control never queues behind more
constexpr size_t kFramesOnLine = 4096;  // likewise with an artificial delay
constexpr size_t kSegmentsPerFrame = 4;
constexpr int64_t kPingEveryNs = 5'000'000'000;
constexpr int64_t kLingerNs = 1'000'000'000;  // for the peer's end after the last byte left

std::string seconds(int64_t ns) {
  char text[32];
  std::snprintf(text, sizeof text, "%g s", static_cast<double>(ns) / 1e9);
  return text;
}

}  // namespace

Link::Link(uint64_t id, Fd fd, SessionLimits limits, int64_t idle_timeout_ns)
    : id_(id),
      fd_(std::move(fd)),
      session_(limits),
      idle_timeout_ns_(idle_timeout_ns),
      ping_every_ns_(std::min(kPingEveryNs, idle_timeout_ns / 3)),  // so that a peer with the same limit hears enough
      last_heard_ns_(monotonic_ns()),
      last_ping_ns_(last_heard_ns_) {
  set_link_options(fd_.get());
}

bool Link::fail(std::string reason) {
  if (reason_.empty()) reason_ = std::move(reason);
  return false;
}

// Only waiting for the peer to close: nothing it says matters any more.
bool Link::read_and_forget() {
  uint8_t scratch[16 << 10];
  for (int turn = 0; turn < kReadsPerTurn; ++turn) {
    ssize_t count = ::read(fd_.get(), scratch, sizeof scratch);
    if (count == 0) return fail("closed");
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? true : fail("closed");
  }
  return true;
}

bool Link::read(int64_t now_ns) {
  if (closing_) return read_and_forget();
  for (int turn = 0; turn < kReadsPerTurn; ++turn) {
    iovec vectors[kSegmentsPerFrame];
    int used = 0;
    size_t offered = 0;
    for (const Segment& region : session_.want()) {
      vectors[used++] = {region.data, region.bytes};
      offered += region.bytes;
    }
    ssize_t count = readv(fd_.get(), vectors, used);
    if (count == 0) return fail("the peer closed the connection");
    if (count < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return true;
      return fail(std::string("reading failed: ") + std::strerror(errno));
    }
    last_heard_ns_ = now_ns;
    counters_.bytes_in.fetch_add(static_cast<uint64_t>(count), std::memory_order_relaxed);
    try {
      session_.arrived(static_cast<size_t>(count), now_ns);
    } catch (const VersionError& error) {
      // Our own header carries our version: it is the only thing such a peer can read.
      session_.ping(now_ns);
      close_after_flush(now_ns + kLingerNs, error.what());
      return true;
    }
    counters_.round_trip_ns.store(session_.round_trip_ns(), std::memory_order_relaxed);
    if (static_cast<size_t>(count) < offered) return true;  // the socket is empty: spare the read that would say so
  }
  return true;
}

bool Link::pull_frames(int64_t now_ns) {
  bool pulled = false;
  while (true) {
    if (departing_.size() >= (shaper_.active() ? kFramesOnLine : kFramesAhead)) return pulled;
    if (shaper_.active() && shaper_.free_at() > now_ns) {
      line_was_busy_ = true;
      return pulled;
    }
    std::optional<OutFrame> frame = session_.next_frame(now_ns);
    if (!frame) {
      line_was_busy_ = false;
      return pulled;
    }
    int64_t ready_at = shaper_.active() ? shaper_.transmit(frame->bytes(), now_ns, line_was_busy_) : now_ns;
    departing_.push_back({std::move(*frame), ready_at});
    pulled = true;
  }
}

// The segments of frames that may leave, in order: how many, and how many bytes.
std::pair<size_t, size_t> Link::gather(Vectors& out, int64_t now_ns) const {
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
    if (departing.ready_at_ns > now_ns || count + kSegmentsPerFrame > out.size()) break;
    const OutFrame& frame = departing.frame;
    add(frame.header.data(), frame.header.size());
    add(frame.inline_payload.data(), frame.inline_payload.size());
    for (const Segment& part : frame.payload) add(part.data, part.bytes);
  }
  return {count, total};
}

void Link::consumed(size_t bytes) {
  counters_.bytes_out.fetch_add(bytes, std::memory_order_relaxed);
  front_written_ += bytes;
  while (!departing_.empty() && front_written_ >= departing_.front().frame.bytes()) {
    front_written_ -= departing_.front().frame.bytes();
    departing_.pop_front();
  }
}

bool Link::write_ready(int64_t now_ns) {
  while (true) {
    Vectors vectors;
    auto [used, total] = gather(vectors, now_ns);
    if (total == 0) return true;
    msghdr message{};
    message.msg_iov = vectors.data();
    message.msg_iovlen = used;
    ssize_t count = sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) {
        wants_write_ = true;
        return true;
      }
      return fail(std::string("writing failed: ") + std::strerror(errno));
    }
    consumed(static_cast<size_t>(count));
    if (static_cast<size_t>(count) < total) {
      wants_write_ = true;
      return true;
    }
  }
}

bool Link::write(int64_t now_ns) {
  if (!on_time(now_ns)) return false;
  if (write_shut_) return true;
  wants_write_ = false;
  int turn = 0;
  do {
    if (!write_ready(now_ns)) return false;
    if (++turn == kWritesPerTurn) wants_write_ = true;
    if (wants_write_) {
      line_was_busy_ = false;  // it is the socket that frames wait for
      return true;
    }
  } while (pull_frames(now_ns));
  if (closing_ && departing_.empty()) {
    // Half-close and wait for the peer's end: closing with unread input would reset the connection and could destroy
    // what was just written.
    shutdown(fd_.get(), SHUT_WR);
    write_shut_ = true;
    close_deadline_ns_ = std::min(close_deadline_ns_, now_ns + kLingerNs);
  }
  return true;
}

bool Link::on_time(int64_t now_ns) {
  if (closing_ && now_ns >= close_deadline_ns_) return fail("closed");
  if (closing_) return true;
  if (reads_paused_) last_heard_ns_ = now_ns;
  if (now_ns - last_heard_ns_ > idle_timeout_ns_)
    return fail("nothing was heard from the peer for " + seconds(idle_timeout_ns_));
  if (now_ns - last_ping_ns_ >= ping_every_ns_) {
    last_ping_ns_ = now_ns;
    session_.ping(now_ns);
  }
  return true;
}

int64_t Link::wake_at() const {
  int64_t silence_ns = std::min(last_ping_ns_ + ping_every_ns_, last_heard_ns_ + idle_timeout_ns_ + 1);
  int64_t at = closing_ ? close_deadline_ns_ : silence_ns;
  if (write_shut_ || wants_write_) return at;
  if (!departing_.empty()) at = std::min(at, departing_.front().ready_at_ns);
  if (line_was_busy_ && shaper_.active()) at = std::min(at, shaper_.free_at());
  return at;
}

void Link::close_after_flush(int64_t deadline_ns, std::string reason) {
  if (closing_) return;
  closing_ = true;
  close_deadline_ns_ = deadline_ns;
  reason_ = std::move(reason);
}

}  // namespace parablock
