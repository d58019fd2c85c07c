// StartedAnew: this very program, started once more as another process that writes to the first.
//
// For what a fork alone will not do: no driver survives one.
#pragma once

#include <sys/types.h>

#include <map>
#include <string>
#include <vector>

#include "posix/unique_fd.hpp"

namespace refit::test {

/// Gone when the object is.
class StartedAnew {
 public:
  /// Its environment has the number of the fd that it writes to as `mark`, and `more`.
  StartedAnew(const char* mark, const std::map<std::string, std::string>& more,
              std::vector<std::string> arguments = {});
  ~StartedAnew() { kill_now(); }
  StartedAnew(const StartedAnew&) = delete;
  StartedAnew& operator=(const StartedAnew&) = delete;

  /// What it writes.
  UniqueFd from;

  /// Stops it; returns when it is.
  void stop_now() const;
  void kill_now();

 private:
  pid_t pid_ = -1;
};

}  // namespace refit::test
