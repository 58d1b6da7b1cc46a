// Cuts the byte stream of one lane into frames: says where the next bytes go, detects whole headers and payloads, and
// computes the payload's checksum. The session interprets the frames.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "frame.h"
#include "transfer.h"

namespace parablock {

class FrameReader {
 public:
  // Where the next bytes go, in order. Never empty; valid until the next call of any function.
  const std::vector<Segment>& want();

  // Takes bytes that were filled into the segments of `want`, at most to the end of the header or payload; lowers
  // `bytes` by their number. True when the header or payload is whole; `at_header` tells which. Throws ProtocolError.
  bool take(size_t& bytes);

  // A header is whole: the caller must now call place, place_text or drop for the payload.
  bool at_header() const { return state_ == State::kPlacing; }
  void place(std::vector<Segment> into);
  void place_text();  // reads the payload into `text`; the caller has checked the length
  void drop();

  // True at once for a frame without payload.
  bool payload_whole() const { return (state_ == State::kPayload || dropped()) && left_.empty(); }
  void next_frame() { state_ = State::kHeader; }

  // Discards the rest of a payload that is being read for `key`: its buffer no longer belongs to the transport.
  void drop_data_of(const TransferKey& key);

  const FrameHeader& header() const { return header_; }
  bool dropped() const { return state_ == State::kDropping; }
  bool reads_data_of(const TransferKey& key) const;
  std::string& text() { return text_; }
  uint32_t payload_crc() const { return crc_; }

  // If payloads are timed: when the current payload began, and how long its checksum has taken so far.
  void time_payloads(bool on);
  int64_t began_ns() const { return began_ns_; }
  int64_t checking_ns() const { return checking_ns_; }

 private:
  enum class State {
    kHeader,
    kPlacing,  // the header is whole, and nobody has said yet where the payload goes
    kPayload,
    kDropping,  // reads a payload and discards it
  };

  HeaderBytes header_bytes_{};
  size_t header_filled_ = 0;
  FrameHeader header_;
  State state_ = State::kHeader;
  std::vector<Segment> left_;  // the rest of the payload
  std::string text_;
  uint32_t crc_ = 0;
  bool timed_ = false;
  int64_t began_ns_ = 0;
  int64_t checking_ns_ = 0;
  std::vector<Segment> want_;
  std::vector<uint8_t> scratch_;
};

}  // namespace parablock
