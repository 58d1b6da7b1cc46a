#include "reader.h"

#include <algorithm>

#include "crc32c.h"
#include "socket.h"

namespace parablock {
namespace {

constexpr size_t kScratchBytes = 64 << 10;

}  // namespace

const std::vector<Segment>& FrameReader::want() {
  want_.clear();
  if (state_ == State::kHeader) {
    want_.push_back({header_bytes_.data() + header_filled_, kHeaderBytes - header_filled_});
  } else if (dropped()) {
    scratch_.resize(kScratchBytes);
    want_.push_back({scratch_.data(), std::min(left_.front().bytes, kScratchBytes)});
  } else {
    want_ = left_;
    // Reads the next header together with this payload: one system call per chunk. After a kAttach, the bytes belong to
    // another link's reader.
    if (header_.type != FrameType::kAttach) want_.push_back({header_bytes_.data(), kHeaderBytes});
  }
  return want_;
}

bool FrameReader::take(size_t& bytes) {
  if (state_ == State::kHeader) {
    size_t taken = std::min(bytes, kHeaderBytes - header_filled_);
    header_filled_ += taken;
    bytes -= taken;
    // Early: a peer that speaks another protocol may never send a whole header.
    if (header_filled_ >= kMagicBytes) check_magic(header_bytes_);
    if (header_filled_ < kHeaderBytes) return false;
    header_ = read_header(header_bytes_);
    header_filled_ = 0;
    state_ = State::kPlacing;
    return true;
  }
  Segment& part = left_.front();
  size_t taken = std::min(bytes, part.bytes);
  if (!dropped()) {
    int64_t start_ns = timed_ ? monotonic_ns() : 0;
    crc_ = crc32c(part.data, taken, crc_);  // while the bytes are in cache
    if (timed_) checking_ns_ += monotonic_ns() - start_ns;
    part.data += taken;
  }
  part.bytes -= taken;
  bytes -= taken;
  if (part.bytes == 0) left_.erase(left_.begin());
  return left_.empty();
}

void FrameReader::place(std::vector<Segment> into) {
  std::erase_if(into, [](const Segment& part) { return part.bytes == 0; });
  left_ = std::move(into);
  state_ = State::kPayload;
  crc_ = 0;
  if (timed_) time_payloads(true);
}

void FrameReader::time_payloads(bool on) {
  timed_ = on;
  began_ns_ = on ? monotonic_ns() : 0;
  checking_ns_ = 0;
}

void FrameReader::place_text() {
  text_.resize(header_.length);
  place({{reinterpret_cast<uint8_t*>(text_.data()), text_.size()}});
}

void FrameReader::drop() {
  place({{nullptr, header_.length}});
  state_ = State::kDropping;
}

bool FrameReader::reads_data_of(const TransferKey& key) const {
  return state_ == State::kPayload && header_.type == FrameType::kData && header_.key == key;
}

void FrameReader::drop_data_of(const TransferKey& key) {
  if (reads_data_of(key)) state_ = State::kDropping;
}

}  // namespace parablock
