// How a client reaches the daemon. Shared by Trainer, Engine and Observer.
#pragma once

#include <string>

#include "refit/api.hpp"
#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit {

/// Where the daemon listens unless told otherwise: $REFIT_SOCKET, else
/// $XDG_RUNTIME_DIR/refit/refitd.sock if it exists, else the system's: $REFIT_SYSTEM_SOCKET (for
/// tests), else /run/refitd/refitd.sock. The daemons of a host do not know of each other; a call
/// that fails with no_such_engine looks whether the other one has the engine, and says so.
[[nodiscard]] REFIT_API std::string default_socket_path();

struct ConnectOptions {
  std::string socket_path;  ///< empty means default_socket_path()
  Waiting waiting = Waiting::adaptive;
  /// Trainer and Engine come back by themselves after the daemon's end and register again what they
  /// hold. False: their calls return Errc::daemon_gone.
  bool reconnect = true;
};

}  // namespace refit
