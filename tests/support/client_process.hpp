// ClientProcess: a trainer or an engine in a process of its own, so that a test can kill or stop
// it.
//
// Runs the small binary of support/peer_main.cpp and speaks its line protocol over two pipes: one
// command a line, one answer a line, "ok ..." or "error ERRC TEXT". Everything is gone when the
// object is. One thread.
#pragma once

#include <sys/types.h>

#include <string>

#include "support/line_reader.hpp"

namespace refit::test {

class ClientProcess {
 public:
  ClientProcess();
  ~ClientProcess();
  ClientProcess(const ClientProcess&) = delete;
  ClientProcess& operator=(const ClientProcess&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  /// Sends a command and does not wait for its answer.
  void tell(const std::string& command);
  /// The next answer; "silence" after a bound, "gone" if the process ended.
  std::string hear();
  /// tell and hear.
  std::string ask(const std::string& command);
  void send_signal(int signal) const;
  /// SIGKILL, and waits until the kernel has taken it away.
  void kill_now();

 private:
  pid_t pid_ = -1;
  int to_ = -1;
  LineReader from_;
};

}  // namespace refit::test
