// The codec as functions over raw addresses. The caller (parablock_rt/codec.py) owns every buffer, keeps it alive
// during the call and has checked its length. No function here touches a Python object, so all of them release the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"
#include "codec.h"

namespace parablock {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void require(bool holds, const char* expected, int64_t found) {
  if (!holds) throw std::invalid_argument("expected " + std::string(expected) + ", found " + std::to_string(found));
}

Format format_of(int value) {
  require(value >= 0 && value <= 3, "a format from 0 to 3", value);
  return static_cast<Format>(value);
}

Dtype dtype_of(int value) {
  require(value >= 0 && value <= 2, "a dtype from 0 to 2", value);
  return static_cast<Dtype>(value);
}

int64_t length(int64_t numel) {
  require(numel >= 0 && numel % kAlignment == 0, "a length that is a multiple of 128", numel);
  return numel;
}

ConstPlanes planes(uintptr_t scales, uintptr_t codes) { return {pointer<uint8_t>(scales), pointer<uint8_t>(codes)}; }

using Contributions = std::vector<std::tuple<uintptr_t, uintptr_t, int, double>>;  // scales, codes, format, weight

std::vector<Contribution> native(const Contributions& contributions) {
  std::vector<Contribution> in;
  for (const auto& [scales, codes, format, weight] : contributions) {
    in.push_back({planes(scales, codes), format_of(format), weight});
  }
  return in;
}

void bind_sum(py::module_& m) {
  m.def(
      "accumulate",
      [](uintptr_t hi, uintptr_t lo, const Contributions& contributions, int64_t numel, bool empty, int threads) {
        accumulate(pointer<int64_t>(hi), pointer<int64_t>(lo), native(contributions), length(numel), empty, threads);
      },
      py::arg("hi"), py::arg("lo"), py::arg("contributions"), py::arg("numel"), py::arg("empty"), py::arg("threads"),
      ReleaseGil());
  m.def(
      "accumulated_mean",
      [](uintptr_t hi, uintptr_t lo, bool empty, const Contributions& contributions, double total_weight, int64_t numel,
         uintptr_t out, int threads) {
        accumulated_mean(pointer<int64_t>(hi), pointer<int64_t>(lo), empty, native(contributions), total_weight,
                         length(numel), pointer<float>(out), threads);
      },
      py::arg("hi"), py::arg("lo"), py::arg("empty"), py::arg("contributions"), py::arg("total_weight"),
      py::arg("numel"), py::arg("out"), py::arg("threads"), ReleaseGil());
  m.def(
      "inspect",
      [](uintptr_t scales, uintptr_t codes, int64_t numel, int format, int threads) {
        const Inspection found = inspect(planes(scales, codes), length(numel), format_of(format), threads);
        return std::make_tuple(found.largest, found.bad_groups, found.invalid);
      },
      py::arg("scales"), py::arg("codes"), py::arg("numel"), py::arg("format"), py::arg("threads"), ReleaseGil());
}

}  // namespace

void bind_codec(py::module_& m) {
  m.def("instruction_set", &instruction_set);
  m.def("force_instruction_set", &force_instruction_set, py::arg("name"));
  m.def(
      "encode",
      [](uintptr_t now, int now_dtype, uintptr_t ref, int ref_dtype, uintptr_t residual_in, uintptr_t residual_out,
         int64_t numel, int format, uintptr_t scales, uintptr_t codes, int threads) {
        return encode(pointer<void>(now), dtype_of(now_dtype), pointer<void>(ref), dtype_of(ref_dtype),
                      pointer<float>(residual_in), pointer<float>(residual_out), length(numel), format_of(format),
                      {pointer<uint8_t>(scales), pointer<uint8_t>(codes)}, threads);
      },
      py::arg("now"), py::arg("now_dtype"), py::arg("ref"), py::arg("ref_dtype"), py::arg("residual_in"),
      py::arg("residual_out"), py::arg("numel"), py::arg("format"), py::arg("scales"), py::arg("codes"),
      py::arg("threads"), ReleaseGil());
  m.def(
      "decode",
      [](uintptr_t scales, uintptr_t codes, int64_t numel, int format, uintptr_t out, int threads) {
        decode(planes(scales, codes), length(numel), format_of(format), pointer<float>(out), threads);
      },
      py::arg("scales"), py::arg("codes"), py::arg("numel"), py::arg("format"), py::arg("out"), py::arg("threads"),
      ReleaseGil());
  m.def(
      "apply",
      [](uintptr_t target, int dtype, uintptr_t scales, uintptr_t codes, int64_t numel, int format, int threads) {
        apply(pointer<void>(target), dtype_of(dtype), planes(scales, codes), length(numel), format_of(format), threads);
      },
      py::arg("target"), py::arg("dtype"), py::arg("scales"), py::arg("codes"), py::arg("numel"), py::arg("format"),
      py::arg("threads"), ReleaseGil());
  m.def(
      "fingerprint",
      [](uintptr_t data, size_t bytes, int threads) {
        require(bytes % 4 == 0, "a multiple of 4 bytes", static_cast<int64_t>(bytes));
        return fingerprint(pointer<void>(data), bytes, threads);
      },
      py::arg("data"), py::arg("bytes"), py::arg("threads"), ReleaseGil());
  bind_sum(m);
}

}  // namespace parablock
