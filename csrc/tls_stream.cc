#include "tls_stream.h"

#ifdef PARABLOCK_TLS

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>
#include <optional>
#include <string_view>
#include <utility>

#include "certificate.h"
#include "tls_error.h"

namespace parablock {
namespace {

constexpr size_t kRecordBytes = 16 << 10;  // most plain text in a record that TLS allows
constexpr size_t kBatchBytes = 96 << 10;   // of records per `send`; 32 and 128 KiB cost more CPU time per byte
constexpr size_t kMostSealedBytes = kBatchBytes + kRecordBytes + 256;  // a batch ends with the record that fills it
constexpr size_t kReadBytes = 96 << 10;  // of records per `read`; a 128 KiB buffer would be new memory for each read
constexpr size_t kRecordsAtOnce = 256;   // most records per read, however small, before other links have their turn
// Handshake messages allowed from the peer after the handshake: enough to change its keys as often as this side does.
constexpr uint64_t kLateMessages = 16;
constexpr uint64_t kBytesPerLateMessage = 256 << 20;  // one more message is allowed for this many bytes received
constexpr size_t kBindingBytes = 32;

// The streams of a thread share this memory for sealing; a stream only keeps it while its socket is full.
std::vector<char>& spare_batch() {
  thread_local std::vector<char> spare;
  return spare;
}

OpenSslStream* stream_of(BIO* bio) { return static_cast<OpenSslStream*>(BIO_get_data(bio)); }

int write_record(BIO* bio, const char* data, int bytes) {
  BIO_clear_retry_flags(bio);
  return stream_of(bio)->seal_into_buffer(data, static_cast<size_t>(bytes)) ? bytes : -1;
}

int read_records_into(BIO* bio, char* data, int bytes) {
  BIO_clear_retry_flags(bio);
  const ssize_t got = stream_of(bio)->receive(data, static_cast<size_t>(bytes));
  if (got < 0 && errno == EAGAIN) BIO_set_retry_read(bio);
  return static_cast<int>(got);
}

long control_stream(BIO* bio, int command, long, void*) {
  if (command == BIO_CTRL_EOF) return stream_of(bio)->ended() ? 1 : 0;
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

void note_message(int is_ours, int, int type, const void*, size_t, SSL* ssl, void*) {
  if (is_ours == 0 && type == SSL3_RT_HANDSHAKE)
    static_cast<OpenSslStream*>(SSL_get_app_data(ssl))->note_handshake_message();
}

int verify_peer(X509_STORE_CTX* store, void*) try {
  auto* ssl = static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
  return static_cast<OpenSslStream*>(SSL_get_app_data(ssl))->verify(store) ? 1 : 0;
} catch (const std::bad_alloc&) {
  return 0;
}

// Never freed: streams may still be closed while the process exits.
const BIO_METHOD* stream_method() {
  static const BIO_METHOD* const method = [] {
    Method made(BIO_meth_new(BIO_TYPE_SOURCE_SINK, "stream"));
    if (!made) throw std::bad_alloc();
    BIO_meth_set_write(made.get(), &write_record);
    BIO_meth_set_read(made.get(), &read_records_into);
    BIO_meth_set_ctrl(made.get(), &control_stream);
    return made.release();
  }();
  return method;
}

}  // namespace

void OpenSslStream::prepare(SSL_CTX* context) {
  SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);  // an idle link holds no buffers
  SSL_CTX_set_read_ahead(context, 1);  // saves a separate read for each record's header
  SSL_CTX_set_default_read_buffer_len(context, kReadBytes);
  SSL_CTX_set_cert_verify_callback(context, &verify_peer, nullptr);
  SSL_CTX_set_msg_callback(context, &note_message);
}

OpenSslStream::OpenSslStream(const TlsSettings& settings, Ssl ssl, int fd)
    : settings_(settings), fd_(fd), ssl_(std::move(ssl)) {
  SSL_set_app_data(ssl_.get(), this);
  BIO* bio = BIO_new(stream_method());
  if (bio == nullptr) throw std::bad_alloc();
  BIO_set_data(bio, this);
  BIO_set_init(bio, 1);
  SSL_set_bio(ssl_.get(), bio, bio);
}

void OpenSslStream::start_connecting(const std::string& host) {
  host_ = host;
  SSL_set_connect_state(ssl_.get());
  SSL_set_verify(ssl_.get(), SSL_VERIFY_PEER, nullptr);
  X509_VERIFY_PARAM* wanted = SSL_get0_param(ssl_.get());
  const std::string address = host.substr(0, host.find('%'));  // certificates have no scope ids
  if (X509_VERIFY_PARAM_set1_ip_asc(wanted, address.c_str()) != 1) {
    ERR_clear_error();
    X509_VERIFY_PARAM_set_hostflags(wanted, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    if (X509_VERIFY_PARAM_set1_host(wanted, host.c_str(), 0) != 1 ||
        SSL_set_tlsext_host_name(ssl_.get(), host.c_str()) != 1)
      unusable("no certificate can be checked against the host name " + host);
  }
  shake_hands();  // writes the first message, which waits in sealed_
}

void OpenSslStream::start_accepting() {
  SSL_set_accept_state(ssl_.get());
  if (settings_.ca_file.empty() && settings_.fingerprint.empty()) return;
  int mode = SSL_VERIFY_PEER | (settings_.peer_may_be_anonymous ? 0 : SSL_VERIFY_FAIL_IF_NO_PEER_CERT);
  SSL_set_verify(ssl_.get(), mode, nullptr);
}

bool OpenSslStream::verify(X509_STORE_CTX* store) {
  std::optional<std::string> why = why_refused(store, settings_, host_);
  refused_ = why.value_or("");
  return !why;
}

bool OpenSslStream::seal_into_buffer(const char* data, size_t bytes) try {
  if (sealed_.capacity() == 0) {
    sealed_.swap(spare_batch());
    sealed_.reserve(kMostSealedBytes);
  }
  sealed_.insert(sealed_.end(), data, data + bytes);
  return true;
} catch (const std::bad_alloc&) {  // exceptions must not pass through OpenSSL
  return false;
}

bool OpenSslStream::floods() const { return late_messages_ > kLateMessages + read_bytes_ / kBytesPerLateMessage; }

// OpenSSL reads on while only its own handshake messages come, so a peer that sends nothing else would hold the thread
// for ever.
ssize_t OpenSslStream::receive(char* data, size_t bytes) {
  if (floods()) {
    errno = EPROTO;
    return -1;
  }
  ssize_t got = -1;
  do got = recv(fd_, data, bytes, 0);
  while (got < 0 && errno == EINTR);
  ended_ = got == 0;
  return got;
}

// On false, errno says why.
bool OpenSslStream::flush() {
  if (sealed_.capacity() == 0) return true;
  while (sent_ < sealed_.size()) {
    ssize_t count = send(fd_, sealed_.data() + sent_, sealed_.size() - sent_, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return false;
    sent_ += static_cast<size_t>(count);
  }
  sealed_.clear();
  sent_ = 0;
  spare_batch().swap(sealed_);
  std::vector<char>().swap(sealed_);
  return true;
}

void OpenSslStream::fail(std::string why, bool permanent) {
  permanent_ = permanent;
  opening_ = false;
  starved_ = true;
  failure_ = std::move(why);
}

// Handles an unsuccessful OpenSSL call. Returns 0 when the peer has ended the stream, else -1 with EAGAIN: OpenSSL
// needs more bytes, or TLS has failed and `failure_` says why.
ssize_t OpenSslStream::not_now(int result) {
  int system_error = errno;
  int error = SSL_get_error(ssl_.get(), result);
  if (error == SSL_ERROR_ZERO_RETURN) return 0;
  starved_ = true;
  if (error != SSL_ERROR_WANT_READ) {
    unsigned long code = ERR_peek_error();
    bool not_tls = ERR_GET_REASON(code) == SSL_R_WRONG_VERSION_NUMBER || ERR_GET_REASON(code) == SSL_R_HTTP_REQUEST;
    // OpenSSL sends nothing to a peer that does not speak TLS. A ParaBlock peer without TLS recognises this alert.
    constexpr std::string_view kProtocolVersionAlert("\x15\x03\x03\x00\x02\x02\x46", 7);
    if (not_tls && opening_) seal_into_buffer(kProtocolVersionAlert.data(), kProtocolVersionAlert.size());
    if (floods())
      fail("the peer changes its TLS keys all the time, which no ParaBlock peer does", true);
    else if (code == 0)
      fail(std::string("the connection failed: ") + std::strerror(system_error), false);
    else
      fail(refused_.empty() ? explain(code, opening_) : refused_, !is_damage(code));
    ERR_clear_error();
  }
  errno = EAGAIN;
  return -1;
}

bool OpenSslStream::shake_hands() {
  ERR_clear_error();
  errno = 0;
  starved_ = false;
  int result = SSL_do_handshake(ssl_.get());
  if (result != 1) return not_now(result), false;
  note_info();
  opening_ = false;
  return true;
}

void OpenSslStream::note_info() {
  auto info = std::make_shared<TlsInfo>();
  info->version = SSL_get_version(ssl_.get());
  info->cipher = SSL_get_cipher_name(ssl_.get());
  info->binding.resize(kBindingBytes);
  constexpr std::string_view kLabel = "EXPORTER-Channel-Binding";
  if (SSL_export_keying_material(ssl_.get(), reinterpret_cast<unsigned char*>(info->binding.data()), kBindingBytes,
                                 kLabel.data(), kLabel.size(), nullptr, 0, 1) != 1)
    unusable("TLS gives no channel binding");
  if (Certificate peer(SSL_get1_peer_certificate(ssl_.get())); peer) describe_certificate(peer.get(), *info);
  info_.store(std::move(info));
}

// Reads until the vectors are full or OpenSSL has no bytes left, so that a short count means an empty socket.
// Exception: after kRecordsAtOnce small records it stops; the rest is then `unread`, or wakes the loop.
ssize_t OpenSslStream::read_records(const iovec* vectors, size_t count) {
  size_t got = 0;
  size_t records = 0;
  for (size_t i = 0; i < count; ++i) {
    for (size_t at = 0; at < vectors[i].iov_len;) {
      if (++records > kRecordsAtOnce) return static_cast<ssize_t>(got);
      ERR_clear_error();
      errno = 0;
      starved_ = false;
      size_t taken = 0;
      auto* to = static_cast<char*>(vectors[i].iov_base) + at;
      int result = SSL_read_ex(ssl_.get(), to, vectors[i].iov_len - at, &taken);
      if (result != 1) {
        ssize_t why_not = not_now(result);
        return got > 0 ? static_cast<ssize_t>(got) : why_not;
      }
      at += taken;
      got += taken;
      read_bytes_ += taken;
    }
  }
  return static_cast<ssize_t>(got);
}

ssize_t OpenSslStream::read(const iovec* vectors, size_t count) {
  if (failure_told_) return readv(fd_, vectors, static_cast<int>(count));
  ssize_t got = -1;
  if (failure_.empty() && (!opening_ || shake_hands())) {
    got = read_records(vectors, count);
    if (got >= 0) return got;
  }
  flush();  // handshake messages or an alert; `write` sends what the socket does not take now
  failure_told_ = !failure_.empty();
  errno = failure_told_ ? EPROTO : EAGAIN;
  return -1;
}

// Updates the keys after records_per_key records: see RFC 8446, 5.5.
bool OpenSslStream::put_record(const void* data, size_t bytes) {
  if (++sealed_records_ % settings_.records_per_key == 0 &&
      SSL_key_update(ssl_.get(), SSL_KEY_UPDATE_NOT_REQUESTED) != 1)
    return false;
  size_t written = 0;
  return SSL_write_ex(ssl_.get(), data, bytes, &written) == 1 && written == bytes;
}

// Seals the vectors after the first `skip` bytes until a batch is full; returns the bytes sealed. Pieces that fill a
// record are sealed in place; smaller pieces are collected, so that they share records.
ssize_t OpenSslStream::seal(const iovec* vectors, size_t count, size_t skip) {
  std::array<char, kRecordBytes> collected;
  size_t filled = 0;
  size_t done = 0;
  auto put = [&](const void* data, size_t bytes) {
    if (!put_record(data, bytes)) return false;
    done += bytes;
    return true;
  };
  auto put_collected = [&] { return filled == 0 || put(collected.data(), std::exchange(filled, 0)); };
  for (size_t i = 0; i < count; ++i) {
    const size_t skipped = std::min(skip, vectors[i].iov_len);
    skip -= skipped;
    const char* at = static_cast<const char*>(vectors[i].iov_base) + skipped;
    size_t left = vectors[i].iov_len - skipped;
    while (left > 0) {
      if (sealed_.size() >= kBatchBytes) return static_cast<ssize_t>(done);
      const size_t taken = std::min(left, kRecordBytes);
      if (filled + taken > kRecordBytes) {
        if (!put_collected()) return -1;
        continue;
      }
      if (taken == kRecordBytes) {
        if (!put(at, taken)) return -1;
      } else {
        std::memcpy(collected.data() + filled, at, taken);
        filled += taken;
      }
      at += taken;
      left -= taken;
    }
  }
  return put_collected() ? static_cast<ssize_t>(done) : -1;
}

ssize_t OpenSslStream::write(const iovec* vectors, size_t count) {
  size_t offered = 0;
  for (size_t i = 0; i < count; ++i) offered += vectors[i].iov_len;
  size_t taken = 0;
  while (flush()) {
    if (!failure_.empty()) return static_cast<ssize_t>(offered);
    if (opening_) {
      errno = EAGAIN;
      return -1;
    }
    if (taken == offered) return static_cast<ssize_t>(taken);
    ERR_clear_error();
    ssize_t sealed = seal(vectors, count, taken);
    if (sealed < 0) {
      fail("TLS could not write: " + library_error(ERR_peek_error()), false);
      errno = EPROTO;
      return -1;
    }
    taken += static_cast<size_t>(sealed);
  }
  return taken > 0 ? static_cast<ssize_t>(taken) : -1;
}

bool OpenSslStream::shut_write() {
  if (!shut_ && failure_.empty() && !opening_) {
    shut_ = true;
    ERR_clear_error();
    SSL_shutdown(ssl_.get());
  }
  return flush();
}

}  // namespace parablock

#endif
