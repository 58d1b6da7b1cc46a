#include "tls_error.h"

#ifdef PARABLOCK_TLS

#include <openssl/err.h>
#include <openssl/ssl.h>

#include "tls.h"

namespace parablock {

std::string library_error(unsigned long code) {
  const char* reason = ERR_reason_error_string(code);
  return reason != nullptr ? reason : "error " + std::to_string(code);
}

bool is_damage(unsigned long code) {
  switch (ERR_GET_REASON(code)) {
    case SSL_R_UNEXPECTED_EOF_WHILE_READING:
    case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC:
    case SSL_R_SSLV3_ALERT_BAD_RECORD_MAC:
    case SSL_R_TLSV1_ALERT_DECODE_ERROR:  // OpenSSL's reply to a connection that was cut
      return true;
    default: return false;
  }
}

std::string explain(unsigned long code, bool opening) {
  switch (ERR_GET_REASON(code)) {
    case SSL_R_WRONG_VERSION_NUMBER:
    case SSL_R_HTTP_REQUEST:
    case SSL_R_BAD_RECORD_TYPE:
      return "expected TLS, found something else: the peer does not use TLS, or is not ParaBlock; give both sides TLS "
             "options, or neither";
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_TLSV1_ALERT_PROTOCOL_VERSION:
      return "one side does not speak TLS 1.3, the only version that is used here";
    case SSL_R_UNEXPECTED_EOF_WHILE_READING:
      return opening ? "the peer closed the connection in the TLS handshake"
                     : "the connection was cut: expected TLS's close_notify, found none, so bytes may be missing";
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE:
      return "expected a client certificate, found none: the client needs --tls-cert and --tls-key";
    case SSL_R_TLSV13_ALERT_CERTIFICATE_REQUIRED:
      return "the server asks for a client certificate: set --tls-cert and --tls-key";
    case SSL_R_TLSV1_ALERT_UNKNOWN_CA:
      return "the peer refused this side's certificate: it was signed by a CA that the peer does not trust";
    case SSL_R_SSLV3_ALERT_CERTIFICATE_EXPIRED:
      return "the peer refused this side's certificate: it has expired and must be renewed";
    case SSL_R_SSLV3_ALERT_BAD_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_UNKNOWN:
    case SSL_R_SSLV3_ALERT_UNSUPPORTED_CERTIFICATE:
    case SSL_R_SSLV3_ALERT_CERTIFICATE_REVOKED:
      return "the peer refused this side's certificate (" + library_error(code) + "); its own output says why";
    case SSL_R_DECRYPTION_FAILED_OR_BAD_RECORD_MAC: return "a TLS record was changed in transit";
    case SSL_R_SSLV3_ALERT_BAD_RECORD_MAC: return "the peer found that a TLS record was changed in transit";
    case SSL_R_TLSV1_ALERT_DECODE_ERROR: return "the peer found that the connection was cut in the middle of TLS";
    default: return "TLS failed: " + library_error(code);
  }
}

[[noreturn]] void unusable(const std::string& what) {
  std::string why = library_error(ERR_peek_last_error());
  ERR_clear_error();
  throw TlsError(what + " (" + why + ")");
}

}  // namespace parablock

#endif
