// A stand-in for libcuda.so.1 on a machine without a GPU: streams are threads, device memory is host memory, and every
// operation runs when its turn in its stream comes, not when it was queued. Delays and failures are injected; what a
// real driver forbids (calls from a callback, memory that goes while it is pinned) is counted. Where the library is
// preloaded (LD_PRELOAD), so is what a callback allocates.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>

namespace {

constexpr int kSuccess = 0, kInvalid = 1, kOutOfMemory = 2, kNotReady = 600, kLaunchFailed = 719;

std::mutex settings_mutex;
int64_t delay_us = 0;
std::mt19937 random_numbers{0};
std::string failing;
int failing_after = 0;
int failing_code = 0;
std::map<std::string, int64_t> calls;
std::map<uintptr_t, size_t> pinned;
int64_t violations = 0;
int64_t unpinned_copies = 0;
int64_t largest_copy = 0;
bool broken = false;  // as after an error in a kernel: nothing runs any more
thread_local bool in_callback = false;
std::atomic<int64_t> allocations{0};  // in callbacks
thread_local void* current = nullptr;

int enter(const char* function) {
  std::lock_guard lock(settings_mutex);
  ++calls[function];
  if (in_callback) ++violations;
  if (broken) return kLaunchFailed;
  if (failing == function && failing_after-- <= 0) return failing_code;
  return kSuccess;
}

void nap() {
  int64_t us = 0;
  {
    std::lock_guard lock(settings_mutex);
    if (delay_us > 0) us = static_cast<int64_t>(random_numbers() % static_cast<uint64_t>(delay_us));
  }
  if (us > 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
}

struct Point {  // what an event stood for when it was recorded
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;

  void pass() {
    {
      std::lock_guard lock(mutex);
      passed = true;
    }
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return passed; });
  }
};

struct Event {
  std::mutex mutex;
  std::shared_ptr<Point> last;
};

class Stream {
 public:
  explicit Stream(int priority) : priority(priority), thread_([this] { run(); }) {}
  ~Stream() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void push(std::function<void()> operation) {
    {
      std::lock_guard lock(mutex_);
      operations_.push_back(std::move(operation));
    }
    changed_.notify_all();
  }
  bool idle() {
    std::lock_guard lock(mutex_);
    return operations_.empty() && !busy_;
  }
  void synchronise() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return operations_.empty() && !busy_; });
  }

  const int priority;

 private:
  void run() {
    std::unique_lock lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || !operations_.empty(); });
      if (operations_.empty()) return;
      auto operation = std::move(operations_.front());
      operations_.pop_front();
      busy_ = true;
      lock.unlock();
      nap();
      bool runs;
      {
        std::lock_guard settings(settings_mutex);
        runs = !broken;
      }
      if (runs) operation();
      operation = nullptr;
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> operations_;
  bool busy_ = false;
  bool stopping_ = false;
  std::thread thread_;
};

// The stream 0 is the host itself: what is queued on it happens at once.
void queue(void* stream, std::function<void()> operation) {
  if (stream == nullptr) {
    operation();
  } else {
    static_cast<Stream*>(stream)->push(std::move(operation));
  }
}

bool is_pinned(const void* memory, size_t bytes) {
  auto address = reinterpret_cast<uintptr_t>(memory);
  auto above = pinned.upper_bound(address);
  if (above == pinned.begin()) return false;
  --above;
  return address + bytes <= above->first + above->second;
}

void note_copy(const void* host, size_t bytes) {
  std::lock_guard lock(settings_mutex);
  if (!is_pinned(host, bytes)) ++unpinned_copies;
  largest_copy = std::max(largest_copy, static_cast<int64_t>(bytes));
}

}  // namespace

