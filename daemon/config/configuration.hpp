// Configuration: the settings in force and where each came from: flag, file or built in.
//
// Loading reads one file and looks up names, which may block: not on the loop thread.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "config/option.hpp"
#include "config/settings.hpp"
#include "refit/result.hpp"

namespace refit::daemon {

inline constexpr const char* kDefaultFile = "/etc/refitd/refitd.toml";

/// What the command line says of the configuration.
struct ConfigurationSource {
  std::string file = kDefaultFile;
  bool file_required = false;  ///< named by the caller: must be there
  std::vector<std::pair<const Option*, std::uint64_t>> flags;
};

struct Configuration {
  Settings settings;
  std::string file = kDefaultFile;  ///< where a setting is or would be
  bool file_read = false;
  std::vector<std::string> origins;       ///< one for each of options()
  std::vector<std::string> rule_origins;  ///< one for each of settings.engines
};

/// Errors: Errc::bad_configuration; the details are everything that is wrong with the file, each
/// with file, line and column.
Result<Configuration> load(const ConfigurationSource& source);

/// Takes a file's text into `into`, on top of what stands there. Errors as load().
Result<void> apply_text(std::string_view text, Configuration& into);

/// The whole configuration as a file that would give it, each value with its origin.
[[nodiscard]] std::string print(const Configuration& configuration);

/// What a reload changed, by key ("engine" for the rules).
struct Changes {
  std::vector<std::string> changed;
  std::vector<std::string> needs_restart;  ///< differ from what runs and were left alone
};

/// Makes `running` what `loaded` says, but for what needs a restart.
Changes take_over(Configuration& running, Configuration loaded);

}  // namespace refit::daemon
