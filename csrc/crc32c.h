// CRC-32C (Castagnoli), the checksum of every header and payload. Hardware instructions where the machine has them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace parablock {

// Continues `crc` (0 to start) over `bytes` bytes: crc32c(b, n, crc32c(a, m)) is the checksum of a then b.
uint32_t crc32c(const void* data, size_t bytes, uint32_t crc = 0);

// The same by table lookup alone: what machines without the instruction run, and what tests hold the fast path against.
uint32_t crc32c_portable(const void* data, size_t bytes, uint32_t crc = 0);

}  // namespace parablock
