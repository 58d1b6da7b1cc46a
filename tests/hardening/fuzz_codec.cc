// Bodies that a stranger made, and blocks with any bits, through every instruction set. Every buffer has exactly the
// size it must have, so that the address sanitizer sees a byte too many.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "codec.h"
#include "fuzz.h"

using namespace parablock;

namespace {

constexpr int64_t kMostGroups = 10;  // of kAlignment elements; there is a way of its own for eight at once
constexpr int kMostTogether = 5;     // contributions; there is a way of its own for four at once
constexpr double kSmallestWeight = 0x1p-64;  // what Accumulator.add lets through
constexpr double kLargestWeight = 0x1p64;

const std::vector<const char*>& instruction_sets() {
  static const std::vector<const char*> sets = [] {
    std::vector<const char*> found;
    for (const char* name : {"portable", "avx2", "avx512", "avx512-vnni"}) {
      try {
        force_instruction_set(name);
        found.push_back(name);
      } catch (const std::invalid_argument&) {  // this machine lacks it
      }
    }
    return found;
  }();
  return sets;
}

// Memory of an exact size whose bytes come from the input. Repeats what there is, so that short inputs reach far.
template <typename T>
struct Block {
  Block(size_t count, Input& input) : Block(count) {
    std::span<const uint8_t> given = input.take_bytes(bytes());
    for (size_t at = 0; at < bytes() && !given.empty(); ++at) raw()[at] = given[at % given.size()];
  }
  explicit Block(size_t count) : count(count), data(new T[count]()) {}
  size_t bytes() const { return count * sizeof(T); }
  uint8_t* raw() { return reinterpret_cast<uint8_t*>(data.get()); }
  bool operator==(const Block& other) const { return std::memcmp(data.get(), other.data.get(), bytes()) == 0; }

  size_t count;
  std::unique_ptr<T[]> data;
};

struct Body {
  Body(Format format, int64_t numel, Input& input)
      : scales(scale_bytes(format, numel), input), codes(code_bytes(format, numel), input) {}
  Body(Format format, int64_t numel) : scales(scale_bytes(format, numel)), codes(code_bytes(format, numel)) {}
  Planes planes() { return {scales.raw(), codes.raw()}; }
  ConstPlanes read() { return {scales.raw(), codes.raw()}; }
  bool operator==(const Body& other) const { return scales == other.scales && codes == other.codes; }

  Block<uint8_t> scales;
  Block<uint8_t> codes;
};

// An upload: a body that may hold anything, and a weight that the accumulator lets through.
struct Upload {
  Upload(Format format, int64_t numel, Input& input) : body(format, numel, input), weight(input.take<double>()) {
    if (!(weight >= kSmallestWeight && weight <= kLargestWeight)) weight = 1;
  }
  Body body;
  double weight;
};

// What a server does with uploads: looks at them and, if an encoder may have made them all, folds them.
struct Folded {
  Folded(std::vector<Upload>& uploads, int64_t numel, Format format)
      : hi(numel), lo(numel), mean(numel), held(numel), decoded(numel) {
    decode(uploads.front().body.read(), numel, format, decoded.data.get(), 1);  // safe on any bytes
    double total_weight = 0;
    std::vector<Contribution> in;
    for (auto& [body, weight] : uploads) {
      const Inspection found = inspect(body.read(), numel, format, 1);
      valid = valid && found.invalid == 0 && found.largest <= std::numeric_limits<float>::max();
      folded = folded && valid && weight * found.largest < kLargestContribution;
      inspection = joined(inspection, found);
      total_weight += weight;
      in.push_back({body.read(), format, weight});
    }
    if (!folded) return;
    accumulate(hi.data.get(), lo.data.get(), in, numel, true, 1);
    accumulated_mean(hi.data.get(), lo.data.get(), false, {}, total_weight, numel, mean.data.get(), 1);
    accumulated_mean(nullptr, nullptr, true, in, total_weight, numel, held.data.get(), 1);
  }

