// What the loop thread is asked to do, by any thread, in the order in which it was asked.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "loop.h"

namespace parablock {

class CommandQueue {
 public:
  using Command = std::function<void()>;

  explicit CommandQueue(Loop& loop) : loop_(loop) {}  // woken for each command

  bool push(Command command);  // any thread; false once the queue is closed
  void carry_out();            // loop thread only: everything that is there
  void close();  // once no loop carries them out; lets go of the buffers of transfers that came too late

 private:
  Loop& loop_;
  std::mutex mutex_;
  std::vector<Command> commands_;
  bool closed_ = false;
};

}  // namespace parablock
