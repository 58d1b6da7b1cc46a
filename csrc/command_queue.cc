#include "command_queue.h"

#include <utility>

namespace parablock {

bool CommandQueue::push(Command command) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return false;
    commands_.push_back(std::move(command));
  }
  loop_.wake();
  return true;
}

void CommandQueue::carry_out() {
  std::vector<Command> commands;
  {
    std::lock_guard lock(mutex_);
    commands.swap(commands_);
  }
  for (Command& command : commands) command();
}

void CommandQueue::close() {
  std::lock_guard lock(mutex_);
  closed_ = true;
  commands_.clear();
}

}  // namespace parablock
