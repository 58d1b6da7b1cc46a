// The frame: a fixed 44-byte little-endian header, then `length` payload bytes.
//
//   0 magic   4 version 5 type 6 kind 7 flags(0)   8 run   16 round   20 block   24 offset   32 length
//   36 CRC-32C of the payload   40 CRC-32C of bytes 0..39
#pragma once

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace parablock {

constexpr uint8_t kProtocolVersion = 2;
constexpr size_t kHeaderBytes = 44;
constexpr size_t kMagicBytes = 4;
constexpr size_t kLaneKeyBytes = 32;

// The peer broke the protocol or does not speak it. The link cannot go on.
struct ProtocolError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The peer speaks another version. Only after this error does this side send one more frame, whose header tells the
// peer the version, before the link closes.
struct VersionError : ProtocolError {
  using ProtocolError::ProtocolError;
};

enum class FrameType : uint8_t {
  kControl = 1,  // payload: one message for the layer above
  kData = 2,     // payload: one chunk of a transfer, `offset` bytes into it
  kAck = 3,      // `offset`: bytes received so far; payload: u64, bytes the sender may have sent in all
  kCancel = 4,   // the receiver does not want this transfer (any more)
  kPing = 5,     // `offset`: any number, which the kPong returns
  kPong = 6,
  kAttach = 7,    // first frame of a connection that asks to become a lane; payload: the lane key of the link
  kResend = 8,    // the chunk at `offset` failed its checksum and must be sent again
  kWithdraw = 9,  // the sender gives this transfer up
};

// Identifies a transfer on its link. The direction follows from the side that posts it.
struct TransferKey {
  uint8_t kind = 0;  // its meaning belongs to the layer above
  uint32_t round = 0;
  uint32_t block = 0;
  auto operator<=>(const TransferKey&) const = default;
};

struct FrameHeader {
  FrameType type = FrameType::kControl;
  TransferKey key;
  uint64_t run = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
  uint32_t payload_crc = 0;
};

using HeaderBytes = std::array<uint8_t, kHeaderBytes>;

HeaderBytes write_header(const FrameHeader& header);
void check_magic(const HeaderBytes& bytes);         // needs only the first kMagicBytes; throws ProtocolError
FrameHeader read_header(const HeaderBytes& bytes);  // throws ProtocolError

}  // namespace parablock
