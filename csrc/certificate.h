// Whose certificate is it, and is it the right one: what the peer's certificate says, and why it is refused if it is.
// Knows no socket, no record and no state of a connection. For tls_stream.cc, in a build with OpenSSL.
#pragma once

#ifdef PARABLOCK_TLS

#include <openssl/x509.h>

#include <optional>
#include <string>

#include "tls.h"

namespace parablock {

// Why the peer's chain cannot be trusted, for a user; nothing when it can. In the place of the library's own
// verification, which knows no fingerprints. `host`: only for the text; the library has what it checks against itself.
std::optional<std::string> why_refused(X509_STORE_CTX* store, const TlsSettings& settings, const std::string& host);

void describe_certificate(const X509* certificate, TlsInfo& info);  // fills in what is of the peer's certificate

}  // namespace parablock

#endif
