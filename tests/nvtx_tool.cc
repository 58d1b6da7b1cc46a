// A tool for NVTX, as a profiler is one: NVTX loads it into the process when NVTX_INJECTION64_PATH names it. It writes
// the ranges of every thread, a line each, to the file in NVTX_TOOL_OUTPUT: "+ name" where one begins, "-" where it
// ends.
//
// What it declares is NVTX's binary interface between a program and a tool (version 3, nvtxTypes.h).
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace {

constexpr uint32_t kCallbacksTable = 1;
constexpr int kCoreModule = 1;
constexpr unsigned kRangePush = 9;
constexpr unsigned kRangePop = 11;

using Function = void (*)();

struct Callbacks {
  size_t size;
  int (*module_functions)(int module, Function*** table, unsigned* count);
};

std::mutex mutex;
std::FILE* output = nullptr;

void line(char sign, const char* text) {
  std::lock_guard lock(mutex);
  std::fprintf(output, "%c %s\n", sign, text);
  std::fflush(output);
}

int push(const char* name) {
  line('+', name);
  return 0;
}

int pop() {
  line('-', "");
  return 0;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(const void* (*export_table)(uint32_t)) {
  const char* path = std::getenv("NVTX_TOOL_OUTPUT");
  auto callbacks = static_cast<const Callbacks*>(export_table(kCallbacksTable));
  Function** functions = nullptr;
  unsigned count = 0;
  if (path == nullptr || callbacks == nullptr || !callbacks->module_functions(kCoreModule, &functions, &count) ||
      count <= kRangePop)
    return 0;
  output = std::fopen(path, "w");
  if (output == nullptr) return 0;
  *functions[kRangePush] = reinterpret_cast<Function>(&push);
  *functions[kRangePop] = reinterpret_cast<Function>(&pop);
  return 1;
}
