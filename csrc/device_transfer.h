// A body between a GPU and the host buffer that the network uses: DeviceToHost on its way out, HostToDevice on its way
// in. Both keep the host side's memory until the last copy has been made; the device's memory is the caller's to keep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"
#include "mailbox.h"
#include "ring.h"
#include "transfer.h"

namespace parablock {

// Events that are used again. May outlive its Device; the last owner must not go in a driver callback.
class EventPool {
 public:
  EventPool(std::shared_ptr<const Driver> driver, CudaContext context);
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  CudaEvent take();  // the context must be current
  void give_back(CudaEvent event);

 private:
  std::shared_ptr<const Driver> driver_;
  CudaContext context_;
  std::mutex mutex_;
  std::vector<CudaEvent> idle_;
};

// A position in a stream that other streams can wait for.
class Mark {
 public:
  Mark(std::shared_ptr<EventPool> pool, CudaEvent event) : pool_(std::move(pool)), event_(event) {}
  ~Mark() { pool_->give_back(event_); }
  Mark(const Mark&) = delete;
  Mark& operator=(const Mark&) = delete;

  CudaEvent event() const { return event_; }

 private:
  std::shared_ptr<EventPool> pool_;
  CudaEvent event_;
};

class DeviceToHost {
 public:
  // `ring`: where each chunk that is on the host is noted, as of `key`; may be null.
  DeviceToHost(std::shared_ptr<Source> source, std::shared_ptr<Ring> ring, TransferKey key);

  Source& source() { return *source_; }
  bool wait(int64_t timeout_ns);  // true once everything queued before `Device::finish` is on the host
  int64_t started_ns() const { return started_ns_; }
  int64_t first_copied_ns() const { return first_copied_ns_; }  // as the next
  int64_t finished_ns() const { return finished_ns_; }  // valid once done

  // In driver callbacks, one after the other.
  void copied(uint64_t chunks);  // so many are on the host, from the first
  void finished();

 private:
  std::shared_ptr<Source> source_;
  std::shared_ptr<Ring> ring_;
  TransferKey key_;
  int64_t started_ns_;
  int64_t first_copied_ns_ = 0;
  int64_t last_copied_ns_;
  uint64_t copied_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  int64_t finished_ns_ = 0;
};

class HostToDevice {
 public:
  // The planes on the device begin at `scales` and `codes`. `after` may be null: they are free already.
  HostToDevice(const std::shared_ptr<Mailbox>& mailbox, std::shared_ptr<Buffer> buffer, const Layout& layout,
               DeviceAddress scales, DeviceAddress codes, std::shared_ptr<Mark> after);

  const std::shared_ptr<Watermark>& watermark() const { return watermark_; }

  // The mark behind the last copy, once all are queued; null after `timeout_ns`. Throws DeviceError when one failed.
  std::shared_ptr<Mark> wait(int64_t timeout_ns);
  void cancel();  // nothing more is copied

 private:
  friend class Device;  // whose worker alone uses the rest
  void finished(std::shared_ptr<Mark> mark);
  void failed(std::string why);

  std::shared_ptr<Mailbox> mailbox_;
  std::shared_ptr<Buffer> buffer_;
  Layout layout_;
  DeviceAddress scales_;
  DeviceAddress codes_;
  std::shared_ptr<Mark> after_;
  std::shared_ptr<Watermark> watermark_;
  std::atomic<bool> cancelled_{false};
  uint64_t units_done_ = 0;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::shared_ptr<Mark> mark_;
  std::string error_;
};

}  // namespace parablock
