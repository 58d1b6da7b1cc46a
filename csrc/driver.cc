#include "driver.h"

#include <dlfcn.h>

namespace parablock {
namespace {

// Values from cuda.h; they are part of the driver's binary interface.
constexpr int kSuccess = 0;
constexpr int kNotReady = 600;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kHostRegisterPortable = 1;

template <class Function>
void find(void* library, const std::string& path, const char* symbol, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, symbol));
  if (function == nullptr)
    throw DeviceError("expected a CUDA driver of version 11.0 or newer, found that " + path + " has no " + symbol +
                      "; update the NVIDIA driver, or train on the CPU");
}

}  // namespace

Driver::Driver(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr)
    throw DeviceError("expected the CUDA driver, found none (" + std::string(dlerror()) +
                      "); install the NVIDIA driver, or train on the CPU");
  find(handle, library, "cuDriverGetVersion", call_.DriverGetVersion);
  find(handle, library, "cuGetErrorName", call_.GetErrorName);
  find(handle, library, "cuGetErrorString", call_.GetErrorString);
  find(handle, library, "cuCtxGetCurrent", call_.CtxGetCurrent);
  find(handle, library, "cuCtxSetCurrent", call_.CtxSetCurrent);
  find(handle, library, "cuCtxGetStreamPriorityRange", call_.CtxGetStreamPriorityRange);
  find(handle, library, "cuStreamCreateWithPriority", call_.StreamCreateWithPriority);
  find(handle, library, "cuStreamDestroy_v2", call_.StreamDestroy);
  find(handle, library, "cuStreamQuery", call_.StreamQuery);
  find(handle, library, "cuStreamSynchronize", call_.StreamSynchronize);
  find(handle, library, "cuStreamWaitEvent", call_.StreamWaitEvent);
  find(handle, library, "cuEventCreate", call_.EventCreate);
  find(handle, library, "cuEventDestroy_v2", call_.EventDestroy);
  find(handle, library, "cuEventRecord", call_.EventRecord);
  find(handle, library, "cuMemcpyHtoDAsync_v2", call_.MemcpyHtoDAsync);
  find(handle, library, "cuMemcpyDtoHAsync_v2", call_.MemcpyDtoHAsync);
  find(handle, library, "cuLaunchHostFunc", call_.LaunchHostFunc);
  find(handle, library, "cuMemHostRegister_v2", call_.MemHostRegister);
  find(handle, library, "cuMemHostUnregister", call_.MemHostUnregister);
  require(call_.DriverGetVersion(&version_), "asking for the driver's version");
}

void Driver::require(int result, const char* what) const {
  if (result == kSuccess) return;
  const char* name = nullptr;
  const char* text = nullptr;
  call_.GetErrorName(result, &name);
  call_.GetErrorString(result, &text);
  throw DeviceError(std::string(what) + " failed: " + (name == nullptr ? "unknown error" : name) + " (" +
                    (text == nullptr ? std::to_string(result) : text) + ")");
}

CudaContext Driver::current_context() const {
  CudaContext context = nullptr;
  require(call_.CtxGetCurrent(&context), "asking for the CUDA context");
  return context;
}

void Driver::set_context(CudaContext context) const {
  require(call_.CtxSetCurrent(context), "making the CUDA context current");
}

CudaStream Driver::create_stream(bool urgent) const {
  int least = 0;
  int greatest = 0;
  require(call_.CtxGetStreamPriorityRange(&least, &greatest), "asking for the stream priorities");
  CudaStream stream = nullptr;
  require(call_.StreamCreateWithPriority(&stream, kStreamNonBlocking, urgent ? greatest : least), "making a stream");
  return stream;
}

CudaEvent Driver::create_event() const {
  CudaEvent event = nullptr;
  require(call_.EventCreate(&event, kEventDisableTiming), "making an event");
  return event;
}

void Driver::record(CudaEvent event, CudaStream stream) const {
  require(call_.EventRecord(event, stream), "recording an event");
}

void Driver::wait(CudaStream stream, CudaEvent event) const {
  require(call_.StreamWaitEvent(stream, event, 0), "letting a stream wait");
}

void Driver::copy_to_device(DeviceAddress to, const void* from, size_t bytes, CudaStream stream) const {
  require(call_.MemcpyHtoDAsync(to, from, bytes, stream), "copying to the GPU");
}

void Driver::copy_to_host(void* to, DeviceAddress from, size_t bytes, CudaStream stream) const {
  require(call_.MemcpyDtoHAsync(to, from, bytes, stream), "copying from the GPU");
}

void Driver::launch(CudaStream stream, HostFunction function, void* argument) const {
  require(call_.LaunchHostFunc(stream, function, argument), "queueing a host callback");
}

void Driver::synchronize(CudaStream stream) const { require(call_.StreamSynchronize(stream), "waiting for a stream"); }

void Driver::check(CudaStream stream) const {
  int result = call_.StreamQuery(stream);
  if (result != kNotReady) require(result, "work on the GPU");
}

void Driver::pin(void* memory, size_t bytes) const {
  require(call_.MemHostRegister(memory, bytes, kHostRegisterPortable), "pinning host memory");
}

void Driver::unpin(void* memory) const noexcept { call_.MemHostUnregister(memory); }
void Driver::destroy_stream(CudaStream stream) const noexcept { call_.StreamDestroy(stream); }
void Driver::destroy_event(CudaEvent event) const noexcept { call_.EventDestroy(event); }

ContextScope::ContextScope(const Driver& driver, CudaContext context)
    : driver_(driver), before_(driver.current_context()), changed_(before_ != context) {
  if (changed_) driver_.set_context(context);
}

ContextScope::~ContextScope() {
  if (!changed_) return;
  try {
    driver_.set_context(before_);
  } catch (const DeviceError&) {  // the driver is shutting down
  }
}

}  // namespace parablock
