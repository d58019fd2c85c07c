// Quota: the words of a refusal by a limit: who, what is used, what is allowed, and which setting
// says so.
//
// Pure.
#pragma once

#include <optional>
#include <string>

#include "config/configuration.hpp"

namespace refit::daemon {

struct Demand {
  const char* key;   ///< "limits.sessions_per_uid"
  const char* what;  ///< "sessions"
  std::uint64_t used;
  std::uint64_t more;
  std::uint64_t allowed;
};

/// Nothing if it fits.
inline std::optional<Error> over_quota(const Demand& demand, uid_t uid, const std::string& label,
                                       const Configuration& configuration) {
  if (demand.used <= demand.allowed && demand.more <= demand.allowed - demand.used) return {};
  return Error{Errc::quota,
               0,
               label + ": uid " + std::to_string(uid) + " uses " + std::to_string(demand.used) +
                   " of " + std::to_string(demand.allowed) + " " + demand.what + " and asks for " +
                   std::to_string(demand.more) + " more; the limit is " + demand.key + " in " +
                   configuration.file,
               {}};
}

}  // namespace refit::daemon
