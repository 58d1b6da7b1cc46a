#include "encoder.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

#include "socket.h"

namespace parablock {

Layout body_layout(Format format, int64_t numel, int64_t chunk_elements) {
  if (numel <= 0 || numel % kAlignment != 0 || chunk_elements <= 0 || chunk_elements % kAlignment != 0)
    throw std::invalid_argument("block and chunk lengths must be positive multiples of 128 elements");
  int64_t group = group_size(format);
  return {.units = static_cast<uint64_t>(numel / group),
          .scale_bytes = static_cast<uint32_t>(scale_bytes(format, group)),
          .code_bytes = static_cast<uint32_t>(code_bytes(format, group)),
          .chunk_units = static_cast<uint32_t>(chunk_elements / group)};
}

EncodeJob::EncodeJob(std::vector<EncodePiece> pieces, Format format, std::shared_ptr<Source> source, TransferKey key)
    : pieces_(std::move(pieces)), format_(format), source_(std::move(source)), key_(key) {
  int64_t numel = 0;
  for (const EncodePiece& piece : pieces_) {
    if (piece.numel <= 0 || piece.numel % kAlignment != 0)
      throw std::invalid_argument("the pieces of a block must have lengths that are positive multiples of 128");
    numel += piece.numel;
  }
  if (static_cast<uint64_t>(numel) != source_->layout().units * static_cast<uint64_t>(group_size(format_)))
    throw std::invalid_argument("the pieces of a block must add up to the length of its body");
}

bool EncodeJob::wait(int64_t timeout_ns) {
  std::unique_lock lock(mutex_);
  return finished_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return done_; });
}

// Encodes elements [begin, end) of the block, which may cross pieces.
int64_t EncodeJob::encode_range(int64_t begin, int64_t end, Planes body) const {
  int64_t bad = 0;
  int64_t piece_begin = 0;
  for (const EncodePiece& piece : pieces_) {
    int64_t from = std::max(begin, piece_begin);
    int64_t to = std::min(end, piece_begin + piece.numel);
    if (from < to) {
      int64_t at = from - piece_begin;
      bad += encode(static_cast<const uint8_t*>(piece.now) + at * static_cast<int64_t>(dtype_bytes(piece.now_dtype)),
                    piece.now_dtype,
                    static_cast<const uint8_t*>(piece.ref) + at * static_cast<int64_t>(dtype_bytes(piece.ref_dtype)),
                    piece.ref_dtype, piece.residual_in == nullptr ? nullptr : piece.residual_in + at,
                    piece.residual_out == nullptr ? nullptr : piece.residual_out + at, to - from, format_,
                    {body.scales + scale_bytes(format_, from), body.codes + code_bytes(format_, from)}, 1);
    }
    piece_begin += piece.numel;
  }
  return bad;
}

// Records a chunk that was just encoded. Computes its checksum here to time it; `raise` would compute it untimed.
void EncodeJob::note_chunk(const Recorder& recorder, uint64_t chunk, int64_t started_ns) {
  uint32_t bytes = source_->layout().chunk_bytes(chunk);
  int64_t encoded_ns = monotonic_ns();
  recorder.note(Stage::kEncode, key_, chunk, bytes, started_ns, encoded_ns);
  source_->chunk_crc(chunk);
  recorder.note(Stage::kChecksum, key_, chunk, bytes, encoded_ns, monotonic_ns());
}

void EncodeJob::run(const Recorder& recorder) {
  started_ns_ = monotonic_ns();
  const Layout& layout = source_->layout();
  int64_t group = group_size(format_);
  int64_t numel = static_cast<int64_t>(layout.units) * group;
  int64_t step = int64_t{layout.chunk_units} * group;
  Planes body{source_->body(), source_->body() + layout.units * layout.scale_bytes};
  int64_t bad = 0;
  for (int64_t at = 0; at < numel; at += step) {
    uint64_t chunk = static_cast<uint64_t>(at / step);
    int64_t chunk_started_ns = recorder ? monotonic_ns() : 0;
    bad += encode_range(at, std::min(at + step, numel), body);
    if (recorder) note_chunk(recorder, chunk, chunk_started_ns);
    source_->raise(chunk + 1);
  }
  {
    std::lock_guard lock(mutex_);
    bad_groups_ = bad;
    finished_ns_ = monotonic_ns();
    done_ = true;
  }
  finished_.notify_all();
}

Encoder::Encoder(std::shared_ptr<Ring> ring) : ring_(std::move(ring)) {
  thread_ = Thread("pb-encode", [this] { run(); });
}

Encoder::~Encoder() {
  if (!thread_.is_of_this_process()) {  // forked child: the mutex may stay locked for ever
    thread_.join();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Encoder::submit(std::shared_ptr<EncodeJob> job) {
  {
    std::lock_guard lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  changed_.notify_one();
}

void Encoder::run() {
  while (true) {
    std::shared_ptr<EncodeJob> job;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job->run(Recorder{.ring = ring_.get()});
  }
}

}  // namespace parablock
