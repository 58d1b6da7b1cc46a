#include "device_transfer.h"

#include <chrono>
#include <utility>

#include "socket.h"

namespace parablock {

EventPool::EventPool(std::shared_ptr<const Driver> driver, CudaContext context)
    : driver_(std::move(driver)), context_(context) {}

EventPool::~EventPool() {
  try {
    ContextScope scope(*driver_, context_);
    for (CudaEvent event : idle_) driver_->destroy_event(event);
  } catch (const DeviceError&) {  // the driver is shutting down and frees everything
  }
}

CudaEvent EventPool::take() {
  {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      CudaEvent event = idle_.back();
      idle_.pop_back();
      return event;
    }
  }
  return driver_->create_event();
}

void EventPool::give_back(CudaEvent event) {
  std::lock_guard lock(mutex_);
  idle_.push_back(event);
}

DeviceToHost::DeviceToHost(std::shared_ptr<Source> source, std::shared_ptr<Ring> ring, TransferKey key)
    : source_(std::move(source)),
      ring_(std::move(ring)),
      key_(key),
      started_ns_(monotonic_ns()),
      last_copied_ns_(started_ns_) {}

void DeviceToHost::copied(uint64_t chunks) {
  int64_t now_ns = monotonic_ns();
  if (first_copied_ns_ == 0) first_copied_ns_ = now_ns;
  Recorder recorder{.ring = ring_.get()};
  for (; recorder && copied_ < chunks; ++copied_) {
    uint32_t bytes = source_->layout().chunk_bytes(copied_);
    recorder.note(Stage::kCopy, key_, copied_, bytes, last_copied_ns_, now_ns);
    int64_t start_ns = monotonic_ns();
    source_->chunk_crc(copied_);  // computed here to be timed; `raise` would compute it untimed
    recorder.note(Stage::kChecksum, key_, copied_, bytes, start_ns, monotonic_ns());
  }
  last_copied_ns_ = now_ns;
  source_->raise(chunks);
}

bool DeviceToHost::wait(int64_t timeout_ns) {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return done_; });
}

void DeviceToHost::finished() {
  {
    std::lock_guard lock(mutex_);
    done_ = true;
    finished_ns_ = monotonic_ns();
  }
  changed_.notify_all();
}

HostToDevice::HostToDevice(const std::shared_ptr<Mailbox>& mailbox, std::shared_ptr<Buffer> buffer,
                           const Layout& layout, DeviceAddress scales, DeviceAddress codes, std::shared_ptr<Mark> after)
    : mailbox_(mailbox),
      buffer_(std::move(buffer)),
      layout_(layout),
      scales_(scales),
      codes_(codes),
      after_(std::move(after)),
      watermark_(std::make_shared<Watermark>([mailbox] { mailbox->poke(); })) {
  layout_.check(buffer_->size());
}

std::shared_ptr<Mark> HostToDevice::wait(int64_t timeout_ns) {
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return mark_ != nullptr || !error_.empty(); });
  if (!error_.empty()) throw DeviceError(error_);
  return mark_;
}

void HostToDevice::cancel() {
  cancelled_ = true;
  mailbox_->poke();
}

void HostToDevice::finished(std::shared_ptr<Mark> mark) {
  {
    std::lock_guard lock(mutex_);
    mark_ = std::move(mark);
  }
  changed_.notify_all();
}

void HostToDevice::failed(std::string why) {
  {
    std::lock_guard lock(mutex_);
    error_ = std::move(why);
  }
  changed_.notify_all();
}

}  // namespace parablock
