// Which links may get further lanes: the server hands a client a key, and whoever shows it on a new connection within a
// while becomes a lane of that client's link. No I/O.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>

namespace parablock {

std::string random_lane_key();  // throws std::system_error

class LaneKeys {
 public:
  void offer(uint64_t link, std::string key, size_t lanes, int64_t deadline_ns);

  // The link that the key opens; uses up one of its lanes. nullopt: unknown, too late, or all lanes are taken.
  std::optional<uint64_t> redeem(const std::string& key, int64_t now_ns);

  void forget(uint64_t link) { offers_.erase(link); }

 private:
  struct Offer {
    std::string key;
    size_t lanes_left;
    int64_t deadline_ns;
  };
  std::map<uint64_t, Offer> offers_;
};

}  // namespace parablock
