// Where else an engine may be: a host can have a system daemon and one of each user, and they do
// not know of each other.
//
// Entered only when a call has failed with no_such_engine; takes a bounded time. One thread.
#pragma once

#include <string>

#include "refit/result.hpp"

namespace refit {

/// Where the system's daemon listens: $REFIT_SYSTEM_SOCKET (for tests), else
/// /run/refitd/refitd.sock.
[[nodiscard]] std::string system_socket_path();
/// Where this user's daemon listens: $XDG_RUNTIME_DIR/refit/refitd.sock, with /run/user/UID if that
/// is not set.
[[nodiscard]] std::string user_socket_path();

/// Adds a line to `error` if it is no_such_engine and another well-known daemon than the one at
/// `asked` has this user's `engine`.
void tell_where_to_look(Error& error, const std::string& asked, const std::string& engine);

}  // namespace refit
