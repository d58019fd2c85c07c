// Names of users, as this host has them.
//
// Asks the system's user database, which may ask a network; any thread. Knows nothing of sessions.
#pragma once

#include <cstdint>
#include <string>

namespace refit::ctl {

/// "alice (1000)", or "1000" if the host has no name for the uid.
[[nodiscard]] std::string user_label(std::uint32_t uid);

}  // namespace refit::ctl
