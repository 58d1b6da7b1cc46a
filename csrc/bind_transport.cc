// Python bindings of the transport and the encode thread. Every call that may block or take long releases the GIL; no
// object below holds a reference to a Python object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <memory>
#include <stdexcept>
#include <system_error>

#include "bind.h"
#include "crc32c.h"
#include "descriptor.h"
#include "encoder.h"
#include "inspector.h"
#include "transport.h"

namespace parablock {
namespace {

// std::system_error becomes OSError with its errno, so that Python raises ConnectionRefusedError and the like.
void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const std::system_error& error) {
    PyObject* arguments = Py_BuildValue("(is)", error.code().value(), error.what());
    PyErr_SetObject(PyExc_OSError, arguments);
    Py_XDECREF(arguments);
  }
}

void bind_data(py::module_& m) {
  py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_property_readonly("address", [](const Buffer& b) { return reinterpret_cast<uintptr_t>(b.data()); })
      .def_property_readonly("nbytes", &Buffer::size)
      .def_property_readonly("owners",  // Python counts as one
                             [](Buffer& b) {
                               long count = b.weak_from_this().use_count();
                               std::atomic_thread_fence(std::memory_order_acquire);  // sees all writes of former owners
                               return count;
                             })
      .def_buffer([](Buffer& b) {
        auto size = static_cast<py::ssize_t>(b.size());
        return py::buffer_info(b.data(), 1, py::format_descriptor<uint8_t>::format(), size);
      });

  py::class_<Fd>(m, "Descriptor").def(py::init<int>()).def("fileno", &Fd::get).def("close", &Fd::reset);

  py::class_<Layout>(m, "Layout")
      .def(py::init([](uint64_t units, uint32_t scale, uint32_t code, uint32_t chunk_units) {
             if (chunk_units == 0) throw std::invalid_argument("a transfer needs at least one unit per chunk, found 0");
             return Layout{.units = units, .scale_bytes = scale, .code_bytes = code, .chunk_units = chunk_units};
           }),
           py::arg("units"), py::arg("scale_bytes"), py::arg("code_bytes"), py::arg("chunk_units"))
      .def_property_readonly("units", [](const Layout& l) { return l.units; })
      .def_property_readonly("nbytes", &Layout::bytes)
      .def_property_readonly("chunks", &Layout::chunks);
  m.def("body_layout", [](int format, int64_t numel, int64_t chunk_elements) {
    return body_layout(static_cast<Format>(format), numel, chunk_elements);
  });

  py::class_<Listener, std::shared_ptr<Listener>>(m, "Listener");
  py::class_<Watermark, Listener, std::shared_ptr<Watermark>>(m, "Watermark")
      .def_property_readonly("received", [](const Watermark& w) { return w.received(); });
  py::class_<Inspector, Listener, std::shared_ptr<Inspector>>(m, "Inspector")
      .def(py::init([](const Layout& layout, int format) {
             return std::make_shared<Inspector>(layout, static_cast<Format>(format));
           }),
           py::arg("layout"), py::arg("format"))
      .def("result", [](const Inspector& inspector) {
        const Inspection found = inspector.result();
        return std::make_tuple(found.largest, found.bad_groups, found.invalid);
      });

  py::class_<Source, std::shared_ptr<Source>>(m, "Source")
      .def(py::init([](std::shared_ptr<Buffer> buffer, const Layout& layout, bool complete) {
             layout.check(buffer->size());
             return std::make_shared<Source>(std::move(buffer), layout, complete ? layout.chunks() : 0, [] {});
           }),
           py::arg("buffer").none(false), py::arg("layout"), py::arg("complete"))
      .def("raise_watermark", &Source::raise)
      .def_property_readonly("ready_chunks", &Source::ready_chunks);
}

