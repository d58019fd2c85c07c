// How a client reaches the daemon. Shared by Trainer, Engine and Observer.
#pragma once

#include <string>

#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit {

/// Where the daemon listens unless told otherwise: $REFIT_SOCKET, else
/// $XDG_RUNTIME_DIR/refit/refitd.sock if it exists, else /run/refitd/refitd.sock.
[[nodiscard]] std::string default_socket_path();

struct ConnectOptions {
  std::string socket_path;  ///< empty means default_socket_path()
  Waiting waiting = Waiting::adaptive;
};

}  // namespace refit
