// The encode thread: packs a block chunk by chunk into a Source and raises the watermark after each chunk, so that the
// loop thread sends chunk i while chunk i+1 is encoded. The training thread waits for neither.
//
// The caller owns all memory that a job refers to, and keeps it alive and unchanged until the job is done.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "codec.h"
#include "ring.h"
#include "thread.h"
#include "transfer.h"

namespace parablock {

// A range of a block with one dtype for `now` and one for `ref`. Pieces follow one another in the flat block.
struct EncodePiece {
  const void* now;
  Dtype now_dtype;
  const void* ref;
  Dtype ref_dtype;
  const float* residual_in;  // may be null
  float* residual_out;       // may be null
  int64_t numel;             // a multiple of 128
};

class EncodeJob {
 public:
  // `key` identifies the transfer in the records.
  EncodeJob(std::vector<EncodePiece> pieces, Format format, std::shared_ptr<Source> source, TransferKey key);

  bool wait(int64_t timeout_ns);  // true once done
  // Valid once done:
  int64_t bad_groups() const { return bad_groups_; }
  int64_t started_ns() const { return started_ns_; }
  int64_t finished_ns() const { return finished_ns_; }

 private:
  friend class Encoder;
  void run(const Recorder& recorder);
  void note_chunk(const Recorder& recorder, uint64_t chunk, int64_t started_ns);
  int64_t encode_range(int64_t begin, int64_t end, Planes body) const;

  std::vector<EncodePiece> pieces_;
  Format format_;
  std::shared_ptr<Source> source_;
  TransferKey key_;
  std::mutex mutex_;
  std::condition_variable finished_;
  bool done_ = false;
  int64_t bad_groups_ = 0;
  int64_t started_ns_ = 0;
  int64_t finished_ns_ = 0;
};

class Encoder {
 public:
  explicit Encoder(std::shared_ptr<Ring> ring);  // gets a record of each chunk; may be null
  ~Encoder();  // finishes every submitted job

  void submit(std::shared_ptr<EncodeJob> job);

 private:
  void run();

  std::shared_ptr<Ring> ring_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<EncodeJob>> jobs_;
  bool stopping_ = false;
  Thread thread_;
};

// How a body of `numel` elements is cut; `chunk_elements` is a multiple of 128.
Layout body_layout(Format format, int64_t numel, int64_t chunk_elements);

}  // namespace parablock