void bind_event(py::module_& m) {
  py::class_<Event> event(m, "Event");
  py::enum_<Event::Type>(event, "Type")
      .value("CONNECTED", Event::Type::kConnected)
      .value("CLOSED", Event::Type::kClosed)
      .value("CONTROL", Event::Type::kControl)
      .value("RECEIVED", Event::Type::kReceived)
      .value("SENT", Event::Type::kSent)
      .value("REFUSED", Event::Type::kRefused)
      .value("WITHDRAWN", Event::Type::kWithdrawn)
      .value("STALLED", Event::Type::kStalled);
  event.def_readonly("type", &Event::type)
      .def_readonly("link", &Event::link)
      .def_property_readonly("kind", [](const Event& e) { return e.key.kind; })
      .def_property_readonly("round", [](const Event& e) { return e.key.round; })
      .def_property_readonly("block", [](const Event& e) { return e.key.block; })
      .def_property_readonly("message", [](const Event& e) { return py::bytes(e.text); })
      .def_property_readonly(
          "text", [](const Event& e) { return py::str(py::bytes(e.text).attr("decode")("utf-8", "replace")); })
      .def_property_readonly("unfinished", [](const Event& e) { return resume_points(e.unfinished); })
      .def_readonly("permanent", &Event::permanent)
      .def_readonly("became_lane", &Event::became_lane)
      .def_readonly("at_ns", &Event::at_ns)
      .def_readonly("first_byte_ns", &Event::first_byte_ns);
}

void bind_encoder(py::module_& m) {
  py::class_<EncodeJob, std::shared_ptr<EncodeJob>>(m, "EncodeJob")
      .def(
          "wait", [](EncodeJob& job, double seconds) { return job.wait(nanoseconds(seconds)); }, ReleaseGil())
      .def_property_readonly("bad_groups", &EncodeJob::bad_groups)
      .def_property_readonly("started_ns", &EncodeJob::started_ns)
      .def_property_readonly("finished_ns", &EncodeJob::finished_ns);

  // (now address, now dtype, ref address, ref dtype, residual in, residual out, numel)
  using Piece = std::tuple<uintptr_t, int, uintptr_t, int, uintptr_t, uintptr_t, int64_t>;
  py::class_<Encoder>(m, "Encoder")
      .def(py::init<std::shared_ptr<Ring>>(), py::arg("ring") = nullptr)
      .def(
          "submit",
          [](Encoder& encoder, const std::vector<Piece>& pieces, int format, std::shared_ptr<Source> source,
             uint8_t kind, uint32_t round, uint32_t block) {
            std::vector<EncodePiece> native;
            for (const auto& [now, now_dtype, ref, ref_dtype, residual_in, residual_out, numel] : pieces)
              native.push_back({reinterpret_cast<const void*>(now), static_cast<Dtype>(now_dtype),
                                reinterpret_cast<const void*>(ref), static_cast<Dtype>(ref_dtype),
                                reinterpret_cast<const float*>(residual_in), reinterpret_cast<float*>(residual_out),
                                numel});
            auto job = std::make_shared<EncodeJob>(std::move(native), static_cast<Format>(format), std::move(source),
                                                   key_of(kind, round, block));
            encoder.submit(job);
            return job;
          },
          py::arg("pieces"), py::arg("format"), py::arg("source").none(false), py::arg("kind") = 0,
          py::arg("round") = 0, py::arg("block") = 0);
}

