// A transfer: one packed body in one direction. The sending side is a Source, which any number of links may share (a
// broadcast is one buffer); the receiving side is a Receiver::Sink. Both own their Buffer through a shared_ptr, so the
// bytes live for as long as a link still refers to them.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace parablock {

// Page-aligned memory, returned when the last owner releases it.
class Buffer : public std::enable_shared_from_this<Buffer> {
 public:
  explicit Buffer(size_t bytes);  // owns zeroed memory; throws std::bad_alloc
  Buffer(uint8_t* data, size_t bytes, std::function<void()> give_back);  // borrows memory; give_back returns it
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
  std::function<void()> give_back_;  // empty: the Buffer owns the memory
};

struct Segment {
  uint8_t* data = nullptr;
  size_t bytes = 0;
};
using Parts = std::array<Segment, 2>;  // of a chunk: its scales and its codes

// How a body is cut into chunks. A body has two planes, all scales and then all codes; a chunk is the scales and the
// codes of a range of units. Chunks follow each other on the wire, so "offset" counts bytes in that order.
struct Layout {
  uint64_t units = 0;
  uint32_t scale_bytes = 0;  // per unit
  uint32_t code_bytes = 0;   // per unit
  uint32_t chunk_units = 0;

  uint64_t bytes() const { return units * (uint64_t{scale_bytes} + code_bytes); }
  uint64_t chunks() const { return (units + chunk_units - 1) / chunk_units; }
  uint64_t units_in(uint64_t chunk) const { return std::min<uint64_t>(chunk_units, units - chunk * chunk_units); }
  uint64_t offset(uint64_t chunk) const { return chunk * chunk_units * (uint64_t{scale_bytes} + code_bytes); }
  uint64_t offset_of_end(uint64_t chunks_done) const { return std::min(offset(chunks_done), bytes()); }
  uint32_t chunk_bytes(uint64_t chunk) const {
    return static_cast<uint32_t>(units_in(chunk) * (uint64_t{scale_bytes} + code_bytes));
  }
  Parts segments(uint8_t* body, uint64_t chunk) const;

  // Whether a chunk begins at this offset, so that a transfer can begin there.
  bool is_start(uint64_t offset) const { return offset < bytes() && offset % chunk_bytes(0) == 0; }

  // Throws std::invalid_argument when empty, when a chunk would not fit a frame, or when `buffer_bytes` is too small.
  void check(size_t buffer_bytes) const;
  void check_start(uint64_t offset) const;  // throws std::invalid_argument unless `is_start`
};

class Source {
 public:
  // The raising thread calls `wake` after each rise of the watermark; `wake` must not block.
  Source(std::shared_ptr<Buffer> buffer, Layout layout, uint64_t ready_chunks, std::function<void()> wake);

  const Layout& layout() const { return layout_; }
  uint8_t* body() const { return buffer_->data(); }

  // The watermark: chunks below it are final. It never falls, and only one thread may raise it. `raise` computes the
  // checksums of the new chunks, which are still in that thread's cache.
  uint64_t ready_chunks() const { return ready_.load(std::memory_order_acquire); }
  void raise(uint64_t ready_chunks);

  // The checksum of a chunk, computed once for all links: by `raise`, or at the first use if the chunk was ready from
  // the beginning. Only the loop thread, or the raising thread for chunks above the watermark.
  uint32_t chunk_crc(uint64_t chunk);
  bool crc_known(uint64_t chunk) const { return crc_known_[chunk]; }

 private:
  void compute_crc(uint64_t chunk);

  std::shared_ptr<Buffer> buffer_;
  Layout layout_;
  std::atomic<uint64_t> ready_;
  std::function<void()> wake_;
  std::vector<uint32_t> crc_;
  std::vector<uint8_t> crc_known_;  // not vector<bool>: both threads write, to different elements
};

// Somebody who cannot wait for a receive to be complete. The loop thread makes these calls, so none of them may block.
class Listener {
 public:
  virtual ~Listener() = default;
  // In any order. The bytes are right and, on a fast link, still in the CPU's cache.
  virtual void chunk_arrived(uint64_t /*chunk*/, const Parts& /*parts*/) {}
  // So many bytes are here, contiguous from the start in wire order.
  virtual void received(uint64_t /*bytes*/) {}
};

// How much of a receive has arrived, for a thread that uses the first bytes while more arrive. The loop thread raises
// the watermark; any thread may read it.
class Watermark : public Listener {
 public:
  // The loop thread calls `wake` after each rise; `wake` must not block.
  explicit Watermark(std::function<void()> wake) : wake_(std::move(wake)) {}

  uint64_t received() const { return received_.load(std::memory_order_acquire); }  // never falls
  void received(uint64_t bytes) override {
    if (bytes <= received_.load(std::memory_order_relaxed)) return;
    received_.store(bytes, std::memory_order_release);
    wake_();
  }

 private:
  std::atomic<uint64_t> received_{0};
  std::function<void()> wake_;
};

}  // namespace parablock
