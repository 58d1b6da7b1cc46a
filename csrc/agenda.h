// Which links the loop looks at in its next turn, and when that turn is due at the latest. A silent link costs nothing
// until then. Knows links by number only. Loop thread only.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <utility>
#include <vector>

namespace parablock {

class Agenda {
 public:
  void stir(uint64_t link) { stirred_.push_back(link); }  // look at it in the next turn
  void stir_all() { swept_ns_ = 0; }

  // The loop has looked at the link. `due_ns`: when to look again if nothing happens. `sends`: a watermark that rises
  // may give it something to send. `paused`: look in every turn, because the program may have taken its events.
  void note(uint64_t link, int64_t due_ns, bool sends, bool paused);
  void forget(uint64_t link);

  // When the next turn must begin; 0: at once. At most `latest_ns`.
  int64_t due_ns(int64_t latest_ns) const;

  // Puts the links to look at now into `links`, in order. `watermark_rose`: one has, since the last call. Once per
  // second these are all links: that is how stalls are found.
  void take(int64_t now_ns, bool watermark_rose, std::vector<uint64_t>& links);

 private:
  std::vector<uint64_t> stirred_;
  std::map<uint64_t, int64_t> due_of_;  // of each link
  std::set<std::pair<int64_t, uint64_t>> by_time_;  // the same, earliest first
  std::set<uint64_t> sending_;
  std::set<uint64_t> paused_;
  int64_t swept_ns_ = 0;  // when all links were looked at
};

}  // namespace parablock
