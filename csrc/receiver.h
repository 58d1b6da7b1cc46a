// The receiving half of a session: which transfers are posted, which of their chunks are here, and what the sender is
// told about it. Chunks come in any order, from any lane; what is acknowledged is the contiguous beginning.
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

  // Throws std::invalid_argument when it is posted already or was cancelled.
  void post(const TransferKey& key, std::shared_ptr<Buffer> buffer, const Layout& layout, uint64_t start,
            std::shared_ptr<Watermark> watermark);
  void cancel(const TransferKey& key);  // no-op when it is complete or was never posted
  // Of what was never posted: it will not be, and the sender need not wait for credit. No-op while it is posted.
  void refuse(const TransferKey& key);

  // A data frame begins: where its payload goes, or nullopt when it is to be dropped. Throws ProtocolError for data
  // that nobody asked for.
  std::optional<std::vector<Segment>> place(const FrameHeader& header, int64_t now_ns);
  void moved(const TransferKey& key, uint64_t bytes, int64_t now_ns);  // bytes of a payload that was placed
  void chunk_arrived(const FrameHeader& header, uint32_t crc, int64_t now_ns);
  uint64_t chunk_at(const FrameHeader& header) const;  // of a frame that was placed

  bool withdrawn(const TransferKey& key, int64_t now_ns);  // by the sender; true when it was posted

  void measured_round_trip(int64_t ns) { window_.measured_round_trip(ns); }
  void report_stalled(int64_t round_trip_ns, int64_t now_ns);

  std::vector<std::pair<TransferKey, uint64_t>> unfinished() const;  // and their contiguous bytes
  bool expects_data() const { return !sinks_.empty(); }
  bool expects(const TransferKey& key) const { return sinks_.contains(key); }
  uint64_t moved_bytes() const { return moved_bytes_; }
  uint64_t corrupt_chunks() const { return corrupt_chunks_; }

 private:
  enum class Chunk : uint8_t { kMissing, kArriving, kHere };

  struct Sink {
    std::shared_ptr<Buffer> buffer;
    Layout layout;
    std::shared_ptr<Watermark> watermark;  // null: nobody wants to know before the end
    std::vector<Chunk> chunks;
    uint64_t next_chunk = 0;  // the first that is not here
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
  std::set<TransferKey> given_up_;   // by either side: data still under way for these is read and dropped
  std::set<TransferKey> withdrawn_;  // by the sender, before `post`
  uint64_t largest_chunk_ = 0;
  uint64_t moved_bytes_ = 0;  // of payload
  uint64_t corrupt_chunks_ = 0;
};

}  // namespace parablock
