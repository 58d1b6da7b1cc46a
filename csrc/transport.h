// The transport of a process: one thread that owns every socket. It never takes the GIL and never calls Python.
//
// Every public function may be called from any thread except the loop thread. Calls that change a link are queued; the
// loop thread carries them out in order and reports the results as Events. A program that does not take a link's events
// stops the reading of that link (back-pressure), not of the others.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "admission.h"
#include "agenda.h"
#include "attach.h"
#include "command_queue.h"
#include "event_queue.h"
#include "link.h"
#include "listen_sockets.h"
#include "loop.h"
#include "session.h"
#include "thread.h"

namespace parablock {

struct TransportOptions {
  double bytes_per_second = 0;  // the most that each link sends; 0: unlimited
  int64_t delay_ns = 0;  // artificial one-way delay of every frame
  int64_t idle_timeout_ns = 60'000'000'000;
  int64_t opening_timeout_ns = 10'000'000'000;  // for a TLS handshake
  AdmissionLimits admission;  // of accepted connections
  uint64_t window_bytes = 256 << 20;  // the most bytes of one transfer that a peer may have under way to this side
  std::shared_ptr<const TlsContext> tls;  // for every link; nullptr: no link uses TLS
};

class Transport {
 public:
  explicit Transport(TransportOptions options);
  ~Transport();  // calls close(0)

  // Throw std::system_error, and std::runtime_error once the transport is closed.
  uint16_t listen(const std::string& host, uint16_t port);  // returns the port taken
  uint64_t connect(const std::string& host, uint16_t port, int64_t timeout_ns);  // blocks; returns the link

  void send_control(uint64_t link, std::string message);
  void send(uint64_t link, TransferKey key, std::shared_ptr<Source> source);
  // Throws std::invalid_argument when the buffer is too small or no chunk begins at `start`. `listener` may be null.
  void receive(uint64_t link, TransferKey key, std::shared_ptr<Buffer> buffer, Layout layout, uint64_t start,
               std::shared_ptr<Listener> listener);
  void cancel_send(uint64_t link, TransferKey key);
  void cancel_receive(uint64_t link, TransferKey key);
  void refuse_receive(uint64_t link, TransferKey key);  // of a key never posted: the peer need not wait for credit
  // The peer has proved its identity: each of its control messages may have up to `control_bytes`, up to `queue_bytes`
  // of those to it may wait until it reads them, and every frame must carry `run`.
  void trust(uint64_t link, uint64_t run, size_t control_bytes, size_t queue_bytes);
  // Lets the peer add up to `count` lanes to the link, for `within_ns`; returns the key that the peer must present.
  std::string offer_lanes(uint64_t link, size_t count, int64_t within_ns);
  // Opens `count` further lanes to the peer of the link; blocks. Throws std::system_error, and std::invalid_argument
  // for a key of the wrong length, too many lanes, or a link that is gone.
  void attach_lanes(uint64_t link, const std::string& key, size_t count, int64_t timeout_ns);
  void close_link(uint64_t link, std::string reason, int64_t flush_ns);  // flushes for at most `flush_ns`

  std::shared_ptr<Source> make_source(std::shared_ptr<Buffer> buffer, Layout layout, bool complete);

  std::optional<Event> next_event(int64_t timeout_ns);
  LinkStats stats(uint64_t link) const;  // zeros when the link is gone
  std::shared_ptr<const TlsInfo> tls_info(uint64_t link) const;  // nullptr: no TLS, not established yet, or gone

  // From now on the loop thread records every stage of each chunk in `ring`; null: stops. The ring may have no other
  // writer.
  void record(std::shared_ptr<Ring> ring);

  // Flushes and closes every link, for at most `flush_ns`, and ends the thread. Idempotent.
  void close(int64_t flush_ns);

 private:
  // Shared with Sources, which may outlive the transport: then `wake` is a no-op.
  struct Waker {
    std::mutex mutex;
    Loop* loop = nullptr;
    std::atomic<bool> moved{false};  // a watermark has risen since the loop last looked
    void wake();
  };

  void run();
  void forgive_own_absence(int64_t now_ns);
  void push_on_link(uint64_t link, std::function<void(Link&)> action);
  Fd duplicate_of(uint64_t link);
  Fd accept_one(int listener);
  void accept_some(int listener, int64_t now_ns);
  Channel open_channel(Fd fd, const std::string& host) const;
  void add_link(uint64_t id, Fd fd, const std::string& host);  // `host`: see Link
  void add_lane(Link& link, Channel channel);
  void attach(Link& newcomer, const std::string& key, int64_t now_ns);
  void service(int64_t now_ns, const std::vector<Loop::Ready>& ready);
  void service_link(Link& link, int64_t now_ns);
  void close_refused_lanes(Link& link);
  void watch(Link& link);
  void drop(uint64_t link);
  void drop_all();
  void publish(Link& link);
  void publish(Event event);

  TransportOptions options_;
  Loop loop_;
  std::shared_ptr<Waker> waker_;
  CommandQueue commands_{loop_};
  EventQueue events_{loop_};

  mutable std::mutex links_mutex_;  // the loop thread takes it to change the map, other threads to read it
  std::map<uint64_t, std::unique_ptr<Link>> links_;
  ListenSockets listen_sockets_{loop_};
  LaneKeys lane_keys_;
  Admission admission_;  // loop thread only
  std::atomic<uint64_t> next_link_{1};

  // Everything from here to stop_deadline_ns_: loop thread only.
  std::shared_ptr<Incoming> incoming_ = std::make_shared<Incoming>();
  std::shared_ptr<Ring> ring_;
  std::set<uint64_t> readable_;  // tokens of the lanes that are readable in this turn
  std::vector<uint64_t> over_;  // links that ended in this turn
  Agenda agenda_;
  std::vector<uint64_t> in_turn_;  // the links to look at in this turn

  uint64_t moved_ = 0;  // bytes of frames in this turn, in and out
  bool conversing_ = false;  // a control message came or left in this turn

  int64_t last_turn_ns_ = 0;  // when the last turn began

  bool stopping_ = false;
  int64_t stop_deadline_ns_ = 0;
  std::mutex close_mutex_;
  Thread thread_;
};

}  // namespace parablock
