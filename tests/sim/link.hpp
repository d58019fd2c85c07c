// One session's wires, as the kernel would hold them: the two regions, the bells, the socket.
#pragma once

#include <deque>
#include <memory>
#include <utility>

#include "ipc/doorbell.hpp"
#include "kernel.hpp"
#include "refit/types.hpp"
#include "server/session.hpp"

namespace refit::sim {

struct Link {
  std::uint64_t id = 0;
  std::shared_ptr<daemon::SessionMemory> memory;
  Doorbell daemon_bell;
  Doorbell client_bell;
  std::weak_ptr<daemon::Session> session;
  std::shared_ptr<Process> client;
  std::shared_ptr<Process> daemon;
  bool closed_by_client = false;
  bool closed_by_daemon = false;
  std::deque<std::pair<std::uint64_t, UniqueFd>> tickets;  ///< sent, not read

  /// For the client: the socket hung up.
  [[nodiscard]] bool hung_up() const noexcept {
    return closed_by_daemon || daemon->socket_closed();
  }
  /// For the daemon: the client's end is closed, by itself or by its death.
  [[nodiscard]] bool client_gone() const noexcept {
    return closed_by_client || client->socket_closed();
  }
};

/// A client that waits to be let in.
struct Connecting {
  Role role = Role::trainer;
  std::string name;
  std::shared_ptr<Process> client;
  bool given_up = false;
  bool answered = false;
  std::shared_ptr<Link> link;  ///< null: refused
};

}  // namespace refit::sim
