#include "server/registrar.hpp"

#include <fcntl.h>

#include <algorithm>
#include <bitset>

#include "digest/digest.hpp"
#include "ipc/state_word.hpp"
#include "server/quota.hpp"
#include "server/several.hpp"

namespace refit::daemon {
namespace {

/// Engines' memory is written, trainers' is only read: a wrong plan can then never reach it.
Access access_of(const Session& session) {
  return session.role == Role::engine ? Access::read_write : Access::read_only;
}

/// Faults the pages in on a pool thread and answers the registration when they are there.
class PopulateJob final : public BackgroundJob {
 public:
  PopulateJob(std::shared_ptr<Registration> registration, Access access,
              std::function<void(Result<void>, std::uint64_t)> done)
      : BackgroundJob(1),
        registration_(std::move(registration)),
        access_(access),
        done_(std::move(done)) {}

  void run_part(std::size_t) override {
    const auto start = Clock::now();
    for (const Mapping& mapping : registration_->regions) {
      outcome_ = populate(mapping, access_, registration_->manifest->label());
      if (!outcome_) break;
    }
    took_us_ = static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count());
  }
  void finished() override { done_(std::move(outcome_), took_us_); }

 private:
  std::shared_ptr<Registration> registration_;
  Access access_;
  std::function<void(Result<void>, std::uint64_t)> done_;
  Result<void> outcome_;
  std::uint64_t took_us_ = 0;
};

/// Ends what it holds on a pool thread.
template <typename Held>
class DropJob final : public BackgroundJob {
 public:
  explicit DropJob(Held held) : BackgroundJob(1), held_(std::move(held)) {}
  void run_part(std::size_t) override { held_ = Held(); }
  void finished() override {}

 private:
  Held held_;
};

/// What a client claims of its module's bytes. What this daemon knows better stays: a poisoned
/// module is not made whole by registering it again, and no version falls.
void write_initial_words(ModuleBlock& block, const RegisterRequest& request) {
  ModuleReading held = read_module(block);
  if (held.word.state == ModuleState::none) held = ModuleReading{};
  const bool poisoned = held.word.state == ModuleState::poisoned;
  ModuleState state = request.version == 0 ? ModuleState::initial : ModuleState::committed;
  if (request.poisoned || poisoned) state = ModuleState::poisoned;
  const bool keep = poisoned || held.version > request.version;
  block.name.store(payload_hash(request.module.data(), request.module.size()));
  const ModuleWord word = fill_next_record(
      block, held.word.epoch, state, keep ? held.transaction : request.transaction,
      keep ? held.version : request.version, keep ? held.selection : request.selection);
  block.word.store(word.pack());
}

std::string region_label(const Session& session, const RegisterRequest& request,
                         std::size_t index) {
  return session.name + "/" + request.module + ": region " + std::to_string(index);
}

}  // namespace

void Registrar::close_later(std::vector<UniqueFd> fds) {
  if (fds.empty()) return;
  closers_.submit(std::make_unique<DropJob<std::vector<UniqueFd>>>(std::move(fds)),
                  BackgroundPool::Priority::first);
}

void Registrar::drop_later(std::shared_ptr<Registration> registration) {
  background_.submit(
      std::make_unique<DropJob<std::shared_ptr<Registration>>>(std::move(registration)),
      BackgroundPool::Priority::first);
}

Result<Registrar::Mapped> Registrar::map_regions(Session& session, const RegisterRequest& request) {
  // Claim every ticket first, so that a refused registration leaves none behind.
  std::vector<UniqueFd> fds;
  std::vector<Error> problems;
  for (const RegionClaim& claim : request.regions) {
    auto found = session.tickets.find(claim.ticket);
    if (found == session.tickets.end()) {
      drain_tickets(session);
      found = session.tickets.find(claim.ticket);
    }
    if (found == session.tickets.end()) {
      problems.push_back({Errc::unknown_ticket,
                          0,
                          region_label(session, request, fds.size()) + " names ticket " +
                              std::to_string(claim.ticket) + ", for which no fd arrived",
                          {}});
      fds.emplace_back();
      continue;
    }
    if (!found->second.refusal.empty()) {
      problems.push_back({Errc::quota,
                          0,
                          region_label(session, request, fds.size()) + ": " + found->second.refusal,
                          {}});
    }
    fds.push_back(std::move(found->second.fd));
    session.tickets.erase(found);
  }
  // First what is wrong with the memory itself: the declared bytes mean nothing before.
  Result<Mapped> mapped = map_fds(session, request, fds, std::move(problems));
  if (mapped) {
    if (auto fits = check_quotas(session, request); !fits)
      mapped = Unexpected(std::move(fits).error());
  }
  close_later(std::move(fds));
  return mapped;
}

