#include "attach.h"

#include <sys/random.h>

#include <cerrno>
#include <system_error>
#include <utility>

#include "frame.h"

namespace parablock {
namespace {

// Takes the same time wherever the two differ, so that a key cannot be guessed byte by byte.
bool equal(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return false;
  volatile uint8_t difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference = difference | static_cast<uint8_t>(a[i] ^ b[i]);
  return difference == 0;
}

}  // namespace

std::string random_lane_key() {
  std::string key(kLaneKeyBytes, '\0');
  if (getrandom(key.data(), key.size(), 0) != static_cast<ssize_t>(key.size()))
    throw std::system_error(errno, std::generic_category(), "getrandom");
  return key;
}

void LaneKeys::offer(uint64_t link, std::string key, size_t lanes, int64_t deadline_ns) {
  offers_.insert_or_assign(link, Offer{std::move(key), lanes, deadline_ns});
}

std::optional<uint64_t> LaneKeys::redeem(const std::string& key, int64_t now_ns) {
  for (auto& [link, offer] : offers_) {
    if (!equal(offer.key, key)) continue;
    if (now_ns >= offer.deadline_ns || offer.lanes_left == 0) return std::nullopt;
    --offer.lanes_left;
    return link;
  }
  return std::nullopt;
}

}  // namespace parablock
