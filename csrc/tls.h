// TLS 1.3 over one non-blocking socket: plain bytes on this side, records on the other. Only tls*.cc and certificate.cc
// depend on the TLS library; in a build without a library `make_tls` throws. Independent of frames, links and tokens.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace parablock {

// The settings cannot be used: a missing file, a key that does not fit, a build without TLS.
struct TlsError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// This side's identity and the peers that it trusts. Files are PEM; an empty string means "not given".
struct TlsSettings {
  std::string certificate_file;  // own certificate, followed by the intermediates
  std::string key_file;  // its private key
  std::string ca_file;  // the CA that must have signed the peer's certificate; "system": this machine's CAs
  std::string fingerprint;  // the 32 bytes of the SHA-256 of the peer's certificate
  uint64_t records_per_key = uint64_t{1} << 23;  // records sealed before a key update; AES-GCM allows 2^24.5
  bool peer_may_be_anonymous = false;  // accepting side: admits a peer without a certificate, but none with a bad one
};

// The facts about an established connection.
struct TlsInfo {
  std::string version;
  std::string cipher;
  std::string binding;  // 32 bytes that only the two ends know (RFC 9266, tls-exporter): never show them
  // The peer's certificate; empty or 0 when the peer has none.
  std::string subject;
  std::string issuer;
  std::string fingerprint;  // SHA-256, hex
  int64_t not_after = 0;  // seconds since 1970
};

// One connection. Loop thread only, except `info`.
class TlsStream {
 public:
  virtual ~TlsStream() = default;

  // Like readv and sendmsg, except for EPROTO: TLS has failed, `failure` says why, and the stream is over. After that,
  // reads return raw bytes for the caller to discard and writes are discarded, but TLS alerts to the peer still leave.
  virtual ssize_t read(const iovec* vectors, size_t count) = 0;
  // May take bytes before they leave: see `unsent`. Without vectors, sends only bytes taken earlier.
  virtual ssize_t write(const iovec* vectors, size_t count) = 0;
  virtual bool shut_write() = 0;  // sends TLS's close_notify; false with EAGAIN: call again when the socket has room

  virtual bool opening() const = 0;  // the handshake is not over: only `unsent` bytes can leave
  virtual bool unsent() const = 0;
  virtual bool unread() const = 0;  // bytes or a failure wait here for `read`, and the socket will not wake for them
  virtual const std::string& failure() const = 0;
  // A permanent error: the cause lies in the two sides (certificates, versions), not in the network, so do not retry.
  virtual bool permanent() const = 0;

  virtual std::shared_ptr<const TlsInfo> info() const = 0;  // nullptr while opening. Any thread.
};

// Made once per process and used for all its links. Any thread.
class TlsContext {
 public:
  virtual ~TlsContext() = default;

  // The connecting side always requires a certificate: for `host` and signed by the CA, or with the fingerprint.
  virtual std::unique_ptr<TlsStream> connect(int fd, const std::string& host) const = 0;
  // The accepting side asks for a certificate if it has a CA or a fingerprint to check it against.
  virtual std::unique_ptr<TlsStream> accept(int fd) const = 0;
};

std::shared_ptr<const TlsContext> make_tls(const TlsSettings& settings);  // throws TlsError
const char* tls_library();  // its name and version; empty in a build without one

}  // namespace parablock
