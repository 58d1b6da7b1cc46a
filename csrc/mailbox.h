// The queue to a Device's worker: driver callbacks and other threads announce ended callbacks, new bodies and arrivals.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace parablock {

class HostToDevice;

using HostAction = void (*)(void* object, uint64_t value);

// A driver callback must neither call the driver nor free an object whose destructor might. So the mailbox hands each
// object that a callback kept alive to the worker, which releases it.
class Mailbox : public std::enable_shared_from_this<Mailbox> {
 public:
  // The argument that the driver passes to `run`, which calls `action(keep.get(), value)` once.
  struct Callback {
    std::shared_ptr<Mailbox> mailbox;
    std::shared_ptr<void> keep;
    HostAction action;
    uint64_t value;
  };
  static void run(void* callback);  // the driver calls this

  Callback* callback(std::shared_ptr<void> keep, HostAction action, uint64_t value);  // from a warm pool
  void drop(Callback* callback);  // the callback has run, or will not run after all

  void add(std::shared_ptr<HostToDevice> arrival);
  void poke();  // wakes the worker; any thread, never blocks for long
  void stop();

  // Worker only. Blocks until woken, appends new arrivals to `arrivals`, releases what callbacks kept alive, and
  // returns false once the worker must stop.
  bool wait(std::vector<std::shared_ptr<HostToDevice>>& arrivals);
  void release();  // releases what callbacks kept alive; only the worker thread, or the thread that joined it

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool poked_ = false;
  bool stopping_ = false;
  std::vector<std::shared_ptr<HostToDevice>> added_;
  std::vector<std::shared_ptr<void>> kept_;
  std::vector<std::shared_ptr<void>> released_;  // used by `release`; swaps its memory with `kept_`
  std::vector<std::unique_ptr<Callback>> all_;
  std::vector<Callback*> idle_;
};

}  // namespace parablock
