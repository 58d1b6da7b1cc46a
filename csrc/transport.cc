#include "transport.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <future>
#include <stdexcept>
#include <utility>

namespace parablock {
namespace {

constexpr int64_t kHousekeepingNs = 1'000'000'000;
constexpr int64_t kAbsentNs = 1'000'000'000;  // a loop that wakes this much too late was absent
constexpr int kAcceptsPerTurn = 64;
// On a fast link, the turn after one that moved this many bytes is due sooner than the thread could sleep and wake up,
// so the thread busy-polls for kSpinNs. On a slow link such turns are rare, so busy-polling in vain costs little. The
// thread also busy-polls after a control message: messages are rare, and many are answered at once.
constexpr uint64_t kBusyBytes = 64 << 10;
constexpr int64_t kSpinNs = 50'000;
constexpr size_t kRememberedKeys = 4096;  // for a trusted peer
constexpr size_t kUnreadBytes = 1 << 20;             // of a link's events, above which reading from the link stops
constexpr size_t kUnreadBytesOfStranger = 16 << 10;  // the same for a peer that has not proved its identity
constexpr size_t kMostEvents = 4096;  // untaken events at which newcomers stay in the kernel's backlog

constexpr const char* kClosed = "the transport is closed: make a new one";

bool lacks_descriptors(int error) { return error == EMFILE || error == ENFILE; }

Fd try_to_accept(int listener) { return Fd(accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC)); }

bool somebody_waits(int listener) {
  pollfd waiting{listener, POLLIN, 0};
  return poll(&waiting, 1, 0) > 0;
}

uint64_t token_of(uint64_t link, size_t lane) { return link * kMaxLanes + lane; }

}  // namespace

void Transport::Waker::wake() {
  moved = true;
  std::lock_guard lock(mutex);
  if (loop != nullptr) loop->wake();
}

Transport::Transport(TransportOptions options)
    : options_(std::move(options)), waker_(std::make_shared<Waker>()), admission_(options_.admission) {
  waker_->loop = &loop_;
  thread_ = Thread("pb-transport", [this] { run(); });
}

Transport::~Transport() { close(0); }

void Transport::close(int64_t flush_ns) {
  if (!thread_.is_of_this_process()) {  // forked child: the missing thread may have left any mutex locked
    if (thread_.joinable()) thread_.join();
    return;
  }
  std::lock_guard closing(close_mutex_);
  if (!thread_.joinable()) return;
  commands_.push([this, flush_ns] {
    stop_deadline_ns_ = monotonic_ns() + flush_ns;
    listen_sockets_.close();
    for (auto& [id, link] : links_) link->close_after_flush(stop_deadline_ns_, "closed");
    agenda_.stir_all();
    stopping_ = true;
  });
  thread_.join();
  {
    std::lock_guard lock(waker_->mutex);
    waker_->loop = nullptr;
  }
  commands_.close();
}

uint16_t Transport::listen(const std::string& host, uint16_t port) {
  Fd fd = listen_tcp(host, port);
  uint16_t taken = local_port(fd);
  listen_sockets_.watch(fd);
  if (!commands_.push([this, fd = std::make_shared<Fd>(std::move(fd))] { listen_sockets_.add(std::move(*fd)); }))
    throw std::runtime_error(kClosed);
  return taken;
}

uint64_t Transport::connect(const std::string& host, uint16_t port, int64_t timeout_ns) {
  auto fd = std::make_shared<Fd>(connect_tcp(host, port, timeout_ns));
  uint64_t id = next_link_++;
  if (!commands_.push([this, fd, id, host] { add_link(id, std::move(*fd), host); })) throw std::runtime_error(kClosed);
  return id;
}

// ---- Commands: queued by any thread, carried out by the loop thread

