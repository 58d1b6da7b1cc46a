// What OpenSSL's errors mean. In a build with TLS only.
#pragma once

#include <string>

namespace parablock {

std::string library_error(unsigned long code);  // in the library's own words

// Bytes were lost or changed on their way, which need not happen again: seen here, or by the peer, which says so.
bool is_damage(unsigned long code);

[[noreturn]] void unusable(const std::string& what);  // throws TlsError, with what the library says of it

// In words for a user; `opening`: in the handshake. An alert is what the peer has found wrong.
std::string explain(unsigned long code, bool opening);

}  // namespace parablock
