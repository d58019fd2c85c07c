// OtherUser: a function run in a process of another uid, so that a test can be two users.
//
// Forks, so only while the test has one thread. The child speaks one line at a time and waits where
// it is told to; it is gone when the object is. Needs root.
#pragma once

#include <sys/types.h>

#include <functional>
#include <string>
#include <vector>

#include "support/line_reader.hpp"

namespace refit::test {

class OtherUser {
 public:
  /// The child's end of the conversation.
  class Talk {
   public:
    Talk(int to, int from) : to_(to), from_(from) {}
    void say(const std::string& line) const;
    /// Blocks until the test says go().
    void wait() const;

   private:
    int to_;
    int from_;
  };

  /// Runs `body` as `uid` with exactly `groups` (the first one is the primary one).
  OtherUser(uid_t uid, const std::vector<gid_t>& groups, const std::function<void(Talk&)>& body);
  ~OtherUser();
  OtherUser(const OtherUser&) = delete;
  OtherUser& operator=(const OtherUser&) = delete;

  /// What the child says next; "silence" after a bound, "gone" if it ended.
  std::string hear();
  void go() const;

 private:
  pid_t pid_ = -1;
  int to_ = -1;
  LineReader from_;
};

}  // namespace refit::test
