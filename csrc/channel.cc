#include "channel.h"

#include <sys/socket.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace parablock {

Channel::Channel(Fd fd, std::unique_ptr<TlsStream> tls) : fd_(std::move(fd)), tls_(std::move(tls)) {
  set_link_options(fd_.get());
}

ssize_t Channel::read(const iovec* vectors, size_t count) {
  if (tls_) return tls_->read(vectors, count);
  return readv(fd_.get(), vectors, static_cast<int>(count));
}

ssize_t Channel::write(iovec* vectors, size_t count) {
  if (tls_) return tls_->write(vectors, count);
  msghdr message{};
  message.msg_iov = vectors;
  message.msg_iovlen = count;
  return sendmsg(fd_.get(), &message, MSG_NOSIGNAL);
}

bool Channel::shut_write() {
  if (tls_ && !tls_->shut_write() && errno == EAGAIN) return false;
  shutdown(fd_.get(), SHUT_WR);
  return true;
}

std::string Channel::failure(int error) const {
  return error == EPROTO && tls_ ? tls_->failure() : std::string(std::strerror(error));
}

}  // namespace parablock
