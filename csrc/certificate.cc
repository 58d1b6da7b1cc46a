#include "certificate.h"

#ifdef PARABLOCK_TLS

#include <arpa/inet.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <time.h>

#include <array>
#include <utility>

#include "openssl_handles.h"

namespace parablock {
namespace {

std::string in_memory(Bio bio) {
  char* data = nullptr;
  long bytes = BIO_get_mem_data(bio.get(), &data);
  return std::string(data, static_cast<size_t>(bytes));
}

std::string name_of(const X509_NAME* name) {
  Bio text(BIO_new(BIO_s_mem()));
  X509_NAME_print_ex(text.get(), name, 0, XN_FLAG_RFC2253);
  return in_memory(std::move(text));
}

std::string time_of(const ASN1_TIME* time) {
  Bio text(BIO_new(BIO_s_mem()));
  ASN1_TIME_print(text.get(), time);
  return in_memory(std::move(text));
}

// A name that a stranger chose, made safe for a terminal and a log.
std::string printable(const ASN1_STRING* name) {
  std::string text(reinterpret_cast<const char*>(ASN1_STRING_get0_data(name)),
                   static_cast<size_t>(ASN1_STRING_length(name)));
  for (char& c : text)
    if (c < 0x21 || c > 0x7e) c = '?';
  return text;
}

std::string address_of(const ASN1_STRING* address) {
  const int bytes = ASN1_STRING_length(address);
  if (bytes != 4 && bytes != 16) return "an address of " + std::to_string(bytes) + " bytes";
  char text[INET6_ADDRSTRLEN] = "";
  inet_ntop(bytes == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(address), text, sizeof text);
  return text;
}

// The hosts that a certificate is for, as a reader would write them.
std::string hosts_of(X509* certificate) {
  std::string hosts;
  auto add = [&](const std::string& host) { hosts += (hosts.empty() ? "" : ", ") + host; };
  auto* names = static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(certificate, NID_subject_alt_name, nullptr, nullptr));
  for (int i = 0; i < sk_GENERAL_NAME_num(names); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names, i);
    if (name->type == GEN_DNS) add(printable(name->d.dNSName));
    if (name->type == GEN_IPADD) add(address_of(name->d.iPAddress));
  }
  GENERAL_NAMES_free(names);
  return hosts.empty() ? "no host at all" : hosts;
}

std::string fingerprint_of(const X509* certificate) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned bytes = 0;
  X509_digest(certificate, EVP_sha256(), digest.data(), &bytes);
  return std::string(digest.begin(), digest.begin() + bytes);
}

std::string hex(const std::string& bytes) {
  std::string text;
  for (unsigned char byte : bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

std::string refusal(X509_STORE_CTX* store, const std::string& host, const std::string& ca) {
  int error = X509_STORE_CTX_get_error(store);
  X509* at = X509_STORE_CTX_get_current_cert(store);
  std::string whose = at != nullptr ? "the certificate \"" + name_of(X509_get_subject_name(at)) + '"' : "a certificate";
  switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return whose + " expired on " + time_of(X509_get0_notAfter(at)) + ": it must be renewed";
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return whose + " is valid from " + time_of(X509_get0_notBefore(at)) + ": check the clocks of both machines";
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:  // found before the signature is checked: the names may be forged
      return "expected a certificate for " + host + ", found one for " + hosts_of(at) +
             ": check the address; if it is right, its server needs a certificate for " + host;
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
      return whose + " was not signed by the CA of " + ca + " but by \"" +
             (at != nullptr ? name_of(X509_get_issuer_name(at)) : "") + "\": use the CA file that belongs to it";
    default: return whose + " cannot be used: " + X509_verify_cert_error_string(error);
  }
}

}  // namespace

std::optional<std::string> why_refused(X509_STORE_CTX* store, const TlsSettings& settings, const std::string& host) {
  X509* leaf = X509_STORE_CTX_get0_cert(store);
  X509_STORE_CTX_set_current_cert(store, leaf);
  if (!settings.fingerprint.empty()) {
    std::string found = fingerprint_of(leaf);
    if (found != settings.fingerprint) {
      X509_STORE_CTX_set_error(store, X509_V_ERR_CERT_REJECTED);
      return "expected the certificate with the SHA-256 fingerprint " + hex(settings.fingerprint) + ", found " +
             hex(found) + " (" + name_of(X509_get_subject_name(leaf)) +
             "): if it was renewed, get the new fingerprint from the operator of the server, never from this message";
    }
  }
  int error = X509_V_OK;
  if (!settings.ca_file.empty()) {
    if (X509_verify_cert(store) == 1) return std::nullopt;
  } else {  // the fingerprint identifies the certificate, so its issuer and its hosts do not matter
    if (X509_cmp_current_time(X509_get0_notAfter(leaf)) < 0) error = X509_V_ERR_CERT_HAS_EXPIRED;
    if (X509_cmp_current_time(X509_get0_notBefore(leaf)) > 0) error = X509_V_ERR_CERT_NOT_YET_VALID;
    X509_STORE_CTX_set_error(store, error);
    if (error == X509_V_OK) return std::nullopt;
  }
  return refusal(store, host, settings.ca_file);
}

void describe_certificate(const X509* certificate, TlsInfo& info) {
  info.subject = name_of(X509_get_subject_name(certificate));
  info.issuer = name_of(X509_get_issuer_name(certificate));
  info.fingerprint = hex(fingerprint_of(certificate));
  tm until{};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate), &until) == 1) info.not_after = timegm(&until);
}

}  // namespace parablock

#endif
