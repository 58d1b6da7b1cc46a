// Checks and describes the peer's certificate. Independent of sockets, records and the state of a connection. For
// tls_stream.cc, in a build with OpenSSL.
#pragma once

#ifdef PARABLOCK_TLS

#include <openssl/x509.h>

#include <optional>
#include <string>

#include "tls.h"

namespace parablock {

// Why the peer's chain is not trusted, as a text for the user; nullopt when the chain is trusted. Replaces OpenSSL's
// own verification, which does not support fingerprints. `host` only serves the text: OpenSSL has its own copy.
std::optional<std::string> why_refused(X509_STORE_CTX* store, const TlsSettings& settings, const std::string& host);

void describe_certificate(const X509* certificate, TlsInfo& info);  // fills in the fields of the certificate

}  // namespace parablock

#endif
