// Python bindings for tests and fuzzing only: the protocol without a socket, a link's shaper, every checksum variant.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

#include "bind.h"
#include "crc32c.h"
#include "session.h"
#include "shaper.h"

namespace parablock {
namespace {

void check_lane(size_t lane) {
  if (lane >= kMaxLanes) throw std::invalid_argument("a link has at most " + std::to_string(kMaxLanes) + " lanes");
}

// Bytes in: as a lane's reader would deliver them.
void feed(Session& session, const py::bytes& bytes, int64_t now_ns, size_t lane) {
  check_lane(lane);
  std::string_view left = bytes;
  while (!left.empty()) {
    size_t taken = 0;
    for (const Segment& region : session.want(lane)) {
      size_t count = std::min(region.bytes, left.size() - taken);
      std::copy_n(left.data() + taken, count, region.data);
      taken += count;
    }
    session.arrived(taken, now_ns, lane);
    left.remove_prefix(taken);
  }
}

// Bytes out: the frame that a lane's writer would take next.
std::optional<py::bytes> next_frame(Session& session, int64_t now_ns, size_t lane) {
  check_lane(lane);
  std::optional<OutFrame> frame = session.next_frame(now_ns, lane);
  if (!frame) return std::nullopt;
  std::string bytes(frame->header.begin(), frame->header.end());
  bytes += frame->inline_payload;
  for (const Segment& part : frame->payload) bytes.append(reinterpret_cast<const char*>(part.data), part.bytes);
  return py::bytes(bytes);
}

size_t wanted_bytes(Session& session, size_t lane) {
  check_lane(lane);
  size_t bytes = 0;
  for (const Segment& region : session.want(lane)) bytes += region.bytes;
  return bytes;
}

void bind_session(py::module_& m) {
  py::class_<Incoming, std::shared_ptr<Incoming>>(m, "Incoming")
      .def(py::init<>())
      .def_property_readonly("count", &Incoming::count);

  py::class_<Session>(m, "Session")
      .def(py::init(
               [](size_t control_bytes, uint64_t window_bytes, size_t queue_bytes, std::shared_ptr<Incoming> incoming) {
                 SessionLimits limits{
                     .control_bytes = control_bytes, .queue_bytes = queue_bytes, .window_bytes = window_bytes};
                 return std::make_unique<Session>(limits, std::move(incoming));
               }),
           py::arg("control_bytes") = 4096, py::arg("window_bytes") = 256 << 20, py::arg("queue_bytes") = 64 << 10,
           py::arg("incoming") = nullptr)
      .def("set_run", &Session::set_run)
      .def("send_control", [](Session& s, const py::bytes& message) { s.send_control(message); })
      .def(
          "send",
          [](Session& s, uint8_t kind, uint32_t round, uint32_t block, std::shared_ptr<Source> source) {
            s.send(key_of(kind, round, block), std::move(source));
          },
          py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("source").none(false))
      .def(
          "receive",
          [](Session& s, uint8_t kind, uint32_t round, uint32_t block, std::shared_ptr<Buffer> buffer,
             const Layout& layout, uint64_t start, std::shared_ptr<Listener> listener) {
            s.receive(key_of(kind, round, block), std::move(buffer), layout, start, std::move(listener));
          },
          py::arg("kind"), py::arg("round"), py::arg("block"), py::arg("buffer").none(false), py::arg("layout"),
          py::arg("start") = 0, py::arg("listener") = nullptr)
      .def("cancel_receive", [](Session& s, uint8_t kind, uint32_t round,
                                uint32_t block) { s.cancel_receive(key_of(kind, round, block)); })
      .def("refuse_receive", [](Session& s, uint8_t kind, uint32_t round,
                                uint32_t block) { s.refuse_receive(key_of(kind, round, block)); })
      .def("cancel_send",
           [](Session& s, uint8_t kind, uint32_t round, uint32_t block) { s.cancel_send(key_of(kind, round, block)); })
      .def("ping", &Session::ping)
      .def("report_stalled", &Session::report_stalled)
      .def("feed", &feed, py::arg("bytes"), py::arg("now_ns") = 0, py::arg("lane") = 0)
      .def("next_frame", &next_frame, py::arg("now_ns") = 0, py::arg("lane") = 0)
      .def("wanted_bytes", &wanted_bytes, py::arg("lane") = 0)
      .def("take_events", &Session::take_events)
      .def("take_attach_key",
           [](Session& s) -> std::optional<py::bytes> {
             std::optional<std::string> key = s.take_attach_key();
             return key ? std::optional<py::bytes>(*key) : std::nullopt;
           })
      .def_property_readonly("corrupt_chunks", &Session::corrupt_chunks)
      .def("unfinished", [](const Session& s) { return resume_points(s.unfinished()); })
      .def_property_readonly("round_trip_ns", &Session::round_trip_ns);
}

void bind_shaper(py::module_& m) {
  py::class_<Shaper>(m, "Shaper")
      .def(py::init([](double bytes_per_second, int64_t delay_ns) {
             Shaper shaper;
             shaper.configure(bytes_per_second, delay_ns);
             return shaper;
           }),
           py::arg("bytes_per_second"), py::arg("delay_ns"))
      .def_property_readonly("active", &Shaper::active)
      .def_property_readonly("free_at", &Shaper::free_at)
      .def(
          "transmit",
          [](Shaper& shaper, size_t bytes, int64_t now_ns, bool waited) {
            Passage passage = shaper.transmit(bytes, now_ns, waited);
            return std::pair(passage.first_ns, passage.last_ns);
          },
          py::arg("bytes"), py::arg("now_ns"), py::arg("waited"));
}

}  // namespace

void bind_testing(py::module_& m) {
  m.def("crc32c_every_way", [](const py::buffer& data) { return over(data, &crc32c_every_way); });
  bind_session(m);
  bind_shaper(m);
}

}  // namespace parablock