void bind_tls(py::module_& m) {
  py::register_exception<TlsError>(m, "TlsError");
  m.attr("TLS_LIBRARY") = tls_library();
  py::class_<TlsContext, std::shared_ptr<TlsContext>>(m, "TlsContext")
      .def(py::init([](const std::string& certificate, const std::string& key, const std::string& ca,
                       const py::bytes& fingerprint, bool peer_may_be_anonymous, uint64_t records_per_key) {
             return std::const_pointer_cast<TlsContext>(
                 make_tls({.certificate_file = certificate,
                           .key_file = key,
                           .ca_file = ca,
                           .fingerprint = fingerprint,
                           .records_per_key = std::max<uint64_t>(records_per_key, 1),
                           .peer_may_be_anonymous = peer_may_be_anonymous}));
           }),
           py::arg("certificate") = "", py::arg("key") = "", py::arg("ca") = "", py::arg("fingerprint") = py::bytes(),
           py::arg("peer_may_be_anonymous") = false, py::arg("records_per_key") = uint64_t{1} << 23);
  py::class_<TlsInfo, std::shared_ptr<TlsInfo>>(m, "TlsInfo")
      .def_readonly("version", &TlsInfo::version)
      .def_readonly("cipher", &TlsInfo::cipher)
      .def_property_readonly("binding", [](const TlsInfo& info) { return py::bytes(info.binding); })
      .def_readonly("subject", &TlsInfo::subject)
      .def_readonly("issuer", &TlsInfo::issuer)
      .def_readonly("fingerprint", &TlsInfo::fingerprint)
      .def_readonly("not_after", &TlsInfo::not_after);
}

void bind_stats(py::module_& m) {
  py::class_<LaneStats>(m, "LaneStats")
      .def_readonly("rtt_us", &LaneStats::rtt_us)
      .def_readonly("rttvar_us", &LaneStats::rttvar_us)
      .def_readonly("retransmits", &LaneStats::retransmits)
      .def_readonly("delivery_rate", &LaneStats::delivery_rate)
      .def_readonly("cwnd", &LaneStats::cwnd)
      .def_readonly("bytes_in", &LaneStats::bytes_in)
      .def_readonly("bytes_out", &LaneStats::bytes_out)
      .def_readonly("unsent_bytes", &LaneStats::unsent_bytes)
      .def_readonly("congestion_control", &LaneStats::congestion_control);

  py::class_<LinkStats>(m, "LinkStats")
      .def_readonly("bytes_in", &LinkStats::bytes_in)
      .def_readonly("bytes_out", &LinkStats::bytes_out)
      .def_readonly("round_trip_ns", &LinkStats::round_trip_ns)
      .def_readonly("moved_bytes", &LinkStats::moved_bytes)
      .def_readonly("corrupt_chunks", &LinkStats::corrupt_chunks)
      .def_readonly("lanes", &LinkStats::lanes);
}

std::unique_ptr<Transport> make_transport(double bytes_per_second, double delay, double idle_timeout,
                                          double opening_timeout, size_t max_links, size_t max_strangers,
                                          size_t max_strangers_per_network, uint64_t window,
                                          std::shared_ptr<TlsContext> tls) {
  return std::make_unique<Transport>(TransportOptions{
      .bytes_per_second = bytes_per_second,
      .delay_ns = nanoseconds(delay),
      .idle_timeout_ns = nanoseconds(idle_timeout),
      .opening_timeout_ns = nanoseconds(opening_timeout),
      .admission = {.links = max_links, .strangers = max_strangers, .strangers_per_network = max_strangers_per_network},
      .window_bytes = window,
      .tls = std::move(tls)});
}

