// Registry: the sessions that are there, who an engine's name belongs to and may use it, and what
// each uid uses.
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

/// What one uid uses at a moment.
struct Usage {
  std::uint64_t sessions = 0;
  std::uint64_t requests = 0;  ///< taken and not answered
  std::uint64_t regions = 0;
  std::uint64_t registered_bytes = 0;
  std::uint64_t unclaimed_fds = 0;
  std::uint64_t tensors = 0;
};

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

  /// The engine `name` that `asker` may use: its own uid's, else the one of another uid that allows
  /// it. Allocates only to refuse. Errors: no_such_engine; permission if others have the name and
  /// none allows it; bad_argument if several do.
  [[nodiscard]] Result<std::shared_ptr<Session>> engine_for(const Session& asker,
                                                            std::string_view name) const;

  /// engine_for, and awake: Errc::engine_asleep for one that gave its memory up.
  [[nodiscard]] Result<std::shared_ptr<Session>> awake_engine_for(const Session& asker,
                                                                  std::string_view name) const;

  /// The module of an engine that `asker` may use.
  [[nodiscard]] Result<std::shared_ptr<Module>> module_of(const Session& engine,
                                                          std::string_view name) const;

  /// Root and the daemon's own uid: they run it, and may still not touch others' weights.
  [[nodiscard]] static bool is_operator(uid_t uid);
  /// May `asker` know more of `other` than its name and state?
  [[nodiscard]] static bool may_see(const Session& asker, const Session& other);

  /// Added up from the sessions when somebody asks, which is never in a steady refit: there are no
  /// counters that could drift.
  [[nodiscard]] Usage usage_of(uid_t uid) const;

 private:
  [[nodiscard]] Unexpected refuse(const Session& asker, std::string_view name,
                                  bool ambiguous) const;
};

}  // namespace refit::daemon
