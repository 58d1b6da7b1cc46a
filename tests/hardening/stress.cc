// Several threads on the native classes at once, without Python: what ThreadSanitizer and LeakSanitizer see best.
// Each scenario checks its results, too. Usage: stress [ROUNDS]
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "codec.h"
#include "encoder.h"
#include "inspector.h"
#include "ring.h"
#include "thread_pool.h"
#include "transport.h"

namespace parablock {
namespace {

constexpr int64_t kDeadlineNs = 60'000'000'000;
constexpr int kMostUnread = 50;
constexpr size_t kLanes = 3;
constexpr uint8_t kUp = 1;
constexpr uint8_t kDown = 2;
constexpr uint8_t kNeverSent = 3;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress: expected that %s\n", what);
  std::abort();
}

std::vector<float> random_floats(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// ---- The codec's pool: callers that share its workers get the bytes that one thread gets.

void pool(int rounds) {
  constexpr int64_t kNumel = 3 * kSplitMultiple + 128;
  const std::vector<float> now = random_floats(kNumel, 1);
  const std::vector<float> ref = random_floats(kNumel, 2);
  auto encoded = [&](Format format, int threads) {
    std::vector<uint8_t> body(scale_bytes(format, kNumel) + code_bytes(format, kNumel));
    encode(now.data(), Dtype::kFp32, ref.data(), Dtype::kFp32, nullptr, nullptr, kNumel, format,
           {body.data(), body.data() + scale_bytes(format, kNumel)}, threads);
    return body;
  };
  const std::vector<uint8_t> int8 = encoded(Format::kInt8, 1);
  const uint64_t print = fingerprint(now.data(), now.size() * 4, 1);
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller) {
    callers.emplace_back([&] {
      std::vector<int64_t> hi(kNumel), lo(kNumel);
      std::vector<float> mean(kNumel), decoded(kNumel);
      for (int round = 0; round < rounds; ++round) {
        const ConstPlanes planes{int8.data(), int8.data() + scale_bytes(Format::kInt8, kNumel)};
        check(encoded(Format::kInt8, 3) == int8, "encode gives the same bytes with every number of threads");
        check(fingerprint(now.data(), now.size() * 4, 3) == print, "a fingerprint does not depend on the threads");
        check(inspect(planes, kNumel, Format::kInt8, 3).invalid == 0, "an encoded body is valid");
        const Contribution twice[] = {{planes, Format::kInt8, 1.0}, {planes, Format::kInt8, 1.0}};
        accumulate(hi.data(), lo.data(), twice, kNumel, true, 3);
        accumulated_mean(hi.data(), lo.data(), false, {}, 2.0, kNumel, mean.data(), 2);
        decode(planes, kNumel, Format::kInt8, decoded.data(), 3);
        check(mean == decoded, "the mean of two equal contributions is either");
        accumulated_mean(nullptr, nullptr, true, twice, 2.0, kNumel, mean.data(), 3);
        check(mean == decoded, "also when they are held until then");
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
}

// ---- Transfers: the encode thread raises watermarks while the loop sends, other threads post, cancel and look.

struct Peer {
  // Waits for an event that is one of these; others are dropped.
  template <class Is>
  Event expect(Is is) {
    while (true) {
      std::optional<Event> event = transport.next_event(kDeadlineNs);
      check(event.has_value(), "something happens before the deadline");
      if (event->type == Event::Type::kControl) ++messages;
      // Connections that became lanes end as links.
      check(event->type != Event::Type::kClosed || event->link != link, ("the link stays: " + event->text).c_str());
      if (is(*event)) return *event;
    }
  }
  Event expect(Event::Type type) {
    return expect([type](const Event& event) { return event.type == type; });
  }

  Transport transport{{}};
  uint64_t link = 0;
  std::atomic<int> messages{0};  // that came
};

void connect(Peer& client, Peer& server) {
  client.link = client.transport.connect("127.0.0.1", server.transport.listen("127.0.0.1", 0), kDeadlineNs);
  server.link = server.expect(Event::Type::kConnected).link;
}

// What a block's upload and the broadcast of its change are, with every buffer used once.
class Transfers {
 public:
  Transfers() {
    client_.transport.record(moved_);
    connect(client_, server_);
    const std::string lane_key = server_.transport.offer_lanes(server_.link, kLanes - 1, kDeadlineNs);
    client_.transport.attach_lanes(client_.link, lane_key, kLanes - 1, kDeadlineNs);
    encode(now_.data(), Dtype::kFp32, ref_.data(), Dtype::kFp32, nullptr, nullptr, kNumel, Format::kInt8,
           {expected_.data(), expected_.data() + scale_bytes(Format::kInt8, kNumel)}, 1);
  }

  void run(int rounds) {
    std::thread spectator([this] { look_on(); });
    std::thread uploads([this, rounds] {
      for (int round = 0; round < rounds; ++round) upload(key_of(round));
    });
    for (int round = 0; round < rounds; ++round) receive(key_of(round), round % 4 == 3);
    uploads.join();
    over_ = true;
    spectator.join();
  }

 private:
  static constexpr int64_t kNumel = 64 * 128;
  static constexpr int64_t kChunk = 128;

  static TransferKey key_of(int round) { return {kUp, static_cast<uint32_t>(round), 0}; }

  void look_on() {
    for (int sent = 0; !over_.load();) {
      client_.transport.stats(client_.link);
      for (const auto& ring : {encoded_, moved_}) {
        for (const Record& record : ring->drain())
          check(record.start_ns > 0 && record.end_ns >= record.start_ns, "a record is whole or not there");
      }
      server_.transport.cancel_receive(server_.link, {kNeverSent, 0, 0});
      // A link ends when too much of what it says is left unread.
      if (sent - client_.messages.load() < kMostUnread) {
        server_.transport.send_control(server_.link, "from another thread");
        ++sent;
      }
      std::this_thread::yield();
    }
  }

  void upload(TransferKey key) {
    auto source = client_.transport.make_source(std::make_shared<Buffer>(layout_.bytes()), layout_, false);
    auto job = std::make_shared<EncodeJob>(
        std::vector<EncodePiece>{{now_.data(), Dtype::kFp32, ref_.data(), Dtype::kFp32, nullptr, nullptr, kNumel}},
        Format::kInt8, source, key);
    encoder_.submit(job);
    client_.transport.send(client_.link, key, source);
    client_.expect([&](const Event& event) {
      return event.key == key && (event.type == Event::Type::kSent || event.type == Event::Type::kRefused);
    });
    check(job->wait(kDeadlineNs), "the encode thread gets to every job");
  }

  // `cancelled`: at any moment, before, in the middle of, or after its bytes.
  void receive(TransferKey key, bool cancelled) {
    auto buffer = std::make_shared<Buffer>(layout_.bytes());
    if (key.round % 2 == 0) return inspect_upload(key, buffer);
    auto watermark = std::make_shared<Watermark>([] {});
    server_.transport.receive(server_.link, key, buffer, layout_, 0, watermark);
    if (cancelled) {
      server_.transport.cancel_receive(server_.link, key);
      return;
    }
    // What is below the watermark is read while the rest still arrives.
    for (uint64_t chunk = 0; chunk < layout_.chunks();) {
      if (watermark->received() < layout_.offset_of_end(chunk + 1)) {
        std::this_thread::yield();
        continue;
      }
      for (const Segment& part : layout_.segments(buffer->data(), chunk))
        check(std::equal(part.data, part.data + part.bytes, expected_.begin() + (part.data - buffer->data())),
              "what is below a watermark is final");
      ++chunk;
    }
    server_.expect([&](const Event& event) { return event.key == key && event.type == Event::Type::kReceived; });
    check(std::equal(expected_.begin(), expected_.end(), buffer->data()), "the bytes that were encoded arrive");
  }

  // The loop thread inspects, and this thread reads the result once the upload is complete.
  void inspect_upload(TransferKey key, const std::shared_ptr<Buffer>& buffer) {
    auto inspector = std::make_shared<Inspector>(layout_, Format::kInt8);
    server_.transport.receive(server_.link, key, buffer, layout_, 0, inspector);
    server_.expect([&](const Event& event) { return event.key == key && event.type == Event::Type::kReceived; });
    const Inspection found = inspector->result();
    check(found.invalid == 0 && found.largest > 0, "an inspector has seen the bytes that were encoded");
  }

  const Layout layout_ = body_layout(Format::kInt8, kNumel, kChunk);
  const std::vector<float> now_ = random_floats(kNumel, 3);
  const std::vector<float> ref_ = random_floats(kNumel, 4);
  std::vector<uint8_t> expected_ = std::vector<uint8_t>(layout_.bytes());
  // So small that writers overtake the reader all the time.
  std::shared_ptr<Ring> encoded_ = std::make_shared<Ring>(64);
  std::shared_ptr<Ring> moved_ = std::make_shared<Ring>(64);
  Encoder encoder_{encoded_};
  Peer client_;
  Peer server_;
  std::atomic<bool> over_{false};
};

// ---- Coming and going: links opened and closed from several threads while one source is broadcast to all of them.

void links(int rounds) {
  const Layout layout{.units = 4096, .scale_bytes = 0, .code_bytes = 16, .chunk_units = 64};
  Peer server;
  const uint16_t port = server.transport.listen("127.0.0.1", 0);
  auto buffer = std::make_shared<Buffer>(layout.bytes());
  std::fill_n(buffer->data(), layout.bytes(), uint8_t{7});
  auto source = server.transport.make_source(buffer, layout, true);
  constexpr int kClients = 4;
  std::vector<std::thread> clients;
  for (int index = 0; index < kClients; ++index) {
    clients.emplace_back([&, index] {
      for (int round = 0; round < rounds; ++round) {
        Peer client;
        client.link = client.transport.connect("127.0.0.1", port, kDeadlineNs);
        auto into = std::make_shared<Buffer>(layout.bytes());
        client.transport.receive(client.link, {kDown, 0, 0}, into, layout, 0, nullptr);
        client.transport.send_control(client.link, "hello");
        if ((round + index) % 3 == 0) continue;  // closes in the middle of whatever is going on
        client.expect(Event::Type::kReceived);
        check(std::all_of(into->data(), into->data() + layout.bytes(), [](uint8_t byte) { return byte == 7; }),
              "a broadcast is whole on every link");
      }
    });
  }
  std::thread acceptor([&] {
    for (int gone = 0; gone < kClients * rounds;) {
      std::optional<Event> event = server.transport.next_event(kDeadlineNs);
      check(event.has_value(), "something happens before the deadline");
      if (event->type == Event::Type::kConnected) server.transport.send(event->link, {kDown, 0, 0}, source);
      if (event->type == Event::Type::kClosed) ++gone;
    }
  });
  for (std::thread& client : clients) client.join();
  acceptor.join();
}

}  // namespace
}  // namespace parablock

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 50;
  parablock::pool(rounds);
  parablock::Transfers().run(rounds);
  parablock::links(rounds);
  std::printf("stress: %d rounds of 3 scenarios\n", rounds);
}
