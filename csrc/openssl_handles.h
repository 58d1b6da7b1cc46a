// Owning pointers to OpenSSL objects, each freed by its own OpenSSL function. For tls*.cc and certificate.cc.
#pragma once

#ifdef PARABLOCK_TLS

#include <openssl/bio.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <memory>

namespace parablock {

template <auto Free>
struct With {
  template <typename T>
  void operator()(T* object) const {
    Free(object);
  }
};
using Ssl = std::unique_ptr<SSL, With<SSL_free>>;
using SslContext = std::unique_ptr<SSL_CTX, With<SSL_CTX_free>>;
using Certificate = std::unique_ptr<X509, With<X509_free>>;
using Bio = std::unique_ptr<BIO, With<BIO_free>>;
using Method = std::unique_ptr<BIO_METHOD, With<BIO_meth_free>>;

}  // namespace parablock

#endif
