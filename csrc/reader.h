// Cuts the byte stream of one lane into frames: where the next bytes go, when a header or a payload is whole and what
// the payload's checksum came to. What frames mean is the session's business.
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
  // Where the next bytes go, in order. Never empty; valid until the next call of any kind.
  const std::vector<Segment>& want();

  // Takes in what `want` returned, at most to the end of the header or the payload; lowers `bytes` by what it took.
  // True when that is whole: then `at_header` tells which. Throws ProtocolError.
  bool take(size_t& bytes);

  // A header is whole, and one of the next three must say where its payload goes.
  bool at_header() const { return placing_; }
  void place(std::vector<Segment> into);
  void place_text();  // `text` will have the payload; the caller checked its length
  void drop();

  // Also true at once for a frame without payload.
  bool payload_whole() const { return in_payload_ && !placing_ && left_.empty(); }
  void next_frame() { in_payload_ = false; }

  // The rest of a payload that is being read for `key` goes nowhere: the memory is not ours any more.
  void drop_data_of(const TransferKey& key);

  const FrameHeader& header() const { return header_; }
  bool dropped() const { return dropped_; }
  bool reads_data_of(const TransferKey& key) const;
  std::string& text() { return text_; }
  uint32_t payload_crc() const { return crc_; }

  // Where payloads are timed: when this one began, and how long its checksum took so far.
  void time_payloads(bool on);
  int64_t began_ns() const { return began_ns_; }
  int64_t checking_ns() const { return checking_ns_; }

 private:
  HeaderBytes header_bytes_{};
  size_t header_filled_ = 0;
  FrameHeader header_;
  bool in_payload_ = false;
  bool placing_ = false;
  bool dropped_ = false;
  std::vector<Segment> left_;  // of the payload
  std::string text_;
  uint32_t crc_ = 0;
  bool timed_ = false;
  int64_t began_ns_ = 0;
  int64_t checking_ns_ = 0;
  std::vector<Segment> want_;
  std::vector<uint8_t> scratch_;
};

}  // namespace parablock
