// One range of pinned host memory, which a GPU copies from and to at full speed, cut into Buffers. The constructor pins
// it once: taking and returning Buffers never calls the driver, so any thread may do so, even in a driver callback. A
// forked child does not inherit the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "driver.h"
#include "transfer.h"

namespace parablock {

class Slab : public std::enable_shared_from_this<Slab> {
 public:
  // Rounds up to whole pages. Throws DeviceError when the system refuses to pin that much, and std::bad_alloc.
  Slab(std::shared_ptr<const Driver> driver, size_t bytes);
  ~Slab();  // runs after the last Buffer is gone
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // Returns a page-aligned Buffer with arbitrary contents, which keeps the slab alive; null when there is no room. Any
  // thread.
  std::shared_ptr<Buffer> take(size_t bytes);

  size_t size() const { return memory_.size(); }
  size_t used() const;

 private:
  void give_back(size_t offset, size_t bytes);

  std::shared_ptr<const Driver> driver_;
  CudaContext context_;
  Buffer memory_;
  mutable std::mutex mutex_;
  std::map<size_t, size_t> free_;  // offset: bytes; no two adjoin
  size_t used_ = 0;
};

}  // namespace parablock
