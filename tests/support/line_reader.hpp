// LineReader: what a child process of a test says, one line at a time.
//
// One thread. Owns the descriptor. Its waits are bounded, so that a child that says nothing is an
// answer and not a hang.
#pragma once

#include <string>

namespace refit::test {

class LineReader {
 public:
  LineReader() = default;
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  /// Takes `fd` over; once.
  void adopt(int fd) { fd_ = fd; }
  /// The next line; "silence" after a bound, "gone" if the other end closed.
  std::string next();

 private:
  int fd_ = -1;
  std::string unread_;
};

}  // namespace refit::test
