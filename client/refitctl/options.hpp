// What the user asked refitctl for.
//
// Pure but for the socket's default, which is of the environment. One thread. The only place that
// knows the option library; knows nothing of the daemon.
#pragma once

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "refit/types.hpp"
#include "refitctl/failure.hpp"
#include "refitctl/target.hpp"

namespace refit::ctl {

enum class Command {
  status,
  sessions,
  modules,
  tensors,
  digest,
  check,
  metrics,
  drain,
  reload,
  doctor
};

struct Options {
  Command command = Command::status;
  std::string socket_path;
  bool socket_given = false;  ///< by --socket, and not by the environment
  double timeout_s = 0;
  bool json = false;
  std::optional<Target> target;            ///< of tensors and digest; of check if it was given
  std::optional<DigestKind> kind;          ///< nothing if it was not given
  std::vector<std::string> tensors;        ///< digest: empty means all
  Place place = Place::host;               ///< digest and check: where bytes are looked at
  bool module = false;                     ///< digest: also the module's own
  std::string manifest_path;               ///< check: "-" is standard input
  std::optional<double> watch_interval_s;  ///< status: nothing to look once
  bool names = false;                      ///< modules and tensors: only the names
  std::string textfile_path;               ///< metrics: empty means standard output
  bool wait = false;                       ///< drain and reload: until it is done
};

/// Help or a version, to be printed to standard output.
struct Information {
  std::string text;
};

/// Errors: bad arguments; a bad configuration if the environment names an unusable socket.
[[nodiscard]] Outcome<std::variant<Options, Information>> parse_options(int argc,
                                                                        const char* const* argv);

}  // namespace refit::ctl
