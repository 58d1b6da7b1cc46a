#include "transfer.h"

#include <sys/mman.h>

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

#include "crc32c.h"

namespace parablock {

Buffer::Buffer(size_t bytes) : size_(bytes) {
  void* memory = mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, bytes, MADV_HUGEPAGE);  // optional: fewer page faults if the kernel grants it
  data_ = static_cast<uint8_t*>(memory);
}

Buffer::Buffer(uint8_t* data, size_t bytes, std::function<void()> give_back)
    : data_(data), size_(bytes), give_back_(std::move(give_back)) {}

Buffer::~Buffer() {
  if (give_back_) {
    give_back_();
  } else {
    munmap(data_, std::max<size_t>(size_, 1));
  }
}

Parts Layout::segments(uint8_t* body, uint64_t chunk) const {
  uint64_t first = chunk * chunk_units;
  uint64_t count = units_in(chunk);
  uint8_t* codes = body + units * scale_bytes;
  return {Segment{body + first * scale_bytes, count * scale_bytes},
          Segment{codes + first * code_bytes, count * code_bytes}};
}

void Layout::check(size_t buffer_bytes) const {
  if (units == 0 || chunk_units == 0 || uint64_t{scale_bytes} + code_bytes == 0)
    throw std::invalid_argument("a transfer needs at least one unit, one byte per unit and one unit per chunk");
  uint64_t unit = uint64_t{scale_bytes} + code_bytes;
  if (units > buffer_bytes / unit)
    throw std::invalid_argument("the transfer has " + std::to_string(units) + " units of " + std::to_string(unit) +
                                " bytes, its buffer only " + std::to_string(buffer_bytes) + " bytes");
  // Now that the whole fits into memory, the product below cannot overflow.
  if (unit * std::min<uint64_t>(chunk_units, units) > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("a chunk must stay below 2 GiB");
}

void Layout::check_start(uint64_t offset) const {
  if (!is_start(offset))
    throw std::invalid_argument("a transfer of " + std::to_string(bytes()) + " bytes in chunks of " +
                                std::to_string(chunk_bytes(0)) + " cannot start at " + std::to_string(offset));
}

Source::Source(std::shared_ptr<Buffer> buffer, Layout layout, uint64_t ready_chunks, std::function<void()> wake)
    : buffer_(std::move(buffer)),
      layout_(layout),
      ready_(ready_chunks),
      wake_(std::move(wake)),
      crc_(layout.chunks()),
      crc_known_(layout.chunks()) {}

void Source::raise(uint64_t ready_chunks) {
  uint64_t clipped = std::min(ready_chunks, layout_.chunks());
  uint64_t ready = ready_.load(std::memory_order_relaxed);
  if (clipped <= ready) return;
  for (; ready < clipped; ++ready) chunk_crc(ready);
  ready_.store(clipped, std::memory_order_release);
  wake_();
}

uint32_t Source::chunk_crc(uint64_t chunk) {
  if (!crc_known_[chunk]) compute_crc(chunk);
  return crc_[chunk];
}

void Source::compute_crc(uint64_t chunk) {
  uint32_t crc = 0;
  for (const Segment& part : layout_.segments(body(), chunk)) crc = crc32c(part.data, part.bytes, crc);
  crc_[chunk] = crc;
  crc_known_[chunk] = true;
}

}  // namespace parablock
