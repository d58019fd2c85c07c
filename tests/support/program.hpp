// Program: runs refitd to its end and keeps what it said and how it ended, for tests of its exits.
//
// One thread; the child is gone when the call returns.
#pragma once

#include <string>
#include <vector>

namespace refit::test {

struct ProgramEnd {
  int status = -1;     ///< waitpid's
  std::string output;  ///< stdout and stderr
};

/// Runs refitd with `arguments` until it ends; kills it after a bound, so that nothing hangs.
ProgramEnd run_refitd(const std::vector<std::string>& arguments);

}  // namespace refit::test
