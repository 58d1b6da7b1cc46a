// Any 44 bytes as a frame header: refused with a reason, or read into fields that write the same bytes again.
#include <algorithm>
#include <cstdint>
#include <cstring>

#include "crc32c.h"
#include "frame.h"
#include "fuzz.h"

using namespace parablock;

namespace {

void read(const HeaderBytes& bytes) {
  try {
    FrameHeader header = read_header(bytes);
    expect(write_header(header) == bytes, "a header that is accepted is written again with the same bytes");
  } catch (const ProtocolError& refused) {
    expect(refused.what()[0] != '\0', "a refusal has a reason");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  HeaderBytes bytes{};
  std::copy_n(data, std::min(size, bytes.size()), bytes.begin());
  read(bytes);
  // And with a checksum that holds, or hardly any input would get behind it.
  uint32_t crc = crc32c(bytes.data(), kHeaderBytes - 4);
  std::memcpy(bytes.data() + kHeaderBytes - 4, &crc, sizeof crc);
  read(bytes);
  return 0;
}
