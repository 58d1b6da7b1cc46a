#include "inspector.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace parablock {

Inspector::Inspector(const Layout& layout, Format format) : format_(format), found_(layout.chunks()) {
  const int64_t group = group_size(format);
  if (layout.scale_bytes != scale_bytes(format, group) || layout.code_bytes != code_bytes(format, group))
    throw std::invalid_argument("the layout is not one of a body in this format");
}

// A chunk comes twice if it overtook another on a link that broke. What came last is in the buffer, and counts.
void Inspector::chunk_arrived(uint64_t chunk, const Parts& parts) {
  const auto& [scales, codes] = parts;
  const int64_t group = group_size(format_);
  const auto elements = static_cast<int64_t>(codes.bytes / code_bytes(format_, group)) * group;
  found_.at(chunk) = inspect({scales.data, codes.data}, elements, format_, 1);
}

Inspection Inspector::result() const {
  const auto missing = std::count_if(found_.begin(), found_.end(), [](const auto& found) { return !found; });
  if (missing > 0)
    throw std::logic_error("expected " + std::to_string(found_.size()) + " inspected chunks, found " +
                           std::to_string(found_.size() - static_cast<size_t>(missing)));
  Inspection all{0.0, 0, 0};
  for (const std::optional<Inspection>& found : found_) all = joined(all, *found);
  return all;
}

}  // namespace parablock
