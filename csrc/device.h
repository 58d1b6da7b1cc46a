// One GPU's copies: streams of their own beside the training's, positions in streams to wait for, and what is told to
// the host when a copy is done. Knows nothing of kernels; whoever launches them does so on `pack()`.
//
// Nothing here waits for the GPU except `synchronise` and `close`. One thread at a time may call a Device; its worker
// thread, which copies arriving bodies, is its own. No driver callback calls the driver, takes the GIL or frees memory.
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
  // On the context that is current. Copies are cut at about `copy_bytes`: each of a body's raises the watermark, and a
  // small copy of somebody else's waits for one of them at most.
  Device(std::shared_ptr<const Driver> driver, size_t copy_bytes);
  ~Device();  // as close
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  CudaStream pack() const { return streams_[kPack]; }  // encodes; at the lowest priority, so that training comes first
  CudaStream down() const { return streams_[kDown]; }  // device to host
  CudaStream up() const { return streams_[kUp]; }  // host to device

  // All throw DeviceError.
  std::shared_ptr<Mark> mark(CudaStream stream);  // where the stream stands now
  void wait(CudaStream stream, const Mark& mark);  // what is queued on the stream from now on comes after the mark
  // In pieces.
  void copy_to_device(DeviceAddress to, const void* from, size_t bytes, CudaStream stream);
  void copy_to_host(void* to, DeviceAddress from, size_t bytes, CudaStream stream);

  // Units [first, first + units) of a body, whose planes on the device begin at `scales` and `codes`, go to the
  // source's buffer behind what is on `down()`. The source is told of each chunk when it is there.
  void copy_units(const std::shared_ptr<DeviceToHost>& to_host, DeviceAddress scales, DeviceAddress codes,
                  uint64_t first, uint64_t units);
  // All of it is queued: `to_host` is done when `down()` gets here.
  void finish(const std::shared_ptr<DeviceToHost>& to_host);

  // The worker copies what arrives until all is there or it is cancelled. It begins after the mark `after`.
  void start(const std::shared_ptr<HostToDevice>& arrival);
  const std::shared_ptr<Mailbox>& mailbox() const { return mailbox_; }

  void check();  // throws when work on one of the streams has failed; never waits
  void synchronise();  // returns when every stream is idle
  void close();  // likewise, and ends the worker; bodies that have not come in full are given up. Idempotent

 private:
  enum Stream { kPack, kDown, kDownSignal, kUp, kUpSignal, kStreams };

  void notify_host(Stream signal, Stream stream, CudaEvent event, std::shared_ptr<void> keep, HostAction action,
                   uint64_t value);
  void work();
  bool advance(const std::shared_ptr<HostToDevice>& arrival);  // true when it is over

  std::shared_ptr<const Driver> driver_;
  CudaContext context_;
  size_t copy_bytes_;
  std::shared_ptr<EventPool> events_;
  std::shared_ptr<Mailbox> mailbox_;
  std::array<CudaStream, kStreams> streams_{};
  CudaEvent down_event_;  // recorded and waited for in one go, again and again; each thread has its own
  CudaEvent up_event_;
  bool closed_ = false;
  Thread worker_;
};

}  // namespace parablock
