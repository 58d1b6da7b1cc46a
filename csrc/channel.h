// A byte stream to one peer, non-blocking, in the clear or in TLS. Knows nothing of frames; what protects the bytes on
// their way belongs here.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <memory>
#include <string>

#include "socket.h"
#include "tls.h"

namespace parablock {

class Channel {
 public:
  explicit Channel(Fd fd, std::unique_ptr<TlsStream> tls = nullptr);  // `tls` works on this very descriptor

  int fd() const { return fd_.get(); }

  // As readv and sendmsg: the bytes moved, 0 at the peer's end, or -1 with errno (EAGAIN: later, EPROTO: the end, see
  // TlsStream). With TLS, bytes that were taken may still have to leave: `unsent`; a write without vectors sends these.
  ssize_t read(const iovec* vectors, size_t count);
  ssize_t write(iovec* vectors, size_t count);
  bool shut_write();  // the peer sees the end, reading goes on; false: again when the socket has room

  bool opening() const { return tls_ && tls_->opening(); }  // nothing but `unsent` can leave yet
  bool unsent() const { return tls_ && tls_->unsent(); }
  bool unread() const { return tls_ && tls_->unread(); }  // the next read gives bytes, though the socket may be empty

  std::string failure(int error) const;  // what an errno of `read` or `write` means
  bool permanent() const { return tls_ && tls_->permanent(); }
  std::shared_ptr<const TlsInfo> tls() const { return tls_ ? tls_->info() : nullptr; }  // any thread

 private:
  Fd fd_;
  std::unique_ptr<TlsStream> tls_;
};

}  // namespace parablock
