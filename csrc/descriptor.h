// An owned descriptor, which a forked child does not keep.
//
// A child that lives on, such as a data loader's worker, would otherwise hold the links, ports and locks of its parent:
// once the parent was killed, nobody could listen on its port or resume its run.
#pragma once

#include <utility>

namespace parablock {

// Owns a descriptor and closes it. In a child that is forked meanwhile, the number leads to /dev/null instead: the
// child's copies of whatever uses it can do no harm, and the number cannot become another file's.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd);  // negative: owns nothing
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd() { reset(); }

  int get() const { return fd_; }
  void reset();

 private:
  int fd_ = -1;
};

}  // namespace parablock
