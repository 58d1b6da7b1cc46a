#include "device.h"

#include <algorithm>

namespace parablock {

Device::Device(std::shared_ptr<const Driver> driver, size_t copy_bytes)
    : driver_(std::move(driver)),
      context_(driver_->current_context()),
      copy_bytes_(std::max<size_t>(copy_bytes, 1)),
      events_(std::make_shared<EventPool>(driver_, context_)),
      mailbox_(std::make_shared<Mailbox>()) {
  if (context_ == nullptr) throw DeviceError("expected a CUDA context, found none: use the GPU on this thread first");
  for (int i = 0; i < kStreams; ++i) streams_[i] = driver_->create_stream(i != kPack);
  down_event_ = events_->take();
  up_event_ = events_->take();
  worker_ = Thread("pb-device", [this] { work(); });
}

Device::~Device() { close(); }

std::shared_ptr<Mark> Device::mark(CudaStream stream) {
  ContextScope scope(*driver_, context_);
  auto mark = std::make_shared<Mark>(events_, events_->take());
  driver_->record(mark->event(), stream);
  return mark;
}

void Device::wait(CudaStream stream, const Mark& mark) {
  ContextScope scope(*driver_, context_);
  driver_->wait(stream, mark.event());
}

void Device::copy_to_device(DeviceAddress to, const void* from, size_t bytes, CudaStream stream) {
  ContextScope scope(*driver_, context_);
  for (size_t at = 0; at < bytes; at += copy_bytes_)
    driver_->copy_to_device(to + at, static_cast<const uint8_t*>(from) + at, std::min(copy_bytes_, bytes - at), stream);
}

void Device::copy_to_host(void* to, DeviceAddress from, size_t bytes, CudaStream stream) {
  ContextScope scope(*driver_, context_);
  for (size_t at = 0; at < bytes; at += copy_bytes_)
    driver_->copy_to_host(static_cast<uint8_t*>(to) + at, from + at, std::min(copy_bytes_, bytes - at), stream);
}

// A host function blocks the stream that runs it. So the copy stream only records an event, and a second stream waits
// for the event and runs the function while the next copy proceeds.
void Device::notify_host(Stream signal, Stream stream, CudaEvent event, std::shared_ptr<void> keep, HostAction action,
                         uint64_t value) {
  Mailbox::Callback* callback = mailbox_->callback(std::move(keep), action, value);
  try {
    driver_->record(event, streams_[stream]);
    driver_->wait(streams_[signal], event);
    driver_->launch(streams_[signal], &Mailbox::run, callback);
  } catch (...) {
    mailbox_->drop(callback);
    throw;
  }
}

void Device::copy_units(const std::shared_ptr<DeviceToHost>& to_host, DeviceAddress scales, DeviceAddress codes,
                        uint64_t first, uint64_t units) {
  ContextScope scope(*driver_, context_);
  Source& source = to_host->source();
  const Layout& layout = source.layout();
  uint8_t* host_scales = source.body();
  uint8_t* host_codes = host_scales + layout.units * layout.scale_bytes;
  uint64_t last = first + units;
  // The scales are small: one copy. The codes follow in pieces that end at chunk boundaries.
  if (layout.scale_bytes > 0)
    driver_->copy_to_host(host_scales + first * layout.scale_bytes, scales, units * layout.scale_bytes, down());
  uint64_t step =
      std::max<uint64_t>(copy_bytes_ / (uint64_t{layout.chunk_units} * layout.code_bytes), 1) * layout.chunk_units;
  for (uint64_t at = first; at < last;) {
    uint64_t next = std::min((at / step + 1) * step, last);
    driver_->copy_to_host(host_codes + at * layout.code_bytes, codes + (at - first) * layout.code_bytes,
                          (next - at) * layout.code_bytes, down());
    uint64_t ready = next == layout.units ? layout.chunks() : next / layout.chunk_units;
    notify_host(
        kDownSignal, kDown, down_event_, to_host,
        [](void* object, uint64_t value) { static_cast<DeviceToHost*>(object)->copied(value); }, ready);
    at = next;
  }
}

void Device::finish(const std::shared_ptr<DeviceToHost>& to_host) {
  ContextScope scope(*driver_, context_);
  notify_host(
      kDownSignal, kDown, down_event_, to_host,
      [](void* object, uint64_t) { static_cast<DeviceToHost*>(object)->finished(); }, 0);
}

void Device::start(const std::shared_ptr<HostToDevice>& arrival) { mailbox_->add(arrival); }

void Device::check() {
  ContextScope scope(*driver_, context_);
  for (CudaStream stream : streams_) driver_->check(stream);
}

void Device::synchronise() {
  ContextScope scope(*driver_, context_);
  for (CudaStream stream : streams_) driver_->synchronize(stream);
}

void Device::close() {
  if (closed_) return;
  closed_ = true;
  if (!worker_.is_of_this_process()) return worker_.join();  // a forked child has neither the worker nor the GPU
  mailbox_->stop();
  worker_.join();
  try {
    synchronise();
    ContextScope scope(*driver_, context_);
    for (CudaStream stream : streams_) driver_->destroy_stream(stream);
  } catch (const DeviceError&) {  // the device has failed: its context takes the streams with it
  }
  events_->give_back(down_event_);
  events_->give_back(up_event_);
  mailbox_->release();
}

// ---- The worker

void Device::work() {
  std::vector<std::shared_ptr<HostToDevice>> arrivals;
  bool going_on = true;
  while (going_on) {
    going_on = mailbox_->wait(arrivals);
    std::erase_if(arrivals, [&](const std::shared_ptr<HostToDevice>& arrival) {
      if (!going_on) arrival->cancel();
      try {
        ContextScope scope(*driver_, context_);
        return advance(arrival);
      } catch (const DeviceError& error) {
        arrival->failed(error.what());
        return true;
      }
    });
  }
}

bool Device::advance(const std::shared_ptr<HostToDevice>& pointer) {
  HostToDevice& arrival = *pointer;
  const Layout& layout = arrival.layout_;
  uint64_t received = arrival.cancelled_ ? 0 : arrival.watermark_->received();
  uint64_t chunks = received == layout.bytes() ? layout.chunks() : received / layout.chunk_bytes(0);
  uint64_t ready = std::min(chunks * layout.chunk_units, layout.units);
  if (ready > arrival.units_done_) {
    if (arrival.after_ != nullptr) driver_->wait(up(), arrival.after_->event());
    arrival.after_.reset();
    uint64_t from = arrival.units_done_;
    const uint8_t* scales = arrival.buffer_->data();
    const uint8_t* codes = scales + layout.units * layout.scale_bytes;
    arrival.units_done_ = ready;
    if (layout.scale_bytes > 0)
      driver_->copy_to_device(arrival.scales_ + from * layout.scale_bytes, scales + from * layout.scale_bytes,
                              (ready - from) * layout.scale_bytes, up());
    driver_->copy_to_device(arrival.codes_ + from * layout.code_bytes, codes + from * layout.code_bytes,
                            (ready - from) * layout.code_bytes, up());
  }
  bool complete = arrival.units_done_ == layout.units;
  if (!complete && !arrival.cancelled_) return false;
  // The callback's only purpose is to keep the buffer alive until the copies are done.
  if (arrival.units_done_ > 0) notify_host(kUpSignal, kUp, up_event_, pointer, [](void*, uint64_t) {}, 0);
  if (complete) arrival.finished(mark(up()));
  return true;
}

}  // namespace parablock
