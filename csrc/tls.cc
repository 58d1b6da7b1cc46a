#include "tls.h"

#ifdef PARABLOCK_TLS

#include <openssl/crypto.h>
#include <openssl/ssl.h>

#include <new>
#include <utility>

#include "openssl_handles.h"
#include "tls_error.h"
#include "tls_stream.h"

namespace parablock {
namespace {

constexpr size_t kCertificateBytes = 64 << 10;  // the most that a peer's chain may have

int no_passphrase(char*, int, int, void*) { return -1; }  // OpenSSL would ask at the terminal

class OpenSslContext final : public TlsContext {
 public:
  explicit OpenSslContext(const TlsSettings& settings);

  std::unique_ptr<TlsStream> connect(int fd, const std::string& host) const override;
  std::unique_ptr<TlsStream> accept(int fd) const override;

 private:
  Ssl new_ssl() const;
  void load_identity();
  void load_trust();

  TlsSettings settings_;
  SslContext context_;
};

OpenSslContext::OpenSslContext(const TlsSettings& settings) : settings_(settings), context_(SSL_CTX_new(TLS_method())) {
  if (!context_) throw std::bad_alloc();
  SSL_CTX* context = context_.get();
  SSL_CTX_set_min_proto_version(context, TLS1_3_VERSION);
  if (SSL_CTX_set_ciphersuites(context, "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256") !=
      1)
    unusable("this machine's OpenSSL allows none of the ciphers of TLS 1.3");
  SSL_CTX_set_options(context, SSL_OP_CIPHER_SERVER_PREFERENCE | SSL_OP_NO_TICKET | SSL_OP_NO_COMPRESSION);
  SSL_CTX_set_num_tickets(context, 0);  // a link lasts for a run, so there is nothing to resume
  SSL_CTX_set_session_cache_mode(context, SSL_SESS_CACHE_OFF);
  SSL_CTX_set_max_cert_list(context, kCertificateBytes);
  SSL_CTX_set_default_passwd_cb(context, &no_passphrase);
  OpenSslStream::prepare(context);
  load_identity();
  load_trust();
}

void OpenSslContext::load_identity() {
  if (settings_.certificate_file.empty()) return;
  if (SSL_CTX_use_certificate_chain_file(context_.get(), settings_.certificate_file.c_str()) != 1)
    unusable("cannot read a PEM certificate from " + settings_.certificate_file);
  if (SSL_CTX_use_PrivateKey_file(context_.get(), settings_.key_file.c_str(), SSL_FILETYPE_PEM) != 1)
    unusable("cannot read the private key of " + settings_.certificate_file + ", PEM without a passphrase, from " +
             settings_.key_file);
  if (SSL_CTX_check_private_key(context_.get()) != 1)
    unusable("the key in " + settings_.key_file + " does not belong to the certificate in " +
             settings_.certificate_file);
}

void OpenSslContext::load_trust() {
  if (settings_.ca_file.empty()) return;
  if (settings_.ca_file == "system") {
    if (SSL_CTX_set_default_verify_paths(context_.get()) != 1) unusable("this machine has no CAs of its own");
    return;
  }
  if (SSL_CTX_load_verify_file(context_.get(), settings_.ca_file.c_str()) != 1)
    unusable("cannot read a PEM certificate from the CA file " + settings_.ca_file);
}

Ssl OpenSslContext::new_ssl() const {
  Ssl ssl(SSL_new(context_.get()));
  if (!ssl) throw std::bad_alloc();
  return ssl;
}

std::unique_ptr<TlsStream> OpenSslContext::connect(int fd, const std::string& host) const {
  if (settings_.ca_file.empty() && settings_.fingerprint.empty())
    throw TlsError("expected a way to recognise the server, found none: give its CA file or its fingerprint");
  auto stream = std::make_unique<OpenSslStream>(settings_, new_ssl(), fd);
  stream->start_connecting(host);
  return stream;
}

std::unique_ptr<TlsStream> OpenSslContext::accept(int fd) const {
  auto stream = std::make_unique<OpenSslStream>(settings_, new_ssl(), fd);
  stream->start_accepting();
  return stream;
}

}  // namespace

std::shared_ptr<const TlsContext> make_tls(const TlsSettings& settings) {
  return std::make_shared<const OpenSslContext>(settings);
}

const char* tls_library() { return OpenSSL_version(OPENSSL_VERSION); }

}  // namespace parablock

#else

namespace parablock {

std::shared_ptr<const TlsContext> make_tls(const TlsSettings&) {
  throw TlsError(
      "this build of parablock-rt lacks TLS: install OpenSSL's headers (libssl-dev on Debian) and build it again");
}

const char* tls_library() { return ""; }

}  // namespace parablock

#endif