void Transport::push_on_link(uint64_t id, std::function<void(Link&)> action) {
  commands_.push([this, id, action = std::move(action)] {
    auto found = links_.find(id);
    if (found == links_.end()) return;  // its kClosed event has said so
    agenda_.stir(id);
    try {
      action(*found->second);
    } catch (const std::exception& error) {
      found->second->close_after_flush(monotonic_ns(), error.what());
    }
  });
}

void Transport::send_control(uint64_t link, std::string message) {
  events_.spin_until(monotonic_ns() + kSpinNs);
  push_on_link(link, [this, message = std::move(message)](Link& l) {
    conversing_ = true;
    l.session().send_control(message);
  });
}

void Transport::send(uint64_t link, TransferKey key, std::shared_ptr<Source> source) {
  push_on_link(link, [key, source = std::move(source)](Link& l) { l.session().send(key, source); });
}

void Transport::receive(uint64_t link, TransferKey key, std::shared_ptr<Buffer> buffer, Layout layout, uint64_t start,
                        std::shared_ptr<Listener> listener) {
  layout.check(buffer->size());
  layout.check_start(start);
  push_on_link(link, [key, buffer = std::move(buffer), layout, start, listener = std::move(listener)](Link& l) {
    l.session().receive(key, buffer, layout, start, listener);
  });
}

void Transport::cancel_send(uint64_t link, TransferKey key) {
  push_on_link(link, [key](Link& l) { l.session().cancel_send(key); });
}

void Transport::refuse_receive(uint64_t link, TransferKey key) {
  push_on_link(link, [key](Link& l) { l.session().refuse_receive(key); });
}

void Transport::cancel_receive(uint64_t link, TransferKey key) {
  push_on_link(link, [key](Link& l) { l.session().cancel_receive(key); });
}

void Transport::trust(uint64_t link, uint64_t run, size_t control_bytes, size_t queue_bytes) {
  push_on_link(link, [this, run, control_bytes, queue_bytes](Link& l) {
    l.session().set_limits({.control_bytes = control_bytes,
                            .queue_bytes = queue_bytes,
                            .window_bytes = options_.window_bytes,
                            .remembered_keys = kRememberedKeys});
    l.session().set_run(run);
    admission_.prove(l.id());
  });
}

std::string Transport::offer_lanes(uint64_t link, size_t count, int64_t within_ns) {
  std::string key = random_lane_key();
  push_on_link(link, [this, key, count, within_ns](Link& l) {
    lane_keys_.offer(l.id(), key, std::min(count, kMaxLanes - 1), monotonic_ns() + within_ns);
  });
  return key;
}

void Transport::attach_lanes(uint64_t id, const std::string& key, size_t count, int64_t timeout_ns) {
  if (key.size() != kLaneKeyBytes || count >= kMaxLanes)
    throw std::invalid_argument("expected a lane key of " + std::to_string(kLaneKeyBytes) + " bytes and at most " +
                                std::to_string(kMaxLanes - 1) + " further lanes; found " + std::to_string(key.size()) +
                                " bytes and " + std::to_string(count) + " lanes");
  Fd same_peer = duplicate_of(id);
  auto opened = std::make_shared<std::vector<Fd>>();
  for (size_t i = 0; i < count; ++i) opened->push_back(connect_to_peer_of(same_peer.get(), timeout_ns));
  push_on_link(id, [this, key, opened](Link& link) {
    for (Fd& fd : *opened) {
      add_lane(link, open_channel(std::move(fd), link.host()));
      link.lane(link.lanes() - 1).ask(attach_frame(key));
    }
  });
}

// The loop thread makes the copy, because the command that adds the link may still be queued. A copy, because the link
// may end meanwhile and its descriptor number be reused.
Fd Transport::duplicate_of(uint64_t id) {
  auto answer = std::make_shared<std::promise<Fd>>();
  std::future<Fd> copy = answer->get_future();
  push_on_link(id, [answer](Link& link) {
    try {
      answer->set_value(duplicate(link.lane(0).fd()));
    } catch (...) {  // out of descriptors: no reason to end the link
      answer->set_exception(std::current_exception());
    }
  });
  answer.reset();
  try {
    return copy.get();
  } catch (const std::future_error&) {  // the command was dropped: no link, or no transport any more
    throw std::invalid_argument("the link is gone");
  }
}

