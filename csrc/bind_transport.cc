// Python bindings of the transport and the encode thread. Every call that may block or take long drops the GIL; no
// object below holds a reference to a Python object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <system_error>

#include "crc32c.h"
#include "encoder.h"
#include "transport.h"

namespace py = pybind11;

namespace parablock {
namespace {

using ReleaseGil = py::call_guard<py::gil_scoped_release>;

// At most thirty years, so that adding it to a time cannot overflow.
int64_t nanoseconds(double seconds) { return static_cast<int64_t>(std::clamp(seconds, 0.0, 1e9) * 1e9); }

TransferKey key_of(uint8_t kind, uint32_t round, uint32_t block) { return {kind, round, block}; }

// std::system_error becomes OSError with its errno, so that Python sees ConnectionRefusedError and its kin.
void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const std::system_error& error) {
    PyObject* arguments = Py_BuildValue("(is)", error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments);
    Py_XDECREF(arguments);
  }
}

uint32_t checksum(const py::buffer& data, uint32_t (*function)(const void*, size_t, uint32_t)) {
  Py_buffer view;
  if (PyObject_GetBuffer(data.ptr(), &view, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  uint32_t crc = function(view.buf, static_cast<size_t>(view.len), 0);
  PyBuffer_Release(&view);
  return crc;
}

void bind_session(py::module_& m) {
  // The protocol without a socket, for tests and fuzzers: bytes in, bytes out.
  py::class_<Session>(m, "Session")
      .def(py::init([](size_t control_bytes, uint64_t window_bytes) {
             return Session({.control_bytes = control_bytes, .window_bytes = window_bytes});
           }),
           py::arg("control_bytes") = 4096, py::arg("window_bytes") = 64 << 20)
      .def("set_run", &Session::set_run)
      .def("send_control", [](Session& s, const py::bytes& message) { s.send_control(message); })
      .def("send", [](Session& s, uint8_t kind, uint32_t round, uint32_t block,
                      std::shared_ptr<Source> source) { s.send(key_of(kind, round, block), std::move(source)); },
           py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("source").none(false))
      .def("receive", [](Session& s, uint8_t kind, uint32_t round, uint32_t block, std::shared_ptr<Buffer> buffer,
                         const Layout& layout) { s.receive(key_of(kind, round, block), std::move(buffer), layout); },
           py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("buffer").none(false), py::arg("layout"))
      .def("cancel_receive", [](Session& s, uint8_t kind, uint32_t round,
                                uint32_t block) { s.cancel_receive(key_of(kind, round, block)); })
      .def("ping", &Session::ping)
      .def("feed",
           [](Session& s, const py::bytes& bytes, int64_t now_ns) {
             std::string_view left = bytes;
             while (!left.empty()) {
               size_t taken = 0;
               for (const Segment& region : s.want()) {
                 size_t count = std::min(region.bytes, left.size() - taken);
                 std::copy_n(left.data() + taken, count, region.data);
                 taken += count;
               }
               s.arrived(taken, now_ns);
               left.remove_prefix(taken);
             }
           },
           py::arg("bytes"), py::arg("now_ns") = 0)
      .def("next_frame",
           [](Session& s, int64_t now_ns) -> std::optional<py::bytes> {
             std::optional<OutFrame> frame = s.next_frame(now_ns);
             if (!frame) return std::nullopt;
             std::string bytes(frame->header.begin(), frame->header.end());
             bytes += frame->inline_payload;
             for (const Segment& part : frame->payload)
               bytes.append(reinterpret_cast<const char*>(part.data), part.bytes);
             return py::bytes(bytes);
           },
           py::arg("now_ns") = 0)
      .def("take_events", &Session::take_events)
      .def_property_readonly("round_trip_ns", &Session::round_trip_ns);
}

void bind_data(py::module_& m) {
  py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_property_readonly("address", [](const Buffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_property_readonly("nbytes", &Buffer::size)
      .def_property_readonly("owners",  // Python counts as one
                             [](Buffer& b) {
                               long count = b.weak_from_this().use_count();
                               std::atomic_thread_fence(std::memory_order_acquire);  // what former owners did is done
                               return count;
                             })
      .def_buffer([](Buffer& b) {
        auto size = static_cast<py::ssize_t>(b.size());
        return py::buffer_info(b.data(), 1, py::format_descriptor<uint8_t>::format(), size);
      });

  py::class_<Layout>(m, "Layout")
      .def(py::init([](uint64_t units, uint32_t scale, uint32_t code, uint32_t chunk_units) {
             return Layout{.units = units, .scale_bytes = scale, .code_bytes = code, .chunk_units = chunk_units};
           }),
           py::arg("units"), py::arg("scale_bytes"), py::arg("code_bytes"), py::arg("chunk_units"))
      .def_property_readonly("nbytes", &Layout::bytes)
      .def_property_readonly("chunks", &Layout::chunks);
  m.def("body_layout", [](int format, int64_t numel, int64_t chunk_elements) {
    return body_layout(static_cast<Format>(format), numel, chunk_elements);
  });

  py::class_<Source, std::shared_ptr<Source>>(m, "Source")
      .def(py::init([](std::shared_ptr<Buffer> buffer, const Layout& layout, bool complete) {
        layout.check(buffer->size());
        return std::make_shared<Source>(std::move(buffer), layout, complete ? layout.chunks() : 0, [] {});
      }))
      .def("raise_watermark", &Source::raise)
      .def_property_readonly("ready_chunks", &Source::ready_chunks);

  py::class_<Event> event(m, "Event");
  py::enum_<Event::Type>(event, "Type")
      .value("CONNECTED", Event::Type::kConnected)
      .value("CLOSED", Event::Type::kClosed)
      .value("CONTROL", Event::Type::kControl)
      .value("RECEIVED", Event::Type::kReceived)
      .value("SENT", Event::Type::kSent)
      .value("REFUSED", Event::Type::kRefused);
  event.def_readonly("type", &Event::type)
      .def_readonly("link", &Event::link)
      .def_property_readonly("kind", [](const Event& e) { return e.key.kind; })
      .def_property_readonly("round", [](const Event& e) { return e.key.round; })
      .def_property_readonly("block", [](const Event& e) { return e.key.block; })
      .def_property_readonly("message", [](const Event& e) { return py::bytes(e.text); })
      .def_property_readonly("text", [](const Event& e) {
        return py::str(py::bytes(e.text).attr("decode")("utf-8", "replace"));
      })
      .def_readonly("at_ns", &Event::at_ns)
      .def_readonly("first_byte_ns", &Event::first_byte_ns);
}

void bind_encoder(py::module_& m) {
  py::class_<EncodeJob, std::shared_ptr<EncodeJob>>(m, "EncodeJob")
      .def("wait", [](EncodeJob& job, double seconds) { return job.wait(nanoseconds(seconds)); }, ReleaseGil())
      .def_property_readonly("bad_groups", &EncodeJob::bad_groups)
      .def_property_readonly("started_ns", &EncodeJob::started_ns)
      .def_property_readonly("finished_ns", &EncodeJob::finished_ns);

  // (now address, now dtype, ref address, ref dtype, residual in, residual out, numel)
  using Piece = std::tuple<uintptr_t, int, uintptr_t, int, uintptr_t, uintptr_t, int64_t>;
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<>())
      .def("submit", [](Encoder& encoder, const std::vector<Piece>& pieces, int format,
                        std::shared_ptr<Source> source) {
        std::vector<EncodePiece> native;
        for (const auto& [now, now_dtype, ref, ref_dtype, residual_in, residual_out, numel] : pieces)
          native.push_back({reinterpret_cast<const void*>(now), static_cast<Dtype>(now_dtype),
                            reinterpret_cast<const void*>(ref), static_cast<Dtype>(ref_dtype),
                            reinterpret_cast<const float*>(residual_in), reinterpret_cast<float*>(residual_out),
                            numel});
        auto job = std::make_shared<EncodeJob>(std::move(native), static_cast<Format>(format), std::move(source));
        encoder.submit(job);
        return job;
      });
}

void bind_links(py::module_& m) {
  py::class_<Shaper>(m, "Shaper")  // for tests: links have their own
      .def(py::init([](double bytes_per_second, int64_t delay_ns) {
             Shaper shaper;
             shaper.configure(bytes_per_second, delay_ns);
             return shaper;
           }),
           py::arg("bytes_per_second"), py::arg("delay_ns"))
      .def_property_readonly("active", &Shaper::active)
      .def_property_readonly("free_at", &Shaper::free_at)
      .def("transmit", &Shaper::transmit, py::arg("bytes"), py::arg("now_ns"), py::arg("waited"));

  py::class_<LinkStats>(m, "LinkStats")
      .def_readonly("bytes_in", &LinkStats::bytes_in)
      .def_readonly("bytes_out", &LinkStats::bytes_out)
      .def_readonly("round_trip_ns", &LinkStats::round_trip_ns);

  py::class_<Transport>(m, "Transport")
      .def(py::init([](double bytes_per_second, double delay, double idle_timeout, size_t max_links, uint64_t window) {
             return std::make_unique<Transport>(TransportOptions{.bytes_per_second = bytes_per_second,
                                                                 .delay_ns = nanoseconds(delay),
                                                                 .idle_timeout_ns = nanoseconds(idle_timeout),
                                                                 .max_links = max_links,
                                                                 .window_bytes = window});
           }),
           py::arg("bytes_per_second") = 0.0, py::arg("delay") = 0.0, py::arg("idle_timeout") = 60.0,
           py::arg("max_links") = 1024, py::arg("window_bytes") = uint64_t{64} << 20)
      .def("listen", &Transport::listen, ReleaseGil())
      .def("connect", [](Transport& t, const std::string& host, uint16_t port,
                         double timeout) { return t.connect(host, port, nanoseconds(timeout)); }, ReleaseGil())
      .def("send_control", [](Transport& t, uint64_t link, const py::bytes& message) { t.send_control(link, message); })
      .def("send", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round, uint32_t block,
                      std::shared_ptr<Source> source) { t.send(link, key_of(kind, round, block), std::move(source)); },
           py::arg("link"), py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("source").none(false))
      .def("receive", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round, uint32_t block,
                         std::shared_ptr<Buffer> buffer,
                         const Layout& layout) {
             t.receive(link, key_of(kind, round, block), std::move(buffer), layout);
           },
           py::arg("link"), py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("buffer").none(false),
           py::arg("layout"))
      .def("cancel_receive", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round,
                                uint32_t block) { t.cancel_receive(link, key_of(kind, round, block)); })
      .def("trust", &Transport::trust)
      .def("close_link", &Transport::close_link)
      .def("make_source", &Transport::make_source,
           py::arg("buffer").none(false), py::arg("layout"), py::arg("complete"))
      .def("next_event", [](Transport& t, double timeout) { return t.next_event(nanoseconds(timeout)); }, ReleaseGil())
      .def("stats", &Transport::stats)
      .def("close", [](Transport& t, double flush) { t.close(nanoseconds(flush)); }, ReleaseGil());
}

}  // namespace

void bind_transport(py::module_& m) {
  py::register_exception<ProtocolError>(m, "ProtocolError");
  py::register_exception_translator(&translate);
  m.attr("PROTOCOL_VERSION") = kProtocolVersion;
  m.def("crc32c", [](const py::buffer& data) { return checksum(data, &crc32c); });
  m.def("crc32c_portable", [](const py::buffer& data) { return checksum(data, &crc32c_portable); });
  m.def("monotonic_ns", &monotonic_ns);
  bind_data(m);
  bind_session(m);
  bind_encoder(m);
  bind_links(m);
}

}  // namespace parablock
