#include "mailbox.h"

#include <utility>

#include "device_transfer.h"

namespace parablock {

Mailbox::Errand* Mailbox::errand(std::shared_ptr<void> keep, HostAction action, uint64_t value) {
  std::lock_guard lock(mutex_);
  if (idle_.empty()) {
    all_.push_back(std::make_unique<Errand>());
    idle_.push_back(all_.back().get());
    kept_.reserve(kept_.size() + all_.size());
  }
  Errand* errand = idle_.back();
  idle_.pop_back();
  *errand = {shared_from_this(), std::move(keep), action, value};
  return errand;
}

void Mailbox::run(void* argument) {
  auto* errand = static_cast<Errand*>(argument);
  errand->action(errand->keep.get(), errand->value);
  errand->mailbox->drop(errand);
}

void Mailbox::drop(Errand* errand) {
  std::shared_ptr<Mailbox> self = std::move(errand->mailbox);  // never the last: the Device waits for its callbacks
  {
    std::lock_guard lock(mutex_);
    kept_.push_back(std::move(errand->keep));
    idle_.push_back(errand);
    poked_ = true;
  }
  changed_.notify_one();
}

void Mailbox::add(std::shared_ptr<Upload> upload) {
  {
    std::lock_guard lock(mutex_);
    added_.push_back(std::move(upload));
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

bool Mailbox::wait(std::vector<std::shared_ptr<Upload>>& uploads) {
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return poked_ || stopping_; });
    poked_ = false;
    for (auto& upload : added_) uploads.push_back(std::move(upload));
    added_.clear();
    if (stopping_) return false;
  }
  release();
  return true;
}

void Mailbox::release() {
  std::vector<std::shared_ptr<void>> kept;
  {
    std::lock_guard lock(mutex_);
    kept.swap(kept_);
  }
}

}  // namespace parablock
