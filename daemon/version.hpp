// The daemon's version, as --version, WELCOME and status print it.
#pragma once

namespace refit::daemon {

inline constexpr char kVersion[] = REFIT_VERSION;

}  // namespace refit::daemon
