// A non-blocking byte stream to one peer, plain or over TLS. Independent of frames; protection of the bytes in transit
// belongs here.
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
  explicit Channel(Fd fd, std::unique_ptr<TlsStream> tls = nullptr);  // `tls` must use the same descriptor

  int fd() const { return fd_.get(); }

  // Like readv and sendmsg: return the bytes moved, 0 when the peer has ended the stream, or -1 with errno (EAGAIN:
  // later; EPROTO: TLS has failed, see TlsStream). With TLS, bytes that `write` took may not have left yet: `unsent`
  // tells, and a write without vectors sends only these.
  ssize_t read(const iovec* vectors, size_t count);
  ssize_t write(iovec* vectors, size_t count);
  bool shut_write();  // half-close; false: call again when the socket has room

  bool opening() const { return tls_ && tls_->opening(); }  // in the TLS handshake: only `unsent` bytes can leave
  bool unsent() const { return tls_ && tls_->unsent(); }
  bool unread() const { return tls_ && tls_->unread(); }  // the next read returns bytes even if the socket is empty

  std::string failure(int error) const;  // the text of an errno of `read` or `write`
  bool permanent() const { return tls_ && tls_->permanent(); }
  std::shared_ptr<const TlsInfo> tls() const { return tls_ ? tls_->info() : nullptr; }  // any thread

 private:
  Fd fd_;
  std::unique_ptr<TlsStream> tls_;
};

}  // namespace parablock
