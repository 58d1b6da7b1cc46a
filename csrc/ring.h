// A ring buffer of timed records, written by one thread and read by another. The writer takes no lock and never waits.
//
// A Ring belongs to one writing thread. It keeps the newest records and counts those that were overwritten before they
// were read. A thread that is not recorded has no Ring and only pays for the test of a null pointer.
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

// What a thread was doing. parablock_rt/observe/timeline.py repeats the numbers. A stage that can be nested in another
// has the higher number.
enum class Stage : uint8_t {
  kCompute,  // training: the local steps of a round
  kHandOver,  // training: giving the trained block to the encode thread
  kExposed,  // training: blocked on communication
  kClose,  // server: closing a round: its mean, the optimiser step and the update for the clients
  kEncode,  // one chunk packed
  kCopy,  // one chunk, from the arrival of the previous chunk on the host to its own, including packing on the device
  kChecksum,  // of one outgoing chunk
  kSend,  // one chunk, from being taken from the queue until the socket has its last byte
  kAcknowledged,  // another `bytes` are no longer under way: the peer has all chunks below `chunk`, or wants none; no
                  // duration
  kReceive,  // one chunk, from its header to its last byte
  kVerify,  // the checksum of an incoming chunk; computed piece by piece, recorded as one span at the chunk's end
  kFold,  // one upload added to a round's sum
  kApply,  // one aggregate merged into the reference
  kCheckpoint,  // server: a closed round written to disk
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
  // Room for at least `records`. The system provides the memory as it is used.
  explicit Ring(size_t records)
      : capacity_(std::bit_ceil(std::max<size_t>(records, 2))), memory_(capacity_ * sizeof(Record)) {}

  // The writing thread only; never waits.
  void write(const Record& record) {
    const auto words = std::bit_cast<Words>(record);
    const uint64_t index = written_.load(std::memory_order_relaxed);
    // begun_ is stored before the words (release): a reader that sees a new word also sees that the old record is gone.
    begun_.store(index + 1, std::memory_order_relaxed);
    uint64_t* slot = slot_of(index);
    for (size_t i = 0; i < words.size(); ++i) std::atomic_ref(slot[i]).store(words[i], std::memory_order_release);
    written_.store(index + 1, std::memory_order_release);
  }

  // Returns the records written since the last call, oldest first. Any thread.
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
    // The writer may have overtaken this loop: records that it has begun to overwrite are torn, so drop them.
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
  uint64_t read_ = 0;  // guarded by reader_
  uint64_t lost_ = 0;  // guarded by reader_
};

// Writes the records of one link, if there is a ring. The ring must outlive the Recorder.
struct Recorder {
  Ring* ring = nullptr;
  uint32_t peer = kNoPeer;

  explicit operator bool() const { return ring != nullptr; }

  // Requires a ring; only its writing thread may call.
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