/// What the module would add to what its uid uses; one that it replaces goes. All of its regions
/// are known to have the bytes that they declare.
Result<void> Registrar::check_quotas(const Session& session, const RegisterRequest& request) const {
  const Limits& limits = configuration_.settings.limits;
  Usage used = registry_.usage_of(session.peer.uid);
  if (const auto found = session.modules.find(request.module); found != session.modules.end()) {
    const Registration& old = *found->second->registration;
    used.regions -= old.regions.size();
    used.tensors -= old.manifest->tensors().size();
    for (const Mapping& mapping : old.regions) used.registered_bytes -= mapping.bytes();
  }
  std::uint64_t bytes = 0;
  for (const RegionClaim& claim : request.regions) bytes += claim.bytes;
  const std::uint64_t tensors = request.tensors.size();
  std::vector<Error> problems;
  for (const Demand& demand :
       {Demand{"limits.tensors_per_module", "tensors in one module", 0, tensors,
               limits.tensors_per_module},
        Demand{"limits.tensors_per_uid", "tensors", used.tensors, tensors, limits.tensors_per_uid},
        Demand{"limits.regions_per_uid", "regions", used.regions, request.regions.size(),
               limits.regions_per_uid},
        Demand{"limits.registered_bytes_per_uid", "registered bytes", used.registered_bytes, bytes,
               limits.registered_bytes_per_uid}}) {
    if (auto over = over_quota(demand, session.peer.uid, session.name + "/" + request.module,
                               configuration_)) {
      problems.push_back(std::move(*over));
    }
  }
  if (problems.empty()) return {};
  return several(std::move(problems));
}

/// Maps every fd, or lists what is wrong with each that cannot be. A missing one is in `problems`
/// already.
Result<Registrar::Mapped> Registrar::map_fds(const Session& session, const RegisterRequest& request,
                                             const std::vector<UniqueFd>& fds,
                                             std::vector<Error> problems) {
  Mapped mapped;
  for (std::size_t i = 0; i < fds.size(); ++i) {
    if (!fds[i]) continue;
    auto done = map_fd(fds[i].get(), request.regions[i].bytes, access_of(session),
                       region_label(session, request, i), mapped);
    if (done) mapped.infos.back().pool = request.regions[i].pool;
    if (!done) problems.push_back(std::move(done).error());
  }
  if (!problems.empty()) return several(std::move(problems));
  return mapped;
}

Result<void> Registrar::map_fd(int fd, std::uint64_t declared_bytes, Access access,
                               const std::string& label, Mapped& mapped) {
  REFIT_TRY_ASSIGN(const MemfdInfo info, inspect_memfd(fd, label));
  if ((info.seals & F_SEAL_SHRINK) == 0) {
    return fail(
        Errc::bad_region,
        label + " is not sealed against shrinking (F_SEAL_SHRINK); use refit::SharedMemory");
  }
  if (info.bytes < declared_bytes) {
    return fail(Errc::bad_region, label + " has " + std::to_string(info.bytes) + " bytes, but " +
                                      std::to_string(declared_bytes) + " were declared");
  }
  // Pages that populating would allocate are charged to this daemon: the client brings its own.
  if (info.backed_bytes < declared_bytes) {
    return fail(Errc::bad_region,
                label + " has memory behind " + std::to_string(info.backed_bytes) + " of " +
                    std::to_string(declared_bytes) +
                    " bytes; allocate it (posix_fallocate) or use refit::SharedMemory");
  }
  REFIT_TRY_ASSIGN(Mapping mapping, Mapping::map(fd, declared_bytes, access, label));
  mapped.mappings.push_back(std::move(mapping));
  mapped.infos.push_back({declared_bytes, info.device, info.inode});
  return {};
}

Result<std::shared_ptr<Module>> Registrar::place(Session& session, const RegisterRequest& request,
                                                 std::shared_ptr<Registration> registration) {
  // A refit of one module must not change another's bytes behind its version, whichever engine has
  // it.
  std::vector<std::string> shared;
  for (const auto& [id, holder] : registry_.sessions) {
    if (session.role != Role::engine || holder->role != Role::engine) continue;
    for (const auto& [name, other] : holder->modules) {
      if (id == session.id && name == request.module) continue;
      if (other->registration->asleep) continue;  // its memory may be anybody's by now
      const auto lines = registration->manifest->shared_with(*other->registration->manifest);
      shared.insert(shared.end(), lines.begin(), lines.end());
    }
  }
  if (!shared.empty()) {
    return fail(Errc::bad_manifest,
                registration->manifest->label() + " shares memory with another module",
                std::move(shared));
  }
  const auto found = session.modules.find(request.module);
  if (found != session.modules.end()) {
    if (!release_module(session, *found->second)) {
      return fail(Errc::busy, session.name + "/" + request.module +
                                  " is being written; register it again after the refit");
    }
    drop_later(std::exchange(found->second->registration, std::move(registration)));
    return found->second;
  }
  if (session.modules.size() >= kModulesMax) {
    return fail(Errc::quota, session.name + ": " + std::to_string(kModulesMax) +
                                 " modules are registered, which is the limit");
  }
  std::bitset<kModulesMax> used;
  for (const auto& [name, module] : session.modules) used.set(module->slot);
  auto module = std::make_shared<Module>();
  module->name = request.module;
  module->registration = std::move(registration);
  while (used.test(module->slot)) ++module->slot;
  session.modules.emplace(request.module, module);
  return module;
}

