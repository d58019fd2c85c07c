#include "server/registry.hpp"

#include <algorithm>

#include "plan/text.hpp"

namespace refit::daemon {

Error asleep_error(const Session& engine) {
  return {Errc::engine_asleep,
          0,
          "engine " + engine.name +
              " sleeps; its memory is given up until it wakes (Engine::wake). Nothing was changed; "
              "ask again then",
          {}};
}

Result<std::shared_ptr<Session>> Registry::engine_for(const Session& asker,
                                                      std::string_view name) const {
  if (auto engine = find_engine(asker.peer.uid, name)) return engine;
  std::string known;
  for (const auto& [id, session] : sessions) {
    if (session->role != Role::engine) continue;
    if (session->name == name) {
      return fail(Errc::permission, "engine " + std::string(name) + " belongs to uid " +
                                        std::to_string(session->peer.uid) +
                                        "; this session's uid is " +
                                        std::to_string(asker.peer.uid));
    }
    if (session->peer.uid == asker.peer.uid) known += (known.empty() ? "" : ", ") + session->name;
  }
  return fail(Errc::no_such_engine, "no engine is registered as " + quoted(name) +
                                        (known.empty() ? "; no engine of this uid is connected"
                                                       : "; engines of this uid: " + known));
}

Result<std::shared_ptr<Session>> Registry::awake_engine_for(const Session& asker,
                                                            std::string_view name) const {
  REFIT_TRY_ASSIGN(auto engine, engine_for(asker, name));
  if (engine->asleep) return Unexpected(asleep_error(*engine));
  return engine;
}

Result<std::shared_ptr<Module>> Registry::module_of(const Session& engine,
                                                    std::string_view name) const {
  const auto found = engine.modules.find(name);
  if (found != engine.modules.end()) return found->second;
  std::string known;
  for (const auto& [module, value] : engine.modules) known += (known.empty() ? "" : ", ") + module;
  return fail(Errc::no_such_module,
              std::string(role_name(engine.role)) + " " + engine.name + " registered no module " +
                  quoted(name) + (known.empty() ? "; it registered none" : "; it has: " + known));
}

std::size_t Registry::count_of(uid_t uid) const {
  return static_cast<std::size_t>(
      std::count_if(sessions.begin(), sessions.end(),
                    [uid](const auto& entry) { return entry.second->peer.uid == uid; }));
}

}  // namespace refit::daemon
