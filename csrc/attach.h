// The keys for further lanes: the server gives a client a key, and a new connection that presents the key in time
// becomes a lane of that client's link. Does no I/O.
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

  // Returns the link that the key belongs to and uses up one of the offered lanes. nullopt: the key is unknown or
  // expired, or all offered lanes are taken.
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
