// What passes between driver callbacks, other threads and a Device's worker: a callback's end, arrivals, work to begin.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace parablock {

class HostToDevice;

using HostAction = void (*)(void* object, uint64_t value);

// A driver callback must neither call the driver nor free what might; so what it kept alive goes from here to the
// worker, which lets go of it.
class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  // What the driver is given and hands to `run`, which calls `action(keep.get(), value)` once.
  struct Callback {
    std::shared_ptr<Mailbox> mailbox;
    std::shared_ptr<void> keep;
    HostAction action;
    uint64_t value;
  };
  static void run(void* callback);  // the driver calls this

  Callback* callback(std::shared_ptr<void> keep, HostAction action, uint64_t value);  // from a warm pool
  void drop(Callback* callback);  // it will not run after all, or has run

  void add(std::shared_ptr<HostToDevice> arrival);
  void poke();  // there is something to look at; any thread, never blocks for long
  void stop();

  // Blocks the worker until there is something. Moves what is new to the end of `arrivals`, lets go of what callbacks
  // kept, and returns false once it should stop.
  bool wait(std::vector<std::shared_ptr<HostToDevice>>& arrivals);
  void release();  // lets go of what callbacks kept; the worker alone, and who has joined it

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool poked_ = false;
  bool stopping_ = false;
  std::vector<std::shared_ptr<HostToDevice>> added_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<std::shared_ptr<void>> released_;  // of `release`: its memory and that of `kept_` take turns
  std::vector<std::unique_ptr<Callback>> all_;
  std::vector<Callback*> idle_;
};

}  // namespace parablock
