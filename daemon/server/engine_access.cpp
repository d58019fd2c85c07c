#include "server/engine_access.hpp"

#include <fnmatch.h>

#include <algorithm>
#include <string>

namespace refit::daemon {

EngineAccess EngineAccess::of(const std::vector<EngineRule>& rules, uid_t owner,
                              std::string_view name) {
  EngineAccess access;
  const std::string text(name);
  for (const EngineRule& rule : rules) {
    if (rule.owner && *rule.owner != owner) continue;
    if (::fnmatch(rule.name.c_str(), text.c_str(), 0) != 0) continue;
    access.uids.insert(access.uids.end(), rule.uids.begin(), rule.uids.end());
    access.gids.insert(access.gids.end(), rule.gids.begin(), rule.gids.end());
  }
  std::sort(access.uids.begin(), access.uids.end());
  std::sort(access.gids.begin(), access.gids.end());
  return access;
}

bool EngineAccess::admits(const PeerCredentials& peer) const noexcept {
  const auto has = [this](gid_t gid) { return std::binary_search(gids.begin(), gids.end(), gid); };
  if (std::binary_search(uids.begin(), uids.end(), peer.uid)) return true;
  return !gids.empty() &&
         (has(peer.gid) || std::any_of(peer.groups.begin(), peer.groups.end(), has));
}

}  // namespace refit::daemon
