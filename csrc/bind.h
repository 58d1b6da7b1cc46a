// Helpers that the bindings share. Only bind_*.cc include this file.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "frame.h"

namespace parablock {

namespace py = pybind11;

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// At most thirty years, so that adding it to a time cannot overflow; 0 for NaN.
inline int64_t nanoseconds(double seconds) {
  return seconds > 0 ? static_cast<int64_t>(std::min(seconds, 1e9) * 1e9) : 0;
}

inline TransferKey key_of(uint8_t kind, uint32_t round, uint32_t block) { return {kind, round, block}; }

// (kind, round, block, bytes received)
using ResumePoint = std::tuple<uint8_t, uint32_t, uint32_t, uint64_t>;

inline std::vector<ResumePoint> resume_points(const std::vector<std::pair<TransferKey, uint64_t>>& unfinished) {
  std::vector<ResumePoint> points;
  for (const auto& [key, received] : unfinished) points.emplace_back(key.kind, key.round, key.block, received);
  return points;
}

// Calls `function(address, bytes)` on a Python buffer.
template <typename Function>
auto over(const py::buffer& data, Function function) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  auto result = function(view.buf, static_cast<size_t>(view.len));
  PyBuffer_Release(&view);
  return result;
}

}  // namespace parablock
