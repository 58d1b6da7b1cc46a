// What the fuzz targets share: an input that is taken apart piece by piece, and expectations that end the process.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>

inline void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "expected that %s\n", what);
  std::abort();
}

// Reads from the front; an exhausted input gives zeros, so that every input is a whole program.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : left_(data, size) {}

  bool empty() const { return left_.empty(); }

  template <typename T>
  T take() {
    T value{};
    std::span<const uint8_t> bytes = take_bytes(sizeof value);
    if (!bytes.empty()) std::memcpy(&value, bytes.data(), bytes.size());
    return value;
  }

  // At most `count` bytes.
  std::span<const uint8_t> take_bytes(size_t count) {
    std::span<const uint8_t> taken = left_.first(std::min(count, left_.size()));
    left_ = left_.subspan(taken.size());
    return taken;
  }

  // Fills `count` bytes at `to`; what the input lacks stays as it is.
  void fill(void* to, size_t count) {
    std::span<const uint8_t> bytes = take_bytes(count);
    if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
  }

 private:
  std::span<const uint8_t> left_;
};
