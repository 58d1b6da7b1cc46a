// The transfer of a body between a GPU and the host buffer that the network uses: DeviceToHost for outgoing bodies,
// HostToDevice for incoming ones. Both keep the host memory alive until the last copy is done; the caller keeps the
// device memory alive.
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

// A pool of reusable events. May outlive its Device; must not be destroyed in a driver callback.
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
  // `ring` gets a record of each copied chunk, under `key`; may be null.
  DeviceToHost(std::shared_ptr<Source> source, std::shared_ptr<Ring> ring, TransferKey key);

  Source& source() { return *source_; }
  bool wait(int64_t timeout_ns);  // true once everything queued before `Device::finish` is on the host
  int64_t started_ns() const { return started_ns_; }
  int64_t first_copied_ns() const { return first_copied_ns_; }  // both valid once done
  int64_t finished_ns() const { return finished_ns_; }

  // Called from driver callbacks, one at a time.
  void copied(uint64_t chunks);  // the first `chunks` chunks are on the host
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
  // The planes on the device begin at `scales` and `codes`, and are free after the mark `after`; null: free now.
  HostToDevice(const std::shared_ptr<Mailbox>& mailbox, std::shared_ptr<Buffer> buffer, const Layout& layout,
               DeviceAddress scales, DeviceAddress codes, std::shared_ptr<Mark> after);

  const std::shared_ptr<Watermark>& watermark() const { return watermark_; }

  // Waits until all copies are queued and returns the mark behind the last one; null after `timeout_ns`. Throws
  // DeviceError when a copy failed.
  std::shared_ptr<Mark> wait(int64_t timeout_ns);
  void cancel();  // nothing more is copied

 private:
  friend class Device;  // only its worker uses the rest
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
