// How the bench talks to its own trainer and engine processes: JSON with a length before it, and
// fds, over a socketpair.
//
// One thread per end. Nothing timed ever crosses it: roles measure by themselves and send the
// samples. Knows nothing of the daemon's protocol.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit::bench {

struct Message {
  nlohmann::json body;
  UniqueFd fd;  ///< at most one travels with a message
};

class Channel {
 public:
  explicit Channel(UniqueFd socket) : socket_(std::move(socket)) {}

  /// Two connected ends. Errors: os.
  static Result<std::pair<Channel, Channel>> make_pair();

  [[nodiscard]] Result<void> send(const nlohmann::json& body, int fd = -1);
  /// Nothing if no message began within `timeout`. Errors: os; engine_gone if the peer closed its
  /// end.
  [[nodiscard]] Result<std::optional<Message>> receive(std::chrono::milliseconds timeout);
  [[nodiscard]] int fd() const noexcept { return socket_.get(); }

 private:
  UniqueFd socket_;
};

}  // namespace refit::bench
