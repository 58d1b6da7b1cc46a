// Python bindings of the GPU copies. Streams and device memory are plain addresses. Every call into the driver releases
// the GIL: the driver may block, and other libraries' driver callbacks may need the GIL.
#include <pybind11/pybind11.h>

#include "bind.h"
#include "device.h"
#include "slab.h"

namespace parablock {
namespace {

uintptr_t handle(CudaStream stream) { return reinterpret_cast<uintptr_t>(stream); }
CudaStream stream_of(uintptr_t handle) { return reinterpret_cast<CudaStream>(handle); }

void bind_transfers(py::module_& m) {
  py::class_<Mark, std::shared_ptr<Mark>>(m, "Mark");

  py::class_<DeviceToHost, std::shared_ptr<DeviceToHost>>(m, "DeviceToHost")
      .def(
          "wait", [](DeviceToHost& t, double seconds) { return t.wait(nanoseconds(seconds)); }, ReleaseGil())
      .def_property_readonly("started_ns", &DeviceToHost::started_ns)
      .def_property_readonly("first_copied_ns", &DeviceToHost::first_copied_ns)
      .def_property_readonly("finished_ns", &DeviceToHost::finished_ns);

  py::class_<HostToDevice, std::shared_ptr<HostToDevice>>(m, "HostToDevice")
      .def_property_readonly("watermark", &HostToDevice::watermark)
      .def(
          "wait", [](HostToDevice& t, double seconds) { return t.wait(nanoseconds(seconds)); }, ReleaseGil())
      .def("cancel", &HostToDevice::cancel, ReleaseGil());
}

}  // namespace

void bind_device(py::module_& m) {
  py::object base = py::module_::import("parablock_rt.errors").attr("ParaBlockError");
  py::register_exception<DeviceError>(m, "DeviceError", base);
  bind_transfers(m);

  py::class_<Driver, std::shared_ptr<Driver>>(m, "Driver")
      .def(py::init<const std::string&>(), py::arg("library") = "libcuda.so.1")
      .def_property_readonly("version", &Driver::version);

  py::class_<Slab, std::shared_ptr<Slab>>(m, "Slab")
      .def(py::init<std::shared_ptr<Driver>, size_t>(), py::arg("driver").none(false), py::arg("nbytes"), ReleaseGil())
      .def("take", &Slab::take, ReleaseGil())
      .def_property_readonly("nbytes", &Slab::size)
      .def_property_readonly("used", &Slab::used);

  py::class_<Device>(m, "Device")
      .def(py::init<std::shared_ptr<Driver>, size_t>(), py::arg("driver").none(false), py::arg("copy_bytes"),
           ReleaseGil())
      .def_property_readonly("pack", [](const Device& d) { return handle(d.pack()); })
      .def_property_readonly("down", [](const Device& d) { return handle(d.down()); })
      .def_property_readonly("up", [](const Device& d) { return handle(d.up()); })
      .def(
          "mark", [](Device& d, uintptr_t stream) { return d.mark(stream_of(stream)); }, ReleaseGil())
      .def(
          "wait", [](Device& d, uintptr_t stream, const Mark& mark) { d.wait(stream_of(stream), mark); }, ReleaseGil())
      .def(
          "copy_to_device",
          [](Device& d, uintptr_t to, uintptr_t from, size_t bytes, uintptr_t stream) {
            d.copy_to_device(to, reinterpret_cast<const void*>(from), bytes, stream_of(stream));
          },
          py::arg("to"), py::arg("source"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "copy_to_host",
          [](Device& d, uintptr_t to, uintptr_t from, size_t bytes, uintptr_t stream) {
            d.copy_to_host(reinterpret_cast<void*>(to), from, bytes, stream_of(stream));
          },
          py::arg("to"), py::arg("source"), py::arg("nbytes"), py::arg("stream"), ReleaseGil())
      .def(
          "device_to_host",
          [](Device&, std::shared_ptr<Source> source, std::shared_ptr<Ring> ring, uint8_t kind, uint32_t round,
             uint32_t block) {
            return std::make_shared<DeviceToHost>(std::move(source), std::move(ring), TransferKey{kind, round, block});
          },
          py::arg("source").none(false), py::arg("ring") = nullptr, py::arg("kind") = 0, py::arg("round") = 0,
          py::arg("block") = 0)
      .def("copy_units", &Device::copy_units, py::arg("to_host").none(false), py::arg("scales"), py::arg("codes"),
           py::arg("first"), py::arg("units"), ReleaseGil())
      .def("finish", &Device::finish, py::arg("to_host").none(false), ReleaseGil())
      .def(
          "host_to_device",
          [](Device& d, std::shared_ptr<Buffer> buffer, const Layout& layout, uintptr_t scales, uintptr_t codes,
             std::shared_ptr<Mark> after) {
            auto to_device =
                std::make_shared<HostToDevice>(d.mailbox(), std::move(buffer), layout, scales, codes, std::move(after));
            d.start(to_device);
            return to_device;
          },
          py::arg("buffer").none(false), py::arg("layout"), py::arg("scales"), py::arg("codes"), py::arg("after"),
          ReleaseGil())
      .def("check", &Device::check, ReleaseGil())
      .def("synchronise", &Device::synchronise, ReleaseGil())
      .def("close", &Device::close, ReleaseGil());
}

}  // namespace parablock
