// CRC-32C (Castagnoli), the checksum of every header and payload. Hardware instructions where the machine has them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace parablock {

// Continues `crc` (0 to start) over `bytes` bytes: crc32c(b, n, crc32c(a, m)) is the checksum of a then b.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The checksum by each implementation that this machine can run, the table lookups first. For tests.
std::vector<uint32_t> crc32c_every_way(const void* data, size_t bytes);

}  // namespace parablock
