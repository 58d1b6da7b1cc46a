// Copies between one GPU and the host: streams apart from the training stream, marks to wait for positions in streams,
// and callbacks when a copy is done. Launches no kernels; the caller launches them on `pack()`.
//
// Only `synchronise` and `close` wait for the GPU. One thread at a time may call a Device. The Device owns a worker
// thread, which copies arriving bodies. No driver callback calls the driver, takes the GIL or frees memory.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "device_transfer.h"
#include "driver.h"
#include "mailbox.h"
#include "thread.h"
#include "transfer.h"

namespace parablock {

class Device {
 public:
  // Uses the current context. Cuts copies at about `copy_bytes`: after each piece of a body the watermark rises, and a
  // small copy from other code waits for at most one piece.
  Device(std::shared_ptr<const Driver> driver, size_t copy_bytes);
  ~Device();  // calls close
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CudaStream pack() const { return streams_[kPack]; }  // encodes; at the lowest priority, so that training comes first
  CudaStream down() const { return streams_[kDown]; }  // device to host
  CudaStream up() const { return streams_[kUp]; }  // host to device

  // All throw DeviceError.
  std::shared_ptr<Mark> mark(CudaStream stream);  // the stream's current position
  void wait(CudaStream stream, const Mark& mark);  // work queued on the stream from now on runs after the mark
  // In pieces of `copy_bytes`.
  void copy_to_device(DeviceAddress to, const void* from, size_t bytes, CudaStream stream);
  void copy_to_host(void* to, DeviceAddress from, size_t bytes, CudaStream stream);

  // Queues on `down()` the copy of units [first, first + units) of a body to the source's buffer. `scales` and `codes`
  // are the addresses of these units' planes on the device. The source's watermark rises as chunks arrive.
  void copy_units(const std::shared_ptr<DeviceToHost>& to_host, DeviceAddress scales, DeviceAddress codes,
                  uint64_t first, uint64_t units);
  // Call when all copies are queued: `to_host` is done when `down()` reaches this position.
  void finish(const std::shared_ptr<DeviceToHost>& to_host);

  // The worker copies the body to the device as it arrives, until it is complete or cancelled; not before its `after`
  // mark is reached.
  void start(const std::shared_ptr<HostToDevice>& arrival);
  const std::shared_ptr<Mailbox>& mailbox() const { return mailbox_; }

  void check();  // throws when work on one of the streams has failed; never waits
  void synchronise();  // returns when every stream is idle
  void close();  // also ends the worker and cancels bodies that have not arrived in full; idempotent

 private:
  enum Stream { kPack, kDown, kDownSignal, kUp, kUpSignal, kStreams };

  void notify_host(Stream signal, Stream stream, CudaEvent event, std::shared_ptr<void> keep, HostAction action,
                   uint64_t value);
  void work();
  bool advance(const std::shared_ptr<HostToDevice>& arrival);  // true when complete or cancelled

  std::shared_ptr<const Driver> driver_;
  CudaContext context_;
  size_t copy_bytes_;
  std::shared_ptr<EventPool> events_;
  std::shared_ptr<Mailbox> mailbox_;
  std::array<CudaStream, kStreams> streams_{};
  CudaEvent down_event_;  // reused: a stream waits for it right after each record; one event per calling thread
  CudaEvent up_event_;
  bool closed_ = false;
  Thread worker_;
};

}  // namespace parablock
