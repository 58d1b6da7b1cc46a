// Checks an upload chunk by chunk while it arrives: on a fast link, the bytes are in the CPU's cache by then. An upload
// that continues on another link after its first one broke keeps its inspector.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "codec.h"
#include "transfer.h"

namespace parablock {

class Inspector : public Listener {
 public:
  // Throws std::invalid_argument unless the layout is one of a body in this format, see body_layout.
  Inspector(const Layout& layout, Format format);

  void chunk_arrived(uint64_t chunk, const Parts& parts) override;

  // What `inspect` finds in the whole body. Only after the receive's kReceived event, which also makes visible what the
  // loop thread wrote. Throws std::logic_error when a chunk has never arrived.
  Inspection result() const;

 private:
  Format format_;
  std::vector<std::optional<Inspection>> found_;  // by chunk
};

}  // namespace parablock
