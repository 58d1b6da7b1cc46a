// The native module `parablock_rt._C`. Each part of the library binds itself; this file only lists them.
#include <pybind11/pybind11.h>

namespace parablock {
void bind_codec(pybind11::module_& m);
void bind_device(pybind11::module_& m);
void bind_ring(pybind11::module_& m);
void bind_testing(pybind11::module_& m);
void bind_transport(pybind11::module_& m);
}  // namespace parablock

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Native part of parablock_rt: the CPU codec, the encode thread, the transport, GPU copies, and their records.";
  parablock::bind_codec(m);
  parablock::bind_ring(m);
  parablock::bind_transport(m);
  parablock::bind_device(m);
  parablock::bind_testing(m);
}
