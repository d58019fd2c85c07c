// The exit codes of refitd, which operators and units may rely on: one table for the code and the
// documents.
//
// 2 to 6 are the LSB's meanings, as systemd.exec(5) has them.
#pragma once

#include <array>
#include <string_view>

// X(name, number, what it says)
#define REFIT_EXIT_TABLE(X)                                                                     \
  X(kExitOk, 0, "done: drained after a signal, or what was asked for is printed")               \
  X(kExitFailure, 1, "runtime failure; standard error says which")                              \
  X(kExitBadArguments, 2, "bad arguments, or no socket to serve")                               \
  X(kExitPermission, 4, "no permission: the system refused the socket or its directory")        \
  X(kExitMissingLibrary, 5, "a driver or library is missing; no build for host memory ends so") \
  X(kExitBadConfiguration, 6,                                                                   \
    "bad configuration; every error is named with file, line and column")                       \
  X(kExitDeviceLost, 10, "a GPU answers nothing any more in this process: start another")

namespace refit::daemon {

enum ExitCode : int {
#define REFIT_X(name, number, meaning) name = number,
  REFIT_EXIT_TABLE(REFIT_X)
#undef REFIT_X
};

struct ExitMeaning {
  int code;
  std::string_view meaning;
};

inline constexpr std::array kExitMeanings{
#define REFIT_X(name, number, meaning) ExitMeaning{number, meaning},
    REFIT_EXIT_TABLE(REFIT_X)
#undef REFIT_X
};

}  // namespace refit::daemon
