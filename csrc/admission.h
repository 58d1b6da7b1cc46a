// Admission control: limits the connections in total, and those of strangers, which are peers that have not proved
// their identity yet, in total and per network. Idle strangers never keep a newcomer out: an old one is evicted for it.
// Does no I/O.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string>

namespace parablock {

struct AdmissionLimits {
  size_t links = 1024;  // of strangers and proved peers
  size_t strangers = 512;  // in total
  size_t strangers_per_network = 256;  // see peer_network
};

class Admission {
 public:
  explicit Admission(AdmissionLimits limits) : limits_(limits) {}

  struct Answer {
    bool admitted = true;
    std::optional<uint64_t> evicted;  // the caller must drop this stranger, whose place is already free
  };

  // Registers a new connection. Ids must grow with time.
  Answer enter(uint64_t id, const std::string& network);
  // Evicts a stranger for a newcomer that lacks something other than a place, such as a descriptor.
  std::optional<uint64_t> make_room();  // the caller must drop this stranger; nullopt: there are no strangers
  void prove(uint64_t id);  // the peer has proved its identity; no-op for an unknown id, like `leave`
  void leave(uint64_t id);

  size_t strangers() const { return network_of_.size(); }
  bool is_stranger(uint64_t id) const { return network_of_.contains(id); }

 private:
  std::optional<uint64_t> to_drop(const std::string& network) const;
  uint64_t oldest_of_most() const;  // requires a stranger
  bool forget_stranger(uint64_t id);

  AdmissionLimits limits_;
  std::map<std::string, std::set<uint64_t>> strangers_;  // ids by network
  std::map<uint64_t, std::string> network_of_;  // by id of a stranger
  std::set<uint64_t> proved_;
};

}  // namespace parablock
