#include "mailbox.h"

#include <utility>

#include "device_transfer.h"

namespace parablock {

Mailbox::Callback* Mailbox::callback(std::shared_ptr<void> keep, HostAction action, uint64_t value) {
  std::lock_guard lock(mutex_);
  if (idle_.empty()) {
    all_.push_back(std::make_unique<Callback>());
    idle_.reserve(all_.size());
    idle_.push_back(all_.back().get());
  }
  // Reserved here, because `drop` runs in the driver's thread and must not allocate. A Callback that is reused before
  // the worker has released its previous object needs two places, one from each term.
  kept_.reserve(kept_.size() + all_.size());
  Callback* callback = idle_.back();
  idle_.pop_back();
  *callback = {shared_from_this(), std::move(keep), action, value};
  return callback;
}

void Mailbox::run(void* argument) {
  auto* callback = static_cast<Callback*>(argument);
  callback->action(callback->keep.get(), callback->value);
  callback->mailbox->drop(callback);
}

void Mailbox::drop(Callback* callback) {
  std::shared_ptr<Mailbox> self = std::move(callback->mailbox);  // never the last: the Device waits for its callbacks
  {
    std::lock_guard lock(mutex_);
    kept_.push_back(std::move(callback->keep));
    idle_.push_back(callback);
    poked_ = true;
  }
  changed_.notify_one();
}

void Mailbox::add(std::shared_ptr<HostToDevice> arrival) {
  {
    std::lock_guard lock(mutex_);
    added_.push_back(std::move(arrival));
    poked_ = true;
  }
  changed_.notify_one();
}

void Mailbox::poke() {
  {
    std::lock_guard lock(mutex_);
    poked_ = true;
  }
  changed_.notify_one();
}

void Mailbox::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_one();
}

bool Mailbox::wait(std::vector<std::shared_ptr<HostToDevice>>& arrivals) {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return poked_ || stopping_; });
    poked_ = false;
    for (auto& arrival : added_) arrivals.push_back(std::move(arrival));
    added_.clear();
    if (stopping_) return false;
  }
  release();
  return true;
}

void Mailbox::release() {
  {
    std::lock_guard lock(mutex_);
    kept_.swap(released_);
    kept_.reserve(released_.capacity());  // keeps the room that `callback` reserved for callbacks still to come
  }
  released_.clear();
}

}  // namespace parablock
