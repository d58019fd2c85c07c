// The name of a module of an engine, as a person types it: ENGINE/MODULE.
//
// Pure; any thread. Knows nothing of options, files or the daemon.
#pragma once

#include <string>
#include <string_view>

#include "refit/result.hpp"

namespace refit::ctl {

struct Target {
  std::string engine;
  std::string module;

  [[nodiscard]] std::string to_string() const { return engine + "/" + module; }
  friend bool operator==(const Target& a, const Target& b) noexcept {
    return a.engine == b.engine && a.module == b.module;
  }
};

/// Splits at the first slash, so that a module's name may hold one. Errc::bad_argument if a part is
/// missing.
[[nodiscard]] Result<Target> parse_target(std::string_view text);

}  // namespace refit::ctl
