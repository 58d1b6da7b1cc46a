#include "agenda.h"

#include <algorithm>

namespace parablock {
namespace {

constexpr int64_t kSweepEveryNs = 1'000'000'000;

void keep(std::set<uint64_t>& links, uint64_t link, bool in) {
  if (in) {
    links.insert(link);
  } else {
    links.erase(link);
  }
}

}  // namespace

void Agenda::note(uint64_t link, int64_t due_ns, bool sends, bool paused) {
  keep(sending_, link, sends);
  keep(paused_, link, paused);
  auto [known, is_new] = due_of_.try_emplace(link, due_ns);
  if (!is_new && known->second == due_ns) return;
  if (!is_new) by_time_.erase({known->second, link});
  by_time_.emplace(due_ns, link);
  known->second = due_ns;
}

void Agenda::forget(uint64_t link) {
  std::erase(stirred_, link);
  sending_.erase(link);
  paused_.erase(link);
  auto known = due_of_.find(link);
  if (known == due_of_.end()) return;
  by_time_.erase({known->second, link});
  due_of_.erase(known);
}

int64_t Agenda::due_ns(int64_t latest_ns) const {
  if (!stirred_.empty()) return 0;
  return by_time_.empty() ? latest_ns : std::min(latest_ns, by_time_.begin()->first);
}

void Agenda::take(int64_t now_ns, bool watermark_rose, std::vector<uint64_t>& links) {
  links.clear();
  links.swap(stirred_);
  const bool sweep = now_ns - swept_ns_ >= kSweepEveryNs;
  if (sweep) swept_ns_ = now_ns;
  for (auto at = by_time_.begin(); at != by_time_.end() && (sweep || at->first <= now_ns); ++at)
    links.push_back(at->second);
  if (watermark_rose) links.insert(links.end(), sending_.begin(), sending_.end());
  links.insert(links.end(), paused_.begin(), paused_.end());
  std::sort(links.begin(), links.end());
  links.erase(std::unique(links.begin(), links.end()), links.end());
}

}  // namespace parablock