void Transport::close_link(uint64_t link, std::string reason, int64_t flush_ns) {
  push_on_link(link, [reason = std::move(reason), flush_ns](Link& l) {
    l.close_after_flush(monotonic_ns() + flush_ns, reason);
  });
}

std::shared_ptr<Source> Transport::make_source(std::shared_ptr<Buffer> buffer, Layout layout, bool complete) {
  layout.check(buffer->size());
  return std::make_shared<Source>(std::move(buffer), layout, complete ? layout.chunks() : 0,
                                  [waker = waker_] { waker->wake(); });
}

void Transport::record(std::shared_ptr<Ring> ring) {
  commands_.push([this, ring = std::move(ring)] {
    for (auto& [id, link] : links_) link->record(ring.get());
    ring_ = ring;
  });
}

// ---- Events

std::optional<Event> Transport::next_event(int64_t timeout_ns) { return events_.next(timeout_ns); }

void Transport::publish(Event event) {
  conversing_ = conversing_ || event.type == Event::Type::kControl;
  const size_t most = admission_.is_stranger(event.link) ? kUnreadBytesOfStranger : kUnreadBytes;
  events_.push(std::move(event), most);
}

void Transport::publish(Link& link) {
  for (Event& event : link.session().take_events()) {
    event.link = link.id();
    if (event.at_ns == 0) event.at_ns = monotonic_ns();
    publish(std::move(event));
  }
  link.pause_reads(events_.full(link.id()));
}

LinkStats Transport::stats(uint64_t id) const {
  std::lock_guard lock(links_mutex_);
  auto found = links_.find(id);
  if (found == links_.end()) return {};
  return found->second->stats();
}

std::shared_ptr<const TlsInfo> Transport::tls_info(uint64_t id) const {
  std::lock_guard lock(links_mutex_);
  auto found = links_.find(id);
  return found == links_.end() ? nullptr : found->second->lane(0).channel().tls();
}

// ---- The loop thread

// If no descriptor is left, evicts one stranger for the newcomer; only one, because other threads may take the freed
// descriptor. On failure `errno` is that of the last try.
Fd Transport::accept_one(int listener) {
  Fd fd = try_to_accept(listener);
  if (fd.get() >= 0 || !lacks_descriptors(errno)) return fd;
  if (!somebody_waits(listener)) {  // the kernel reports a missing descriptor even if no connection waits
    errno = EAGAIN;
    return fd;
  }
  std::optional<uint64_t> evicted = admission_.make_room();
  if (!evicted) return fd;
  links_.at(*evicted)->fail("closed for a newcomer: no descriptor is left, and it has not said who it is");
  drop(*evicted);
  return try_to_accept(listener);
}

void Transport::accept_some(int listener, int64_t now_ns) {
  for (int turn = 0; turn < kAcceptsPerTurn; ++turn) {
    // Back-pressure: each connection makes two events, kConnected and kClosed, even if the program takes no events.
    if (events_.size() >= kMostEvents) return listen_sockets_.pause(now_ns + kHousekeepingNs);
    Fd fd = accept_one(listener);
    if (fd.get() < 0) {
      if (lacks_descriptors(errno) || errno == ENOBUFS || errno == ENOMEM)
        listen_sockets_.pause(now_ns + kHousekeepingNs);
      return;
    }
    uint64_t id = next_link_++;
    Admission::Answer answer = admission_.enter(id, peer_network(fd.get()));
    if (answer.evicted) {
      links_.at(*answer.evicted)->fail("closed for a newcomer: too many connections have not said who they are");
      drop(*answer.evicted);
    }
    if (!answer.admitted) continue;
    Event connected;
    connected.type = Event::Type::kConnected;
    connected.text = peer_address(fd.get());
    connected.at_ns = now_ns;
    connected.link = id;
    publish(std::move(connected));
    add_link(id, std::move(fd), "");
  }
}

