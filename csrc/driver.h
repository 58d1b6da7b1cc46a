// The CUDA driver, loaded at run time: building needs no CUDA, and on a machine without the driver only GPU staging is
// missing. Declares the few functions that staging needs, under the driver's names without their "cu".
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace parablock {

// The driver is missing or too old, or refused a call; `what` has the driver's own text.
class DeviceError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

using CudaContext = void*;
using CudaStream = void*;
using CudaEvent = void*;
using DeviceAddress = uint64_t;
using HostFunction = void (*)(void*);

class Driver {
 public:
  // Throws DeviceError when there is no such library or it lacks a function.
  explicit Driver(const std::string& library = "libcuda.so.1");
  ~Driver() = default;  // the library stays loaded: its threads may still run
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  int version() const { return version_; }  // 12040 is CUDA 12.4

  // Each throws DeviceError. Functions that use a context need it to be current: see ContextScope.
  CudaContext current_context() const;
  void set_context(CudaContext context) const;
  CudaStream create_stream(bool urgent) const;  // non-blocking; urgent: highest priority, else lowest
  CudaEvent create_event() const;  // without timing
  void record(CudaEvent event, CudaStream stream) const;
  void wait(CudaStream stream, CudaEvent event) const;
  void copy_to_device(DeviceAddress to, const void* from, size_t bytes, CudaStream stream) const;
  void copy_to_host(void* to, DeviceAddress from, size_t bytes, CudaStream stream) const;
  void launch(CudaStream stream, HostFunction function, void* argument) const;
  void synchronize(CudaStream stream) const;
  void check(CudaStream stream) const;  // throws when work on the stream has failed; never waits
  void pin(void* memory, size_t bytes) const;

  // For destructors: errors are ignored, since a driver that is shutting down refuses these calls.
  void unpin(void* memory) const noexcept;
  void destroy_stream(CudaStream stream) const noexcept;
  void destroy_event(CudaEvent event) const noexcept;

 private:
  struct Functions {
    int (*DriverGetVersion)(int*);
    int (*GetErrorName)(int, const char**);
    int (*GetErrorString)(int, const char**);
    int (*CtxGetCurrent)(CudaContext*);
    int (*CtxSetCurrent)(CudaContext);
    int (*CtxGetStreamPriorityRange)(int*, int*);
    int (*StreamCreateWithPriority)(CudaStream*, unsigned, int);
    int (*StreamDestroy)(CudaStream);
    int (*StreamQuery)(CudaStream);
    int (*StreamSynchronize)(CudaStream);
    int (*StreamWaitEvent)(CudaStream, CudaEvent, unsigned);
    int (*EventCreate)(CudaEvent*, unsigned);
    int (*EventDestroy)(CudaEvent);
    int (*EventRecord)(CudaEvent, CudaStream);
    int (*MemcpyHtoDAsync)(DeviceAddress, const void*, size_t, CudaStream);
    int (*MemcpyDtoHAsync)(void*, DeviceAddress, size_t, CudaStream);
    int (*LaunchHostFunc)(CudaStream, HostFunction, void*);
    int (*MemHostRegister)(void*, size_t, unsigned);
    int (*MemHostUnregister)(void*);
  };

  void require(int result, const char* what) const;

  Functions call_{};
  int version_ = 0;
};

// Makes a context current on this thread while it lives, then restores the previous one.
class ContextScope {
 public:
  ContextScope(const Driver& driver, CudaContext context);
  ~ContextScope();
  ContextScope(const ContextScope&) = delete;
  ContextScope& operator=(const ContextScope&) = delete;

 private:
  const Driver& driver_;
  CudaContext before_;
  bool changed_;
};

}  // namespace parablock
