// Registry: the sessions that are there, and who an engine's name belongs to.
//
// The loop thread alone. Knows nothing of operations or events.
#pragma once

#include <map>
#include <memory>
#include <string_view>

#include "server/session.hpp"

namespace refit::daemon {

/// What is said of everything that wants the memory of an engine that sleeps.
[[nodiscard]] Error asleep_error(const Session& engine);

class Registry {
 public:
  std::map<std::uint64_t, std::shared_ptr<Session>> sessions;

  [[nodiscard]] std::shared_ptr<Session> find(std::uint64_t id) const {
    const auto found = sessions.find(id);
    return found == sessions.end() ? nullptr : found->second;
  }

  /// The engine `name` of `uid`, or nullptr.
  [[nodiscard]] std::shared_ptr<Session> find_engine(uid_t uid, std::string_view name) const {
    for (const auto& [id, session] : sessions) {
      if (session->role == Role::engine && session->peer.uid == uid && session->name == name)
        return session;
    }
    return nullptr;
  }

  /// The engine `name` that `asker` may use; otherwise says whether nobody has the name or another
  /// uid has.
  [[nodiscard]] Result<std::shared_ptr<Session>> engine_for(const Session& asker,
                                                            std::string_view name) const;

  /// engine_for, and awake: Errc::engine_asleep for one that gave its memory up.
  [[nodiscard]] Result<std::shared_ptr<Session>> awake_engine_for(const Session& asker,
                                                                  std::string_view name) const;

  /// The module of an engine that `asker` may use.
  [[nodiscard]] Result<std::shared_ptr<Module>> module_of(const Session& engine,
                                                          std::string_view name) const;

  [[nodiscard]] std::size_t count_of(uid_t uid) const;
};

}  // namespace refit::daemon
