// TLS 1.3 over one non-blocking socket: bytes in the clear on this side, records on the other. Which library does it,
// tls*.cc and certificate.cc alone know; in a build without one, `make_tls` says so. Knows no frames, links or tokens.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace parablock {

// The settings cannot be used: a file that is missing, a key that does not fit, a build without TLS.
struct TlsError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Who this side is and whom it believes. Files are PEM; an empty string is "not given".
struct TlsSettings {
  std::string certificate_file;  // own certificate, followed by the intermediates
  std::string key_file;          // its private key
  std::string ca_file;           // who must have signed the peer's certificate; "system": whom this machine trusts
  std::string fingerprint;       // the 32 bytes of the SHA-256 of the peer's certificate
  uint64_t records_per_key = uint64_t{1} << 23;  // sealed with the same keys; AES-GCM allows 2^24.5
  bool peer_may_be_anonymous = false;  // accepting side: a peer without a certificate is let in, one with a bad one not
};

// What is known of an established connection.
struct TlsInfo {
  std::string version;
  std::string cipher;
  std::string binding;  // 32 bytes that only the two ends know (RFC 9266, tls-exporter): never to be shown
  std::string subject;  // of the peer's certificate, as the next three; empty or 0 when it showed none
  std::string issuer;
  std::string fingerprint;  // SHA-256, hex
  int64_t not_after = 0;  // seconds since 1970
};

// One connection. Loop thread only, except `info`.
class TlsStream {
 public:
  virtual ~TlsStream() = default;

  // As readv and sendmsg, but EPROTO: TLS failed, `failure` says how and the stream is over. After that, reads give
  // what still comes, to be thrown away, and writes go nowhere; what the library wants to tell the peer still leaves.
  virtual ssize_t read(const iovec* vectors, size_t count) = 0;
  // Bytes that were taken may not have left yet: see `unsent`. With no vectors it sends only these.
  virtual ssize_t write(const iovec* vectors, size_t count) = 0;
  virtual bool shut_write() = 0;  // says that this side is done; false with EAGAIN: again when the socket has room

  virtual bool opening() const = 0;  // the handshake is not over: only `unsent` bytes can leave
  virtual bool unsent() const = 0;
  virtual bool unread()
      const = 0;  // bytes have left the socket that `read` has not given out: it will not wake for them
  virtual const std::string& failure() const = 0;
  virtual bool permanent()
      const = 0;  // the failure lies in the two sides (certificates, versions), not in the network: do not retry

  virtual std::shared_ptr<const TlsInfo> info() const = 0;  // nullptr while opening. Any thread.
};

// Made once for a process, used for all its links. Any thread.
class TlsContext {
 public:
  virtual ~TlsContext() = default;

  // The connecting side always asks for a certificate: of `host`, signed by the CA, or with the fingerprint.
  virtual std::unique_ptr<TlsStream> connect(int fd, const std::string& host) const = 0;
  // The accepting side asks for one if it has a CA to check it by.
  virtual std::unique_ptr<TlsStream> accept(int fd) const = 0;
};

std::shared_ptr<const TlsContext> make_tls(const TlsSettings& settings);  // throws TlsError
const char* tls_library();  // its name and version; empty in a build without one

}  // namespace parablock
