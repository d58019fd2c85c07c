// Names of users, as this host has them. Any thread. Knows nothing of sessions.
#include "refitctl/users.hpp"

#include <pwd.h>

#include <vector>

namespace refit::ctl {

std::string user_label(std::uint32_t uid) {
  std::vector<char> buffer(std::size_t{16} * 1024);
  passwd entry{};
  passwd* found = nullptr;
  if (::getpwuid_r(uid, &entry, buffer.data(), buffer.size(), &found) != 0 || found == nullptr)
    return std::to_string(uid);
  return std::string(found->pw_name) + " (" + std::to_string(uid) + ")";
}

}  // namespace refit::ctl
