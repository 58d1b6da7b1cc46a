// One run of host memory that a GPU copies from and to at full speed, cut into Buffers. It is pinned once, when it is
// made: cutting and giving back never calls the driver, so both may happen anywhere, in a driver's callback too. A
// child that this process forks does not have it.
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
  // Rounded up to whole pages. Throws DeviceError when the system refuses to pin that much, std::bad_alloc.
  Slab(std::shared_ptr<const Driver> driver, size_t bytes);
  ~Slab();  // after the last Buffer
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  // A page-aligned piece with arbitrary contents, which keeps the slab; null when there is no room. Any thread.
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
