// Explains OpenSSL's errors. Only in builds with TLS.
#pragma once

#include <string>

namespace parablock {

std::string library_error(unsigned long code);  // in OpenSSL's own words

// Whether bytes were lost or changed in transit, as found here or reported by the peer: not a permanent error.
bool is_damage(unsigned long code);

[[noreturn]] void unusable(const std::string& what);  // throws TlsError with OpenSSL's own text added

// A text for the user; `opening`: in the handshake. Alerts report what the peer has found wrong.
std::string explain(unsigned long code, bool opening);

}  // namespace parablock
