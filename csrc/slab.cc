#include "slab.h"

#include <sys/mman.h>

#include <algorithm>
#include <iterator>

namespace parablock {
namespace {

constexpr size_t kPage = 4096;

size_t pages(size_t bytes) { return (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage; }

}  // namespace

Slab::Slab(std::shared_ptr<const Driver> driver, size_t bytes)
    : driver_(std::move(driver)), context_(driver_->current_context()), memory_(pages(bytes)) {
  // A fork, for example of data loader workers, would copy all of the memory at once: pages that a device may write
  // cannot be shared copy-on-write. Should the kernel refuse the advice, a fork makes that copy.
  madvise(memory_.data(), memory_.size(), MADV_DONTFORK);
  driver_->pin(memory_.data(), memory_.size());
  free_[0] = memory_.size();
}

Slab::~Slab() {
  try {
    ContextScope scope(*driver_, context_);
    driver_->unpin(memory_.data());
  } catch (const DeviceError&) {  // the driver is shutting down and frees everything
  }
}

std::shared_ptr<Buffer> Slab::take(size_t bytes) {
  size_t wanted = pages(bytes);
  std::lock_guard lock(mutex_);
  auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& run) { return run.second >= wanted; });
  if (found == free_.end()) return nullptr;
  auto [offset, length] = *found;
  free_.erase(found);
  if (length > wanted) free_[offset + wanted] = length - wanted;
  used_ += wanted;
  return std::make_shared<Buffer>(memory_.data() + offset, bytes,
                                  [slab = shared_from_this(), offset, wanted] { slab->give_back(offset, wanted); });
}

void Slab::give_back(size_t offset, size_t bytes) {
  std::lock_guard lock(mutex_);
  used_ -= bytes;
  auto next = free_.upper_bound(offset);
  if (next != free_.end() && offset + bytes == next->first) {
    bytes += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += bytes;
      return;
    }
  }
  free_[offset] = bytes;
}

size_t Slab::used() const {
  std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace parablock
