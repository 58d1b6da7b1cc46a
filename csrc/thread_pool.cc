// The pool behind parallel_for. One mutex guards the queue of jobs; an atomic counter deals out the pieces of a job.
#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>

#include "thread.h"

namespace parablock::internal {
namespace {

constexpr int kMaxWorkers = 255;

// Lives on the stack of the calling thread, which returns only when no worker can reach the job any more.
struct Job {
  void (*fn)(void*, int64_t, int64_t);
  void* context;
  int64_t total;
  int64_t piece;
  std::atomic<int64_t> next{0};
  int helpers_wanted;  // guarded by Pool::mutex_
  int helpers_active = 0;  // guarded by Pool::mutex_
  std::condition_variable idle;

  void work() {
    for (;;) {
      const int64_t begin = next.fetch_add(piece, std::memory_order_relaxed);
      if (begin >= total) return;
      fn(context, begin, std::min(begin + piece, total));
    }
  }
};

class Pool {
 public:
  void run(Job& job) {
    const int helpers = job.helpers_wanted;  // workers count it down as soon as they see the job
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      queue_.push_back(&job);
    }
    for (int i = helpers; i > 0; --i) wake_.notify_one();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    const auto place = std::find(queue_.begin(), queue_.end(), &job);
    if (place != queue_.end()) queue_.erase(place);
    job.idle.wait(lock, [&] { return job.helpers_active == 0; });
  }

 private:
  void grow(int wanted) {
    try {
      for (; workers_ < std::min(wanted, kMaxWorkers); ++workers_)
        start_thread("pb-codec", [this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system has no more threads: the caller does the work of the missing helpers.
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return !queue_.empty(); });
      Job& job = *queue_.front();
      if (--job.helpers_wanted == 0) queue_.pop_front();
      ++job.helpers_active;
      lock.unlock();
      job.work();
      lock.lock();
      if (--job.helpers_active == 0) job.idle.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Job*> queue_;  // jobs that still want helpers; guarded by mutex_
  int workers_ = 0;  // guarded by mutex_
};

// Never destroyed: detached workers may outlive static destruction. A forked child abandons the inherited pool, which
// has no threads there and perhaps a locked mutex, and makes its own.
struct Owner {
  pid_t pid;
  Pool pool;
};

Pool& shared_pool() {
  static std::atomic<Owner*> current{nullptr};
  const pid_t pid = getpid();
  Owner* seen = current.load(std::memory_order_acquire);
  while (seen == nullptr || seen->pid != pid) {
    Owner* fresh = new Owner{pid, {}};
    if (current.compare_exchange_strong(seen, fresh, std::memory_order_acq_rel)) return fresh->pool;
    delete fresh;
  }
  return seen->pool;
}

}  // namespace

void run_split(int64_t total, int64_t piece, int threads, void (*fn)(void*, int64_t, int64_t), void* context) {
  const int64_t pieces = (total + piece - 1) / piece;
  const int helpers = static_cast<int>(std::min<int64_t>({threads, pieces, kMaxWorkers + 1})) - 1;
  if (helpers <= 0) {
    fn(context, 0, total);
    return;
  }
  Job job{.fn = fn, .context = context, .total = total, .piece = piece, .helpers_wanted = helpers, .idle = {}};
  shared_pool().run(job);
}

}  // namespace parablock::internal