Channel Transport::open_channel(Fd fd, const std::string& host) const {
  if (!options_.tls) return Channel(std::move(fd));
  auto tls = host.empty() ? options_.tls->accept(fd.get()) : options_.tls->connect(fd.get(), host);
  return Channel(std::move(fd), std::move(tls));
}

void Transport::add_link(uint64_t id, Fd fd, const std::string& host) {
  Event failed;
  try {
    auto link = std::make_unique<Link>(id, host, open_channel(std::move(fd), host),
                                       SessionLimits{.window_bytes = options_.window_bytes}, incoming_,
                                       options_.idle_timeout_ns, options_.opening_timeout_ns);
    if (ring_ != nullptr) link->record(ring_.get());
    link->shaper().configure(options_.bytes_per_second, options_.delay_ns);
    loop_.add(link->lane(0).fd(), token_of(id, 0));
    agenda_.stir(id);
    std::lock_guard lock(links_mutex_);
    links_.emplace(id, std::move(link));
    return;
  } catch (const std::exception& error) {
    failed.text = error.what();
  }
  failed.type = Event::Type::kClosed;
  failed.link = id;
  failed.at_ns = monotonic_ns();
  publish(std::move(failed));
  admission_.leave(id);
}

void Transport::add_lane(Link& link, Channel channel) {
  if (link.lanes() == kMaxLanes)
    throw std::invalid_argument("a link has at most " + std::to_string(kMaxLanes) + " lanes");
  std::lock_guard lock(links_mutex_);  // other threads read the link's stats
  Lane& lane = link.add_lane(std::move(channel));
  loop_.add(lane.fd(), token_of(link.id(), lane.index()));
}

// Moves the newcomer's connection to the link that its key belongs to, and ends the newcomer's own link.
void Transport::attach(Link& newcomer, const std::string& key, int64_t now_ns) {
  std::optional<uint64_t> owner = lane_keys_.redeem(key, now_ns);
  if (!owner) {
    newcomer.fail("it asked to become a lane with an unknown or expired key");
    return;
  }
  loop_.remove(newcomer.lane(0).fd());
  std::unique_lock lock(links_mutex_);  // other threads read the newcomer's channel
  Channel channel = std::move(newcomer.lane(0).channel());
  lock.unlock();
  Link& link = *links_.at(*owner);
  add_lane(link, std::move(channel));
  link.session().owe_ping(link.lanes() - 1);  // the peer uses the lane after the first bytes on it
  agenda_.stir(*owner);
  newcomer.become_lane("it became a lane of link " + std::to_string(*owner));
}

void Transport::drop(uint64_t id) {
  admission_.leave(id);
  lane_keys_.forget(id);
  auto found = links_.find(id);
  agenda_.forget(id);
  publish(*found->second);  // events from before the end are not lost
  found->second->session().note_end();
  Event closed;
  closed.type = Event::Type::kClosed;
  closed.link = id;
  closed.text = found->second->reason();
  closed.permanent = found->second->permanent();
  closed.became_lane = found->second->became_lane();
  closed.unfinished = found->second->session().unfinished();
  closed.at_ns = monotonic_ns();
  // Closing the descriptors does neither of these while `duplicate_of` has a copy, or a forked child, which has copies
  // until its first instruction.
  for (size_t i = 0; i < found->second->lanes(); ++i) {
    const int fd = found->second->lane(i).fd();
    if (fd < 0) continue;  // it was refused, or has become a lane of another link
    loop_.remove(fd);
    shutdown(fd, SHUT_RDWR);
  }
  {
    std::lock_guard lock(links_mutex_);
    links_.erase(found);
  }
  publish(std::move(closed));
}

void Transport::drop_all() {
  while (!links_.empty()) drop(links_.begin()->first);
  over_.clear();
}