// In the place of the library's own for everything that is loaded after this one.
void* operator new(size_t bytes) {
  if (in_callback) ++allocations;
  if (void* memory = std::malloc(std::max<size_t>(bytes, 1))) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

extern "C" {

int cuDriverGetVersion(int* version) {
  *version = 12040;
  return enter("cuDriverGetVersion");
}
int cuGetErrorName(int code, const char** name) {
  *name = code == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == kInvalid   ? "CUDA_ERROR_INVALID_VALUE"
                               : "CUDA_ERROR_LAUNCH_FAILED";
  return kSuccess;
}
int cuGetErrorString(int code, const char** text) {
  *text = code == kOutOfMemory ? "out of memory" : code == kInvalid ? "invalid argument" : "unspecified launch failure";
  return kSuccess;
}
int cuCtxGetCurrent(void** context) {
  *context = current;
  return enter("cuCtxGetCurrent");
}
int cuCtxSetCurrent(void* context) {
  current = context;
  return enter("cuCtxSetCurrent");
}
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return enter("cuCtxGetStreamPriorityRange");
}
int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  if (int error = enter("cuStreamCreateWithPriority")) return error;
  if (flags != 1) return kInvalid;  // one that waits for the stream 0 would serialise everything
  *stream = new Stream(priority);
  return kSuccess;
}
int cuStreamDestroy_v2(void* stream) {
  if (int error = enter("cuStreamDestroy_v2")) return error;
  delete static_cast<Stream*>(stream);
  return kSuccess;
}
int cuStreamQuery(void* stream) {
  if (int error = enter("cuStreamQuery")) return error;
  return stream == nullptr || static_cast<Stream*>(stream)->idle() ? kSuccess : kNotReady;
}
int cuStreamSynchronize(void* stream) {
  if (int error = enter("cuStreamSynchronize")) return error;
  if (stream != nullptr) static_cast<Stream*>(stream)->synchronise();
  return kSuccess;
}
int cuEventCreate(void** event, unsigned flags) {
  if (int error = enter("cuEventCreate")) return error;
  if (flags != 2) return kInvalid;  // timing makes events slow
  *event = new Event;
  return kSuccess;
}
int cuEventDestroy_v2(void* event) {
  if (int error = enter("cuEventDestroy_v2")) return error;
  delete static_cast<Event*>(event);
  return kSuccess;
}
int cuEventRecord(void* event, void* stream) {
  if (int error = enter("cuEventRecord")) return error;
  auto point = std::make_shared<Point>();
  {
    auto* target = static_cast<Event*>(event);
    std::lock_guard lock(target->mutex);
    target->last = point;
  }
  queue(stream, [point] { point->pass(); });
  return kSuccess;
}
int cuStreamWaitEvent(void* stream, void* event, unsigned) {
  if (int error = enter("cuStreamWaitEvent")) return error;
  std::shared_ptr<Point> point;
  {
    auto* source = static_cast<Event*>(event);
    std::lock_guard lock(source->mutex);
    point = source->last;
  }
  if (point != nullptr) queue(stream, [point] { point->wait(); });
  return kSuccess;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  if (int error = enter("cuMemcpyHtoDAsync_v2")) return error;
  note_copy(from, bytes);
  queue(stream, [=] { std::memcpy(reinterpret_cast<void*>(to), from, bytes); });
  return kSuccess;
}
int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  if (int error = enter("cuMemcpyDtoHAsync_v2")) return error;
  note_copy(to, bytes);
  queue(stream, [=] { std::memcpy(to, reinterpret_cast<const void*>(from), bytes); });
  return kSuccess;
}
int cuLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  if (int error = enter("cuLaunchHostFunc")) return error;
  queue(stream, [=] {
    in_callback = true;
    function(argument);
    in_callback = false;
  });
  return kSuccess;
}
int cuMemHostRegister_v2(void* memory, size_t bytes, unsigned) {
  if (int error = enter("cuMemHostRegister_v2")) return error;
  if (reinterpret_cast<uintptr_t>(memory) % 4096 != 0) return kInvalid;
  std::lock_guard lock(settings_mutex);
  pinned[reinterpret_cast<uintptr_t>(memory)] = bytes;
  return kSuccess;
}
int cuMemHostUnregister(void* memory) {
  if (int error = enter("cuMemHostUnregister")) return error;
  std::lock_guard lock(settings_mutex);
  return pinned.erase(reinterpret_cast<uintptr_t>(memory)) == 1 ? kSuccess : kInvalid;
}

// ---- For tests

// A kernel: like a host function, but what it does is the test's.
void fake_kernel(void* stream, void (*function)(void*), void* argument) {
  queue(stream, [=] { function(argument); });
}
void fake_reset() {
  std::lock_guard lock(settings_mutex);
  delay_us = 0;
  failing.clear();
  calls.clear();
  violations = unpinned_copies = largest_copy = 0;
  broken = false;
}
void fake_delay(int64_t most_us, unsigned seed) {
  std::lock_guard lock(settings_mutex);
  delay_us = most_us;
  random_numbers.seed(seed);
}
void fake_fail(const char* function, int after, int code) {
  std::lock_guard lock(settings_mutex);
  failing = function;
  failing_after = after;
  failing_code = code;
}
void fake_break() {
  std::lock_guard lock(settings_mutex);
  broken = true;
}
int64_t fake_calls(const char* function) {
  std::lock_guard lock(settings_mutex);
  return calls[function];
}
int64_t fake_violations() {
  std::lock_guard lock(settings_mutex);
  return violations;
}
int64_t fake_unpinned_copies() {
  std::lock_guard lock(settings_mutex);
  return unpinned_copies;
}
int64_t fake_largest_copy() {
  std::lock_guard lock(settings_mutex);
  return largest_copy;
}
int64_t fake_pinned_bytes() {
  std::lock_guard lock(settings_mutex);
  size_t total = 0;
  for (const auto& [memory, bytes] : pinned) total += bytes;
  return static_cast<int64_t>(total);
}
int64_t fake_allocations() { return allocations; }
int fake_priority(void* stream) { return static_cast<Stream*>(stream)->priority; }

}  // extern "C"
