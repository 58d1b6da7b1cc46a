// A libnvidia-ml.so.1 for machines without a driver: what pynvml calls, with the types and units of NVIDIA's
// documentation of NVML. Two GPUs; the second is of a kind that reports neither power nor PCIe throughput. Once the
// file named by FAKE_NVML_LOST exists, both have fallen off the bus.
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

namespace {

enum Return { kSuccess = 0, kUninitialized = 1, kInvalidArgument = 2, kNotSupported = 3, kGpuIsLost = 15 };

struct Gpu {
  unsigned index;
} gpus[2] = {{0}, {1}};

bool initialised = false;

int state(const void* gpu) {
  if (!initialised) return kUninitialized;
  if (gpu != &gpus[0] && gpu != &gpus[1]) return kInvalidArgument;
  const char* lost = std::getenv("FAKE_NVML_LOST");
  return lost != nullptr && access(lost, F_OK) == 0 ? kGpuIsLost : kSuccess;
}

}  // namespace

extern "C" {

struct nvmlUtilization {
  unsigned gpu;     // percent
  unsigned memory;  // percent
};

struct nvmlMemory {
  unsigned long long total;  // bytes, all three
  unsigned long long free;
  unsigned long long used;
};

int nvmlInitWithFlags(unsigned) {
  initialised = true;
  return kSuccess;
}

const char* nvmlErrorString(int) { return "an error of the fake"; }

int nvmlDeviceGetCount_v2(unsigned* count) {
  *count = 2;
  return initialised ? kSuccess : kUninitialized;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** gpu) {
  if (index >= 2) return kInvalidArgument;
  *gpu = &gpus[index];
  return kSuccess;
}

int nvmlDeviceGetUtilizationRates(void* gpu, nvmlUtilization* rates) {
  if (int error = state(gpu)) return error;
  *rates = {61 + static_cast<Gpu*>(gpu)->index, 17};
  return kSuccess;
}

int nvmlDeviceGetMemoryInfo(void* gpu, nvmlMemory* memory) {
  if (int error = state(gpu)) return error;
  *memory = {141ull << 30, 100ull << 30, 41ull << 30};
  return kSuccess;
}

int nvmlDeviceGetPowerUsage(void* gpu, unsigned* milliwatts) {
  if (int error = state(gpu)) return error;
  if (gpu == &gpus[1]) return kNotSupported;
  *milliwatts = 312'500;
  return kSuccess;
}

int nvmlDeviceGetClockInfo(void* gpu, int type, unsigned* mhz) {
  if (int error = state(gpu)) return error;
  if (type != 1 && type != 2) return kInvalidArgument;
  *mhz = type == 1 ? 1980 : 3201;  // SM, memory
  return kSuccess;
}

int nvmlDeviceGetPcieThroughput(void* gpu, int counter, unsigned* kib_per_second) {
  if (int error = state(gpu)) return error;
  if (gpu == &gpus[1]) return kNotSupported;
  if (counter != 0 && counter != 1) return kInvalidArgument;
  *kib_per_second = counter == 0 ? 2000 : 50'000;  // sent by the GPU, received by it
  return kSuccess;
}
}
