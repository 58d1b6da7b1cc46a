// Starts the threads of this library: each has a name, and all signals blocked, so that signals go to the program's own
// threads, where Python handles them.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <thread>
#include <utility>

namespace parablock {

// Blocks all signals in the calling thread while it lives. A thread started meanwhile inherits the blocked signals.
class SignalBlock {
 public:
  SignalBlock() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalBlock() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalBlock(const SignalBlock&) = delete;
  SignalBlock& operator=(const SignalBlock&) = delete;

 private:
  sigset_t before_;
};

// `name`: at most 15 characters; set when this returns. Throws std::system_error when the system has no more threads.
template <class Body>
std::thread start_thread(const char* name, Body body) {
  SignalBlock block;
  std::thread thread(std::move(body));
  pthread_setname_np(thread.native_handle(), name);
  return thread;
}

// A thread that its owner joins, aware of forks: a forked child has no threads of its parent, only this object, so
// `join` does not wait in the child.
class Thread {
 public:
  Thread() = default;
  template <class Body>
  Thread(const char* name, Body body) : thread_(start_thread(name, std::move(body))), process_(getpid()) {}

  bool joinable() const { return thread_.joinable(); }
  bool is_of_this_process() const { return process_ == getpid(); }
  void join() {
    if (is_of_this_process())
      thread_.join();
    else
      thread_.detach();
  }

 private:
  std::thread thread_;
  pid_t process_ = 0;
};

}  // namespace parablock
