// Commands from any thread to the loop thread, which carries them out in order.
#pragma once

#include <functional>
#include <mutex>
#include <vector>

#include "loop.h"

namespace parablock {

class CommandQueue {
 public:
  using Command = std::function<void()>;

  explicit CommandQueue(Loop& loop) : loop_(loop) {}  // each command wakes the loop

  bool push(Command command);  // any thread; false once the queue is closed
  void carry_out();            // loop thread only: runs every queued command
  void close();  // after the loop has ended; releases the buffers of transfers that came too late

 private:
  Loop& loop_;
  std::mutex mutex_;
  std::vector<Command> commands_;
  bool closed_ = false;
};

}  // namespace parablock