void bind_links(py::class_<Transport>& transport) {
  transport.def("listen", &Transport::listen, ReleaseGil())
      .def(
          "connect",
          [](Transport& t, const std::string& host, uint16_t port, double timeout) {
            return t.connect(host, port, nanoseconds(timeout));
          },
          ReleaseGil())
      .def("send_control", [](Transport& t, uint64_t link, const py::bytes& message) { t.send_control(link, message); })
      .def("trust", &Transport::trust, py::arg("link"), py::arg("run"), py::arg("control_bytes"),
           py::arg("queue_bytes") = 1 << 20)
      .def(
          "offer_lanes",
          [](Transport& t, uint64_t link, size_t count, double within) {
            return py::bytes(t.offer_lanes(link, count, nanoseconds(within)));
          },
          py::arg("link"), py::arg("count"), py::arg("within") = 60.0)
      .def(
          "attach_lanes",
          [](Transport& t, uint64_t link, const std::string& key, size_t count, double timeout) {
            t.attach_lanes(link, key, count, nanoseconds(timeout));
          },
          py::arg("link"), py::arg("key"), py::arg("count"), py::arg("timeout"), ReleaseGil())
      .def(
          "close_link",
          [](Transport& t, uint64_t link, std::string reason, double flush) {
            t.close_link(link, std::move(reason), nanoseconds(flush));
          },
          py::arg("link"), py::arg("reason"), py::arg("flush") = 5.0)
      .def(
          "next_event", [](Transport& t, double timeout) { return t.next_event(nanoseconds(timeout)); }, ReleaseGil())
      .def("stats", &Transport::stats)
      .def("record", &Transport::record)
      .def("tls_info",
           [](const Transport& t, uint64_t link) { return std::const_pointer_cast<TlsInfo>(t.tls_info(link)); })
      .def("close", [](Transport& t, double flush) { t.close(nanoseconds(flush)); }, ReleaseGil());
}

void bind_transfers(py::class_<Transport>& transport) {
  transport
      .def(
          "send",
          [](Transport& t, uint64_t link, uint8_t kind, uint32_t round, uint32_t block,
             std::shared_ptr<Source> source) { t.send(link, key_of(kind, round, block), std::move(source)); },
          py::arg("link"), py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("source").none(false))
      .def(
          "receive",
          [](Transport& t, uint64_t link, uint8_t kind, uint32_t round, uint32_t block, std::shared_ptr<Buffer> buffer,
             const Layout& layout, uint64_t start, std::shared_ptr<Listener> listener) {
            t.receive(link, key_of(kind, round, block), std::move(buffer), layout, start, std::move(listener));
          },
          py::arg("link"), py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("buffer").none(false),
          py::arg("layout"), py::arg("start") = 0, py::arg("listener") = nullptr)
      .def("cancel_receive", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round,
                                uint32_t block) { t.cancel_receive(link, key_of(kind, round, block)); })
      .def("refuse_receive", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round,
                                uint32_t block) { t.refuse_receive(link, key_of(kind, round, block)); })
      .def("cancel_send", [](Transport& t, uint64_t link, uint8_t kind, uint32_t round,
                             uint32_t block) { t.cancel_send(link, key_of(kind, round, block)); })
      .def("make_source", &Transport::make_source, py::arg("buffer").none(false), py::arg("layout"),
           py::arg("complete"));
}

}  // namespace

void bind_transport(py::module_& m) {
  py::register_exception<ProtocolError>(m, "ProtocolError");
  py::register_exception_translator(&translate);
  m.attr("PROTOCOL_VERSION") = kProtocolVersion;
  m.attr("MAX_LANES") = kMaxLanes;
  m.def("crc32c", [](const py::buffer& data) {
    return over(data, [](const void* at, size_t bytes) { return crc32c(at, bytes); });
  });
  m.def("monotonic_ns", &monotonic_ns);
  bind_data(m);
  bind_event(m);
  bind_encoder(m);
  bind_tls(m);
  bind_stats(m);
  py::class_<Transport> transport(m, "Transport");
  transport.def(py::init(&make_transport), py::arg("bytes_per_second") = 0.0, py::arg("delay") = 0.0,
                py::arg("idle_timeout") = 60.0, py::arg("opening_timeout") = 10.0,
                py::arg("max_links") = AdmissionLimits{}.links, py::arg("max_strangers") = AdmissionLimits{}.strangers,
                py::arg("max_strangers_per_network") = AdmissionLimits{}.strangers_per_network,
                py::arg("window_bytes") = uint64_t{256} << 20, py::arg("tls") = nullptr);
  bind_links(transport);
  bind_transfers(transport);
}

}  // namespace parablock
