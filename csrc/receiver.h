// The receiving half of a session: keeps the posted transfers and their arrived chunks, and tells the sender about
// them. Chunks come in any order on any lane; acknowledgements cover the contiguous beginning.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <vector>

#include "outbox.h"
#include "progress.h"
#include "transfer.h"
#include "window.h"

namespace parablock {

class Receiver {
 public:
  Receiver(Outbox& outbox, std::shared_ptr<Incoming> incoming) : outbox_(outbox), incoming_(std::move(incoming)) {}

  // Throws std::invalid_argument when the transfer is posted already or was cancelled.
  void post(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start,
            std::shared_ptr<Listener> listener);
  void cancel(const TransferKey& key);  // no-op when the transfer is complete or was never posted
  // Tells the sender that a transfer will not be posted here, so that it need not wait for credit. No-op for a posted
  // transfer.
  void refuse(const TransferKey& key);

  // For the header of a data frame: where the payload goes, or nullopt to drop it. Throws ProtocolError for data that
  // this side did not ask for.
  std::optional<std::vector<Segment>> place(const FrameHeader& header, int64_t now_ns);
  void moved(const TransferKey& key, uint64_t bytes, int64_t now_ns);  // bytes of a placed payload came
  void chunk_arrived(const FrameHeader& header, uint32_t crc, int64_t now_ns);
  uint64_t chunk_at(const FrameHeader& header) const;  // only for a placed frame

  bool withdrawn(const TransferKey& key, int64_t now_ns);  // the sender gave up; true if it was posted here

  void measured_round_trip(int64_t ns) { window_.measured_round_trip(ns); }
  void report_stalled(int64_t round_trip_ns, int64_t now_ns);

  std::vector<std::pair<TransferKey, uint64_t>> unfinished() const;  // with their contiguous bytes
  bool expects_data() const { return !sinks_.empty(); }
  bool expects(const TransferKey& key) const { return sinks_.contains(key); }
  uint64_t moved_bytes() const { return moved_bytes_; }
  uint64_t corrupt_chunks() const { return corrupt_chunks_; }

 private:
  enum class Chunk : uint8_t { kMissing, kArriving, kHere };

  struct Sink {
    std::shared_ptr<Buffer> buffer;
    Layout layout;
    std::shared_ptr<Listener> listener;  // null: nobody
    std::vector<Chunk> chunks;
    uint64_t next_chunk = 0;  // the first missing chunk
    uint64_t acknowledged = 0;
    int64_t acknowledged_ns = 0;
    uint64_t granted = 0;
    int64_t first_byte_ns = 0;
    std::optional<Incoming::Share> share;  // from the first byte on
    uint32_t corrupt_chunks = 0;
    Progress progress;

    uint64_t received() const { return layout.offset_of_end(next_chunk); }
  };

  uint64_t window(const Sink& sink) const;
  void acknowledge(const TransferKey& key, Sink& sink);
  void ask_again(const FrameHeader& header, Sink& sink);

  Outbox& outbox_;
  std::shared_ptr<Incoming> incoming_;
  Window window_;
  std::map<TransferKey, Sink> sinks_;
  std::set<TransferKey> given_up_;  // by either side: data still under way for these keys is read and dropped
  std::set<TransferKey> withdrawn_;  // by the sender, before `post`
  uint64_t largest_chunk_ = 0;
  uint64_t moved_bytes_ = 0;  // of payload
  uint64_t corrupt_chunks_ = 0;
};

}  // namespace parablock