  Inspection inspection{0.0, 0, 0};
  Block<int64_t> hi, lo;
  Block<float> mean, held, decoded;
  bool valid = true;
  bool folded = true;
};

void fold(Input& input, Format format, int64_t numel) {
  std::vector<Upload> uploads;
  for (int left = 1 + input.take<uint8_t>() % kMostTogether; left > 0; --left)
    uploads.emplace_back(format, numel, input);
  auto target_dtype = static_cast<Dtype>(input.take<uint8_t>() % 3);
  Block<uint8_t> target(static_cast<size_t>(numel) * dtype_bytes(target_dtype), input);
  std::unique_ptr<Folded> first;
  std::unique_ptr<Block<uint8_t>> applied;
  for (const char* name : instruction_sets()) {
    force_instruction_set(name);
    auto here = std::make_unique<Folded>(uploads, numel, format);
    auto moved = std::make_unique<Block<uint8_t>>(target.count);
    std::memcpy(moved->raw(), target.raw(), target.bytes());
    apply(moved->raw(), target_dtype, uploads.front().body.read(), numel, format, 1);
    for (int64_t i = 0; i < numel; ++i) {
      expect(!here->valid || std::isfinite(here->decoded.data[i]), "a valid body decodes to numbers");
      expect(!here->folded || std::isfinite(here->mean.data[i]), "a mean is finite");
    }
    if (first == nullptr) {
      first = std::move(here);
      applied = std::move(moved);
      continue;
    }
    const Inspection &a = here->inspection, &b = first->inspection;
    expect(a.largest == b.largest && a.invalid == b.invalid && a.bad_groups == b.bad_groups,
           "every instruction set finds the same in a body");
    expect(here->hi == first->hi && here->lo == first->lo && here->mean == first->mean,
           "every instruction set folds to the same bits");
    expect(!here->folded || here->held == here->mean, "what is held until the mean gives the bits of the sum");
    if (!here->valid) continue;  // it is thrown away
    expect(here->decoded == first->decoded, "every instruction set decodes to the same bits");
    expect(*moved == *applied, "every instruction set applies to the same bits");
  }
}

void pack(Input& input, Format format, int64_t numel) {
  auto now_dtype = static_cast<Dtype>(input.take<uint8_t>() % 3);
  auto ref_dtype = static_cast<Dtype>(input.take<uint8_t>() % 3);
  Block<uint8_t> now(static_cast<size_t>(numel) * dtype_bytes(now_dtype), input);
  Block<uint8_t> ref(static_cast<size_t>(numel) * dtype_bytes(ref_dtype), input);
  Block<float> residual(numel, input);
  for (int64_t i = 0; i < numel; ++i)
    if (!std::isfinite(residual.data[i])) residual.data[i] = 0;
  std::unique_ptr<Body> first;
  std::unique_ptr<Block<float>> first_rest;
  int64_t first_bad = 0;
  for (const char* name : instruction_sets()) {
    force_instruction_set(name);
    auto body = std::make_unique<Body>(format, numel);
    auto rest = std::make_unique<Block<float>>(numel);
    int64_t bad = encode(now.raw(), now_dtype, ref.raw(), ref_dtype, residual.data.get(), rest->data.get(), numel,
                         format, body->planes(), 1);
    Inspection found = inspect(body->read(), numel, format, 1);
    // `largest` may be too large all the same: int4 near the largest fp32 rounds its scale up to a power of two. The
    // receiver refuses that.
    expect(found.invalid == 0, "what an encoder makes is valid");
    for (int64_t i = 0; i < numel; ++i) expect(!std::isnan(rest->data[i]), "a residual is never a NaN");
    if (first == nullptr) {
      first = std::move(body);
      first_rest = std::move(rest);
      first_bad = bad;
      continue;
    }
    expect(*body == *first && *rest == *first_rest && bad == first_bad, "every instruction set packs the same bytes");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  auto mode = input.take<uint8_t>();
  auto format = static_cast<Format>(mode & 3);
  int64_t numel = kAlignment * (1 + input.take<uint8_t>() % kMostGroups);
  if (mode & 4)
    pack(input, format, numel);
  else
    fold(input, format, numel);
  return 0;
}