// Any error here ends only this link.
void Transport::service_link(Link& link, int64_t now_ns) {
  bool going_on = true;
  const uint64_t before = link.bytes_moved();
  try {
    for (size_t lane = 0; lane < link.lanes() && going_on; ++lane)
      if (readable_.contains(token_of(link.id(), lane)) || link.unread(link.lane(lane)))
        going_on = link.read(link.lane(lane), now_ns);
    publish(link);
    if (auto key = link.session().take_attach_key()) {
      attach(link, *key, now_ns);
      going_on = false;
    }
    going_on = going_on && link.write(now_ns);
    close_refused_lanes(link);
    if (going_on) watch(link);
    if (going_on) agenda_.note(link.id(), link.wake_at(), link.session().sends_data(), link.reads_paused());
  } catch (const std::exception& error) {
    going_on = link.fail(error.what());
  }
  moved_ += link.bytes_moved() - before;
  if (!going_on) over_.push_back(link.id());
}

void Transport::close_refused_lanes(Link& link) {
  for (Lane* lane : link.refused_lanes()) {
    loop_.remove(lane->fd());
    shutdown(lane->fd(), SHUT_RDWR);
    std::lock_guard lock(links_mutex_);  // other threads read the link's stats
    Channel closed = std::move(lane->channel());
  }
}

void Transport::watch(Link& link) {
  for (size_t index = 0; index < link.lanes(); ++index) {
    Lane& lane = link.lane(index);
    if (lane.dropped()) continue;
    Interest interest = link.interest(lane);
    if (interest == lane.watched) continue;
    lane.watched = interest;
    loop_.change(lane.fd(), token_of(link.id(), index), interest);
  }
}

void Transport::service(int64_t now_ns, const std::vector<Loop::Ready>& ready) {
  listen_sockets_.resume_when_due(now_ns);
  readable_.clear();
  for (const Loop::Ready& at : ready) {
    if (at.token >= ListenSockets::kTokens) {
      if (int fd = listen_sockets_.with_token(at.token); fd >= 0) accept_some(fd, now_ns);
      continue;
    }
    if (at.readable) readable_.insert(at.token);
    agenda_.stir(at.token / kMaxLanes);
  }
  agenda_.take(now_ns, waker_->moved.exchange(false), in_turn_);
  for (uint64_t id : in_turn_) {
    auto found = links_.find(id);
    if (found != links_.end()) service_link(*found->second, now_ns);  // else it was dropped for a newcomer
  }
  for (uint64_t id : over_) drop(id);
  over_.clear();
}

// After this process was stopped or got no CPU time: the peers' bytes wait in the sockets, on more of them than the
// kernel reports at once, so the time away must not count as any peer's silence.
void Transport::forgive_own_absence(int64_t now_ns) {
  const int64_t away_ns = now_ns - std::exchange(last_turn_ns_, now_ns);
  if (away_ns <= kHousekeepingNs + kAbsentNs) return;
  for (auto& [id, link] : links_) link->forgive(away_ns, now_ns);
}

void Transport::run() {
  std::vector<Loop::Ready> ready;
  last_turn_ns_ = monotonic_ns();
  while (!(stopping_ && (links_.empty() || monotonic_ns() >= stop_deadline_ns_))) {
    const int64_t wake_at = agenda_.due_ns(monotonic_ns() + kHousekeepingNs);
    const bool busy = std::exchange(moved_, 0) >= kBusyBytes;
    const bool conversing = std::exchange(conversing_, false);
    loop_.wait(wake_at, busy || conversing ? kSpinNs : 0, ready);
    try {
      commands_.carry_out();
      const int64_t now_ns = monotonic_ns();
      forgive_own_absence(now_ns);
      service(now_ns, ready);
    } catch (const std::exception& error) {  // not one link's fault: out of memory here or in the kernel
      for (auto& [id, link] : links_) link->fail(error.what());
      drop_all();
    }
  }
  drop_all();
  listen_sockets_.close();
}

}  // namespace parablock
