// One TLS connection with OpenSSL: its records and the socket. Independent of where certificates and trust come from.
#pragma once

#ifdef PARABLOCK_TLS

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "openssl_handles.h"
#include "tls.h"

namespace parablock {

class OpenSslStream final : public TlsStream {
 public:
  // Sets the options that the streams of this context rely on. Call before making the first stream.
  static void prepare(SSL_CTX* context);

  OpenSslStream(const TlsSettings& settings, Ssl ssl, int fd);  // `settings` must outlive the stream

  void start_connecting(const std::string& host);
  void start_accepting();

  ssize_t read(const iovec* vectors, size_t count) override;
  ssize_t write(const iovec* vectors, size_t count) override;
  bool shut_write() override;
  bool opening() const override { return opening_; }
  bool unsent() const override { return sent_ < sealed_.size(); }
  bool unread() const override {
    bool failure_to_tell = !failure_.empty() && !failure_told_;
    return failure_to_tell || (!starved_ && SSL_has_pending(ssl_.get()) == 1);
  }
  const std::string& failure() const override { return failure_; }
  bool permanent() const override { return permanent_; }
  std::shared_ptr<const TlsInfo> info() const override { return info_.load(); }

  bool verify(X509_STORE_CTX* store);

  // Callbacks from OpenSSL: outgoing and incoming records, and every handshake message that it has read.
  bool seal_into_buffer(const char* data, size_t bytes);
  ssize_t receive(char* data, size_t bytes);  // like recv
  bool ended() const { return ended_; }
  void note_handshake_message() { late_messages_ += opening_ ? 0 : 1; }

 private:
  bool floods() const;
  bool put_record(const void* data, size_t bytes);
  bool shake_hands();
  bool flush();
  ssize_t seal(const iovec* vectors, size_t count, size_t skip);
  ssize_t read_records(const iovec* vectors, size_t count);
  ssize_t not_now(int result);
  void fail(std::string why, bool permanent);
  void note_info();

  const TlsSettings& settings_;
  int fd_;
  std::string host_;
  Ssl ssl_;
  std::vector<char> sealed_;  // records that wait for the socket, from sent_ on; one `send` takes many records
  size_t sent_ = 0;
  bool opening_ = true;
  bool starved_ = false;  // OpenSSL holds no more than a part of a record
  bool shut_ = false;
  bool ended_ = false;  // the socket has ended
  uint64_t read_bytes_ = 0;
  uint64_t late_messages_ = 0;  // handshake messages read after the handshake
  uint64_t sealed_records_ = 0;
  std::string refused_;  // why the peer's certificate was refused
  std::string failure_;
  bool permanent_ = false;
  bool failure_told_ = false;
  std::atomic<std::shared_ptr<const TlsInfo>> info_;
};

}  // namespace parablock

#endif
