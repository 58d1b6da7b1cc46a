// Who may be connected: bounds on the connections that have not proved who they are, in all and for each network, and
// on all together. Strangers that do nothing never keep a newcomer out: the oldest of them goes for it. No sockets
// here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

namespace parablock {

struct AdmissionLimits {
  size_t links = 1024;                // strangers and others
  size_t strangers = 512;              // not proved yet
  size_t strangers_per_network = 256;  // likewise, of one network
};

class Admission {
 public:
  explicit Admission(AdmissionLimits limits) : limits_(limits) {}

  struct Answer {
    bool admitted = true;
    std::optional<uint64_t> evicted;  // this stranger must be dropped; it has left the books already
  };

  // A new connection. Ids grow with time.
  Answer enter(uint64_t id, const std::string& network);
  // For a newcomer that cannot be let in for want of something else than a place.
  std::optional<uint64_t> make_room();  // this stranger must be dropped, as above; nullopt: all are proved
  void prove(uint64_t id);  // a stranger no more; no-op for ids unknown, as `leave`
  void leave(uint64_t id);

  size_t strangers() const { return network_of_.size(); }
  bool is_stranger(uint64_t id) const { return network_of_.contains(id); }

 private:
  std::optional<uint64_t> to_drop(const std::string& network) const;
  uint64_t oldest_of_most() const;  // there must be a stranger
  bool forget_stranger(uint64_t id);

  AdmissionLimits limits_;
  std::map<std::string, std::set<uint64_t>> strangers_;  // of each network
  std::map<uint64_t, std::string> network_of_;           // of each stranger
  std::set<uint64_t> proved_;
};

}  // namespace parablock
