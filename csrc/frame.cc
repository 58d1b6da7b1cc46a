#include "frame.h"

#include <bit>
#include <cstring>
#include <string>

#include "crc32c.h"

namespace parablock {
namespace {

static_assert(std::endian::native == std::endian::little, "headers go to the wire in memory order");

constexpr uint32_t kMagic = 0x4B4C4250;  // "PBLK"
constexpr size_t kHeaderCrcAt = 40;

template <typename T>
void put(HeaderBytes& bytes, size_t at, T value) {
  std::memcpy(bytes.data() + at, &value, sizeof value);
}

template <typename T>
T get(const HeaderBytes& bytes, size_t at) {
  T value;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

}  // namespace

HeaderBytes write_header(const FrameHeader& header) {
  HeaderBytes bytes{};
  put(bytes, 0, kMagic);
  put(bytes, 4, kProtocolVersion);
  put(bytes, 5, static_cast<uint8_t>(header.type));
  put(bytes, 6, header.key.kind);
  put(bytes, 8, header.run);
  put(bytes, 16, header.key.round);
  put(bytes, 20, header.key.block);
  put(bytes, 24, header.offset);
  put(bytes, 32, header.length);
  put(bytes, 36, header.payload_crc);
  put(bytes, kHeaderCrcAt, crc32c(bytes.data(), kHeaderCrcAt));
  return bytes;
}

void check_magic(const HeaderBytes& bytes) {
  if (get<uint32_t>(bytes, 0) == kMagic) return;
  // A TLS record (alert or handshake, version 3.x). VersionError makes this side send a header, which tells the peer
  // that it has reached ParaBlock without TLS.
  if ((bytes[0] == 0x15 || bytes[0] == 0x16) && bytes[1] == 3)
    throw VersionError(
        "expected a ParaBlock peer without TLS, found one that uses TLS: give both sides TLS options, or neither");
  throw ProtocolError("the peer does not speak the ParaBlock protocol");
}

FrameHeader read_header(const HeaderBytes& bytes) {
  check_magic(bytes);
  // Checked before the checksum: another version may have another header layout.
  if (auto version = get<uint8_t>(bytes, 4); version != kProtocolVersion)
    throw VersionError("the peer speaks protocol version " + std::to_string(version) + ", this side version " +
                       std::to_string(kProtocolVersion) + ": install the same release on both");
  if (get<uint32_t>(bytes, kHeaderCrcAt) != crc32c(bytes.data(), kHeaderCrcAt))
    throw ProtocolError("a frame header failed its checksum");
  auto type = get<uint8_t>(bytes, 5);
  if (type < static_cast<uint8_t>(FrameType::kControl) || type > static_cast<uint8_t>(FrameType::kWithdraw))
    throw ProtocolError("unknown frame type " + std::to_string(type));
  if (get<uint8_t>(bytes, 7) != 0) throw ProtocolError("a frame has flags that this version does not know");
  FrameHeader header;
  header.type = static_cast<FrameType>(type);
  header.key = {get<uint8_t>(bytes, 6), get<uint32_t>(bytes, 16), get<uint32_t>(bytes, 20)};
  header.run = get<uint64_t>(bytes, 8);
  header.offset = get<uint64_t>(bytes, 24);
  header.length = get<uint32_t>(bytes, 32);
  header.payload_crc = get<uint32_t>(bytes, 36);
  return header;
}

}  // namespace parablock
