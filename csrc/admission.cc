#include "admission.h"

#include <algorithm>

namespace parablock {

Admission::Answer Admission::enter(uint64_t id, const std::string& network) {
  Answer answer{.evicted = to_drop(network)};
  if (answer.evicted) leave(*answer.evicted);
  if (network_of_.size() + proved_.size() >= limits_.links)
    return {.admitted = false, .evicted = {}};  // proved peers have all places
  strangers_[network].insert(id);
  network_of_.emplace(id, network);
  return answer;
}

// The oldest stranger of the newcomer's network if that network is at its limit; else, if there is no place left, the
// oldest of the network that has most strangers.
std::optional<uint64_t> Admission::to_drop(const std::string& network) const {
  if (network_of_.empty()) return std::nullopt;
  if (auto own = strangers_.find(network);
      own != strangers_.end() && own->second.size() >= limits_.strangers_per_network)
    return *own->second.begin();
  bool full = network_of_.size() >= limits_.strangers || network_of_.size() + proved_.size() >= limits_.links;
  if (!full) return std::nullopt;
  return oldest_of_most();
}

std::optional<uint64_t> Admission::make_room() {
  if (network_of_.empty()) return std::nullopt;
  const uint64_t evicted = oldest_of_most();
  leave(evicted);
  return evicted;
}

// Among networks with equally many strangers, the one whose oldest came first: a network's address must not decide.
uint64_t Admission::oldest_of_most() const {
  auto goes_later = [](const auto& a, const auto& b) {
    if (a.second.size() != b.second.size()) return a.second.size() < b.second.size();
    return *a.second.begin() > *b.second.begin();
  };
  return *std::max_element(strangers_.begin(), strangers_.end(), goes_later)->second.begin();
}

bool Admission::forget_stranger(uint64_t id) {
  auto found = network_of_.find(id);
  if (found == network_of_.end()) return false;
  auto at = strangers_.find(found->second);
  at->second.erase(id);
  if (at->second.empty()) strangers_.erase(at);
  network_of_.erase(found);
  return true;
}

void Admission::prove(uint64_t id) {
  if (forget_stranger(id)) proved_.insert(id);
}

void Admission::leave(uint64_t id) {
  if (!forget_stranger(id)) proved_.erase(id);
}

}  // namespace parablock
