// Parsing of ENGINE/MODULE. Pure; any thread. Knows nothing of options, files or the daemon.
#include "refitctl/target.hpp"

namespace refit::ctl {

Result<Target> parse_target(std::string_view text) {
  const std::size_t slash = text.find('/');
  if (slash == std::string_view::npos || slash == 0 || slash + 1 == text.size()) {
    return fail(Errc::bad_argument, "\"" + std::string(text) +
                                        "\" is not a target: write ENGINE/MODULE, as in "
                                        "engine0/transformer");
  }
  return Target{std::string(text.substr(0, slash)), std::string(text.substr(slash + 1))};
}

}  // namespace refit::ctl
