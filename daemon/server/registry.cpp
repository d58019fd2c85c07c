#include "server/registry.hpp"

#include <unistd.h>

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
  std::shared_ptr<Session> allowed;
  bool several = false;
  for (const auto& [id, session] : sessions) {
    if (session->role != Role::engine || session->name != name) continue;
    if (!session->access.admits(asker.peer)) continue;
    several = several || allowed != nullptr;
    allowed = session;
  }
  if (allowed != nullptr && !several) return allowed;
  return refuse(asker, name, several);
}

Unexpected Registry::refuse(const Session& asker, std::string_view name, bool ambiguous) const {
  std::string holders;
  std::string known;
  for (const auto& [id, session] : sessions) {
    if (session->role != Role::engine) continue;
    const bool usable = session->peer.uid == asker.peer.uid || session->access.admits(asker.peer);
    if (usable) known += (known.empty() ? "" : ", ") + session->name;
    if (session->name != name || (ambiguous && !usable)) continue;
    holders += (holders.empty() ? "uid " : ", uid ") + std::to_string(session->peer.uid) +
               " (session " + std::to_string(id) + ")";
  }
  if (ambiguous) {
    return fail(Errc::bad_argument, "engine " + std::string(name) + " is ambiguous: uid " +
                                        std::to_string(asker.peer.uid) +
                                        " has none of that name and may use those of " + holders +
                                        "; give them different names");
  }
  if (!holders.empty()) {
    return fail(Errc::permission,
                "engine " + std::string(name) + " belongs to " + holders +
                    "; this session's uid is " + std::to_string(asker.peer.uid) +
                    ", which no [[engine]] rule of the daemon's configuration allows to use it");
  }
  return fail(Errc::no_such_engine, "no engine is registered as " + in_quotes(name) +
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
                  in_quotes(name) +
                  (known.empty() ? "; it registered none" : "; it has: " + known));
}

bool Registry::is_operator(uid_t uid) { return uid == 0 || uid == ::geteuid(); }

bool Registry::may_see(const Session& asker, const Session& other) {
  const uid_t uid = asker.peer.uid;
  if (uid == other.peer.uid || is_operator(uid)) return true;
  return other.role == Role::engine && other.access.admits(asker.peer);
}

Usage Registry::usage_of(uid_t uid) const {
  Usage usage;
  for (const auto& [id, session] : sessions) {
    if (session->peer.uid != uid) continue;
    ++usage.sessions;
    usage.requests += session->in_flight;
    for (const auto& [ticket, held] : session->tickets) usage.unclaimed_fds += held.fd ? 1U : 0U;
    for (const auto& [name, module] : session->modules) {
      const Registration& registration = *module->registration;
      usage.regions += registration.regions.size();
      for (const MappedRegion& region : registration.regions)
        usage.registered_bytes += region.bytes;
      usage.tensors += registration.manifest->tensors().size();
    }
  }
  return usage;
}

}  // namespace refit::daemon
