// The sending half of a session: keeps the posted transfers and their credit, and chooses the chunk that leaves next.
// Lanes take chunks one by one, so a slow lane takes fewer chunks and does not hold up the others.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>

#include "outbox.h"
#include "progress.h"
#include "transfer.h"

namespace parablock {

class Sender {
 public:
  explicit Sender(Outbox& outbox) : outbox_(outbox) {}

  // Throws std::invalid_argument when the transfer is posted already or was withdrawn.
  void post(const TransferKey& key, std::shared_ptr<Source> source);
  void withdraw(const TransferKey& key);  // no-op when the transfer is acknowledged, refused or was never posted

  // The next chunk that may leave: transfers in the order they were posted, in each first the chunks to resend.
  std::optional<OutFrame> next_chunk(int64_t now_ns);

  // From the peer. Throw ProtocolError.
  void acknowledged(const TransferKey& key, uint64_t received, uint64_t limit, int64_t now_ns);
  void refused(const TransferKey& key, int64_t now_ns);
  void asked_again(const TransferKey& key, uint64_t offset);

  void report_stalled(int64_t round_trip_ns, int64_t now_ns);
  bool has_transfers() const { return !outgoing_.empty(); }
  uint64_t moved_bytes() const { return moved_bytes_; }
  void note_end() const;  // records at the end of the link that nothing is under way any more

 private:
  struct Outgoing {
    TransferKey key;
    std::shared_ptr<Source> source;
    uint64_t next_chunk = 0;
    uint64_t limit = 0;  // bytes the receiver granted in total
    uint64_t acknowledged = 0;
    std::deque<uint64_t> again;  // chunks that failed their checksum at the receiver
    uint32_t resent = 0;
    int64_t first_byte_ns = 0;
    Progress progress;

    uint64_t sent() const { return source->layout().offset_of_end(next_chunk); }
  };

  struct Credit {
    uint64_t received = 0;  // the offset at which the sender begins
    uint64_t limit = 0;
  };

  std::deque<Outgoing>::iterator find(const TransferKey& key);
  std::optional<uint64_t> next_chunk_of(Outgoing& out) const;
  void grant(Outgoing& out, Credit credit);
  uint32_t checksum(const Outgoing& out, uint64_t chunk) const;
  void note_arrived(const Outgoing& out, uint64_t received) const;

  Outbox& outbox_;
  std::deque<Outgoing> outgoing_;
  uint64_t moved_bytes_ = 0;  // of payload: acknowledged
  std::map<TransferKey, Credit> early_credit_;  // granted before `post`
  std::set<TransferKey> refused_;                 // refused before `post`
  std::set<TransferKey> withdrawn_;               // frames from the peer about these are ignored
};

}  // namespace parablock
