// What passes between driver callbacks, other threads and a Device's worker: a callback's end, arrivals, work to begin.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace parablock {

class Upload;

using HostAction = void (*)(void* object, uint64_t value);

// A driver callback must neither call the driver nor free what might; so what it kept alive goes from here to the
// worker, which lets go of it.
class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  // What a driver callback is given. It runs `action(keep.get(), value)` once.
  struct Errand {
    std::shared_ptr<Mailbox> mailbox;
    std::shared_ptr<void> keep;
    HostAction action;
    uint64_t value;
  };
  static void run(void* errand);  // the driver calls this

  Errand* errand(std::shared_ptr<void> keep, HostAction action, uint64_t value);  // from a warm pool
  void drop(Errand* errand);  // it will not run after all, or has run

  void add(std::shared_ptr<Upload> upload);
  void poke();  // there is something to look at; any thread, never blocks for long
  void stop();

  // Blocks the worker until there is something. Moves new uploads to the end of `uploads`, lets go of what errands
  // kept, and returns false once it should stop.
  bool wait(std::vector<std::shared_ptr<Upload>>& uploads);
  void release();  // lets go of what errands kept; not from a callback

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool poked_ = false;
  bool stopping_ = false;
  std::vector<std::shared_ptr<Upload>> added_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<std::unique_ptr<Errand>> all_;
  std::vector<Errand*> idle_;
};

}  // namespace parablock
