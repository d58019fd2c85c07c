// EngineAccess: which uids and groups, besides its own, may use an engine.
//
// Worked out when the engine connects and when the rules change, so that a request costs a search
// in two short sorted lists. Pure.
#pragma once

#include <string_view>
#include <vector>

#include "config/settings.hpp"

namespace refit::daemon {

/// What the kernel says of who connected.
struct PeerCredentials {
  uid_t uid = 0;
  gid_t gid = 0;
  pid_t pid = 0;
  std::vector<gid_t> groups;  ///< the supplementary ones
};

struct EngineAccess {
  std::vector<uid_t> uids;  ///< sorted
  std::vector<gid_t> gids;  ///< sorted

  /// What the rules allow for engine `name` of `owner`.
  static EngineAccess of(const std::vector<EngineRule>& rules, uid_t owner, std::string_view name);
  [[nodiscard]] bool admits(const PeerCredentials& peer) const noexcept;
};

}  // namespace refit::daemon