void Registrar::register_module(Session& session, std::uint64_t request_id,
                                const wire::RegisterModule& message) {
  const auto refuse = [&](const Error& error) { replies_.send_error(session, request_id, error); };
  if (session.role == Role::observer) {
    return refuse({Errc::permission, 0, "an observer registers nothing", {}});
  }
  auto request = decode(message, ManifestLimits{});
  if (!request) return refuse(request.error());
  if (request->asleep) return register_asleep(session, request_id, *request);
  auto mapped = map_regions(session, *request);
  if (!mapped) return refuse(mapped.error());

  auto manifest =
      Manifest::validate(session.name + "/" + request->module, session.role,
                         std::move(request->tensors), std::move(mapped->infos),
                         std::move(request->name_map), {}, std::move(request->layer_buffers));
  if (!manifest) return refuse(manifest.error());
  auto registration = std::make_shared<Registration>();
  registration->manifest = std::move(*manifest);
  registration->residency_base = request->residency_base;
  registration->regions = std::move(mapped->mappings);
  registration->generation = next_generation_++;
  auto module = place(session, *request, registration);
  if (!module) return refuse(module.error());
  if (session.role == Role::engine) {
    write_initial_words(session.memory->response_region().modules[(*module)->slot], *request);
  }

  const std::uint64_t session_id = session.id;
  const std::uint32_t slot = (*module)->slot;
  auto job = std::make_unique<PopulateJob>(
      registration, access_of(session),
      [this, session_id, request_id, registration, slot](Result<void> outcome,
                                                         std::uint64_t took_us) {
        registration->populated = outcome.has_value();
        scheduler_.advance();
        const auto owner = registry_.find(session_id);
        if (owner == nullptr) return;
        if (!outcome) {
          for (auto entry = owner->modules.begin(); entry != owner->modules.end(); ++entry) {
            if (entry->second->registration != registration) continue;
            release_module(*owner, *entry->second);
            owner->modules.erase(entry);
            break;
          }
          return replies_.send_error(*owner, request_id, outcome.error());
        }
        auto& fbb = replies_.builder();
        replies_.send(*owner, request_id, wire::Body::Registered,
                      wire::CreateRegistered(fbb, registration->generation, took_us, slot).Union());
      });
  background_.submit(std::move(job), BackgroundPool::Priority::first);
}

/// A module of an engine that slept while its last daemon went: what is known of it, without
/// memory.
void Registrar::register_asleep(Session& session, std::uint64_t request_id,
                                const RegisterRequest& request) {
  const auto refuse = [&](const Error& error) { replies_.send_error(session, request_id, error); };
  if (!session.asleep || !request.regions.empty() || !request.tensors.empty()) {
    return refuse({Errc::bad_argument,
                   0,
                   session.name + "/" + request.module + " is registered asleep, but " +
                       (session.asleep ? "with memory" : "its engine is awake"),
                   {}});
  }
  auto manifest = Manifest::validate(session.name + "/" + request.module, session.role, {}, {}, {});
  if (!manifest) return refuse(manifest.error());
  auto registration = std::make_shared<Registration>();
  registration->manifest = std::move(*manifest);
  registration->asleep = true;
  auto module = place(session, request, std::move(registration));
  if (!module) return refuse(module.error());
  const std::uint32_t slot = (*module)->slot;
  write_initial_words(session.memory->response_region().modules[slot], request);
  auto& fbb = replies_.builder();
  replies_.send(session, request_id, wire::Body::Registered,
                wire::CreateRegistered(fbb, 0, 0, slot).Union());
}

void Registrar::unregister_module(Session& session, std::uint64_t request_id,
                                  const wire::UnregisterModule& message) {
  auto module = registry_.module_of(session, view(message.module_name()));
  if (!module) return replies_.send_error(session, request_id, module.error());
  const ModuleBlock& words = session.memory->response_region().modules[(*module)->slot];
  if (session.role == Role::engine && read_module(words).word.state == ModuleState::poisoned) {
    return replies_.send_error(session, request_id,
                               {Errc::poisoned,
                                0,
                                session.name + "/" + (*module)->name +
                                    " is poisoned; refit all of it before it is unregistered",
                                {}});
  }
  if (!release_module(session, **module)) {
    return replies_.send_error(
        session, request_id,
        {Errc::busy, 0, session.name + "/" + (*module)->name + " is being written", {}});
  }
  if (session.role == Role::engine) {
    session.memory->response_region().modules[(*module)->slot].word.store(ModuleWord{}.pack());
  }
  drop_later((*module)->registration);
  session.modules.erase((*module)->name);
  replies_.send_ok(session, request_id);
}

}  // namespace refit::daemon
