// The daemon's command line.
#pragma once

#include <string>

#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit::daemon {

struct Options {
  std::string socket_path;  ///< empty: the socket must come from systemd
  Waiting waiting = Waiting::adaptive;
  unsigned copy_threads = 0;   ///< 0: one for each CPU this process may use
  unsigned check_threads = 0;  ///< likewise
  unsigned drain_timeout_ms = 10'000;
  bool verbose = false;
};

/// Parses argv. An engaged `exit_code` means there is nothing more to do (help, version, bad
/// arguments).
struct ParsedOptions {
  Options options;
  int exit_code = -1;
};
ParsedOptions parse_options(int argc, char** argv);

/// The exit codes that operators and units may rely on.
enum ExitCode : int {
  kExitOk = 0,
  kExitFailure = 1,
  kExitBadArguments = 2,
  kExitPermission = 4,
  kExitMissingLibrary = 5,
  kExitBadConfiguration = 6,
};

}  // namespace refit::daemon
