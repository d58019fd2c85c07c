// The daemon's command line: flags from the option table, and what else it can be asked.
//
// Main thread. Reads no file.
#pragma once

#include <string>

#include "config/configuration.hpp"

namespace refit::daemon {

struct CommandLine {
  enum class Action {
    serve,
    finished,         ///< all was said (help, version, bad arguments): end with `exit_code`
    check_config,     ///< load `configuration`, say what is wrong with it
    print_config,     ///< load it and print it
    print_reference,  ///< the option table for scripts/make-docs
  };
  Action action = Action::serve;
  int exit_code = 0;
  std::string socket_path;  ///< empty: the socket must come from systemd
  ConfigurationSource configuration;
};

CommandLine parse_command_line(int argc, char** argv);

/// The option table, the rules' keys, the flags and the exit codes as JSON, for scripts/make-docs.
[[nodiscard]] std::string reference_json();

}  // namespace refit::daemon
