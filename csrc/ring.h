// What happened when, written by one thread and read by another, without a lock and without ever holding up the writer.
//
// A Ring belongs to one writing thread; it keeps the newest records and counts those that were overwritten before
// anybody read them. A thread that is not recorded has no Ring: the test of a null pointer is all that it pays.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <mutex>
#include <vector>

#include "frame.h"
#include "transfer.h"

namespace parablock {

// What a thread was doing. The numbers are known to parablock_rt/observe/timeline.py, too. A stage that can happen
// inside another one comes after it.
enum class Stage : uint8_t {
  kCompute,  // training: the local steps of a round
  kHandOver,  // training: giving the trained block to the encode thread
  kExposed,  // training: blocked on communication
  kClose,  // server: a round's mean, its optimiser, and what goes down
  kEncode,  // one chunk packed
  kCopy,  // one chunk, from when the one before it was on the host until it is, packing on the device included
  kChecksum,  // one chunk that will leave
  kSend,  // one chunk, from being taken from the queue until the socket has its last byte
  kAcknowledged,  // `bytes` more are under way no more: the peer has all chunks below `chunk`, or wants none; no
                  // duration
  kReceive,  // one chunk, from its header to its last byte
  kVerify,  // the checksum of a chunk that came; done piece by piece, noted as one piece at the chunk's end
  kFold,  // one upload added to a round's sum
  kApply,  // one aggregate merged into the reference
  kCheckpoint,  // server: a closed round put on the disk
};

constexpr uint32_t kWholeTransfer = ~uint32_t{0};  // in place of a chunk
constexpr uint32_t kNoPeer = 0;  // links count from 1

struct Record {
  int64_t start_ns = 0;  // CLOCK_MONOTONIC
  int64_t end_ns = 0;
  uint64_t bytes = 0;
  uint32_t round = 0;
  uint32_t block = 0;
  uint32_t chunk = kWholeTransfer;
  uint32_t peer = kNoPeer;  // the link
  Stage stage = Stage::kCompute;
  uint8_t kind = 0;  // of the transfer; 0: none
  uint16_t lane = 0;
  uint32_t unused = 0;
};
static_assert(sizeof(Record) == 48, "parablock_rt/observe/timeline.py reads records by this layout");

class Ring {
 public:
  // Room for at least `records`. Memory is taken from the system as it is used.
  explicit Ring(size_t records)
      : capacity_(std::bit_ceil(std::max<size_t>(records, 2))), memory_(capacity_ * sizeof(Record)) {}

  // The writing thread only; never waits.
  void write(const Record& record) {
    const auto words = std::bit_cast<Words>(record);
    const uint64_t index = written_.load(std::memory_order_relaxed);
    // A reader that sees any of the new words also sees that this slot's old record is gone: that orders the two.
    begun_.store(index + 1, std::memory_order_relaxed);
    uint64_t* slot = slot_of(index);
    for (size_t i = 0; i < words.size(); ++i) std::atomic_ref(slot[i]).store(words[i], std::memory_order_release);
    written_.store(index + 1, std::memory_order_release);
  }

  // What was written since the last call, oldest first. Any thread.
  std::vector<Record> drain() {
    std::lock_guard reading(reader_);
    const uint64_t end = written_.load(std::memory_order_acquire);
    const uint64_t from = std::max(read_, oldest_of(end));
    std::vector<Record> records(end - from);
    for (uint64_t index = from; index < end; ++index) {
      Words words;
      uint64_t* slot = slot_of(index);
      for (size_t i = 0; i < words.size(); ++i) words[i] = std::atomic_ref(slot[i]).load(std::memory_order_acquire);
      records[index - from] = std::bit_cast<Record>(words);
    }
    // The writer may have overtaken this loop: what it began to overwrite meanwhile is torn.
    const uint64_t intact = std::clamp(oldest_of(begun_.load(std::memory_order_relaxed)), from, end);
    records.erase(records.begin(), records.begin() + static_cast<std::ptrdiff_t>(intact - from));
    lost_ += intact - read_;
    read_ = end;
    return records;
  }

  // Records that were overwritten before a `drain` could take them; exact as of the last one.
  uint64_t lost() {
    std::lock_guard reading(reader_);
    return lost_;
  }

  size_t capacity() const { return capacity_; }

 private:
  using Words = std::array<uint64_t, sizeof(Record) / sizeof(uint64_t)>;

  uint64_t* slot_of(uint64_t index) {
    return reinterpret_cast<uint64_t*>(memory_.data()) + (index & (capacity_ - 1)) * std::tuple_size_v<Words>;
  }
  uint64_t oldest_of(uint64_t count) const { return count > capacity_ ? count - capacity_ : 0; }

  const size_t capacity_;  // a power of two
  Buffer memory_;
  std::atomic<uint64_t> begun_{0};
  std::atomic<uint64_t> written_{0};
  std::mutex reader_;
  uint64_t read_ = 0;  // guarded by reader_, as the next
  uint64_t lost_ = 0;
};

// What one link notes, if anybody wants it. The ring outlives it.
struct Recorder {
  Ring* ring = nullptr;
  uint32_t peer = kNoPeer;

  explicit operator bool() const { return ring != nullptr; }

  // Only where there is a ring; its writing thread only.
  void note(Stage stage, const TransferKey& key, uint64_t chunk, uint64_t bytes, int64_t start_ns, int64_t end_ns,
            size_t lane = 0) const {
    ring->write({.start_ns = start_ns,
                 .end_ns = end_ns,
                 .bytes = bytes,
                 .round = key.round,
                 .block = key.block,
                 .chunk = static_cast<uint32_t>(chunk),
                 .peer = peer,
                 .stage = stage,
                 .kind = key.kind,
                 .lane = static_cast<uint16_t>(lane)});
  }
};

}  // namespace parablock
