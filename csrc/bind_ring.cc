// Python bindings of the ring buffers: the timeline reads all of them and writes those of Python threads.
#include <pybind11/pybind11.h>

#include <memory>

#include "ring.h"

namespace py = pybind11;

namespace parablock {

void bind_ring(py::module_& m) {
  m.attr("WHOLE_TRANSFER") = kWholeTransfer;
  m.attr("RECORD_BYTES") = sizeof(Record);
  py::class_<Ring, std::shared_ptr<Ring>>(m, "Ring")
      .def(py::init<size_t>(), py::arg("records"))
      .def("write",
           [](Ring& ring, uint8_t stage, int64_t start_ns, int64_t end_ns, uint8_t kind, uint32_t round, uint32_t block,
              uint32_t chunk, uint32_t peer, uint64_t bytes) {
             ring.write({.start_ns = start_ns,
                         .end_ns = end_ns,
                         .bytes = bytes,
                         .round = round,
                         .block = block,
                         .chunk = chunk,
                         .peer = peer,
                         .stage = static_cast<Stage>(stage),
                         .kind = kind});
           })
      .def("drain",
           [](Ring& ring) {
             std::vector<Record> records = ring.drain();
             return py::bytes(reinterpret_cast<const char*>(records.data()), records.size() * sizeof(Record));
           })
      .def_property_readonly("lost", &Ring::lost)
      .def_property_readonly("capacity", &Ring::capacity);
}

}  // namespace parablock
