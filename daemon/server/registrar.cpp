#include "server/registrar.hpp"

#include <fcntl.h>
#include <unistd.h>

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

/// Makes the memory ready on a pool thread, and answers the registration when it is: faults in the
/// pages of host memory and pins them where there are devices, opens what devices share. The
/// request comes back with the answer: its fds are the client's choice, and closing one may take
/// for ever.
class MakeReadyJob final : public BackgroundJob {
 public:
  using Done = std::function<void(RegisterRequest&, Result<void>, std::uint64_t took_us)>;

  MakeReadyJob(std::shared_ptr<Registration> registration, DeviceAccess& devices, Access access,
               const Exporter& exporter, RegisterRequest request, Done done)
      : BackgroundJob(1),
        registration_(std::move(registration)),
        devices_(devices),
        access_(access),
        exporter_(exporter),
        request_(std::move(request)),
        done_(std::move(done)) {}

  void run_part(std::size_t) override {
    const auto start = Clock::now();
    outcome_ = make_ready();
    took_us_ = static_cast<std::uint64_t>(
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - start).count());
  }
  void finished() override { done_(request_, std::move(outcome_), took_us_); }

 private:
  Result<void> make_ready() {
    const std::string& label = registration_->manifest->label();
    Devices* const pinning = devices_.if_there();
    for (std::size_t i = 0; i < request_.regions.size(); ++i) {
      MappedRegion& region = registration_->regions[i];
      const std::string name = label + ": region " + std::to_string(i);
      if (const auto& exported = request_.regions[i].device) {
        REFIT_TRY_ASSIGN(Devices* const devices, devices_.required(name));
        REFIT_TRY_ASSIGN(region.device, devices->import(exporter_, *exported, access_, name));
        continue;
      }
      REFIT_TRY(populate(region.host, access_, label));
      if (pinning != nullptr) REFIT_TRY(pin(*pinning, region, name));
    }
    if (!request_.event) return {};
    REFIT_TRY_ASSIGN(Devices* const devices, devices_.required(label));
    REFIT_TRY_ASSIGN(registration_->event,
                     devices->open_event(request_.event->device, request_.event->handle, label));
    return {};
  }

  /// Memory that cannot be pinned is good for everything but devices, so the refit that needs them
  /// says why it fails. Errors: that no device will ever pin anything here.
  Result<void> pin(Devices& devices, MappedRegion& region, const std::string& name) {
    auto pinned = devices.pin(region.host, access_, name);
    if (pinned) {
      region.pinned = std::move(*pinned);
    } else {
      region.why_not_pinned = pinned.error().message;
      if (Devices::is_lost(pinned.error())) return Unexpected(std::move(pinned).error());
    }
    return {};
  }

  std::shared_ptr<Registration> registration_;
  DeviceAccess& devices_;
  Access access_;
  Exporter exporter_;
  RegisterRequest request_;
  Done done_;
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
  const bool keep = poisoned || held.version > request.version;
  std::uint64_t version = keep ? held.version : request.version;
  ModuleState state = version == 0 ? ModuleState::initial : ModuleState::committed;
  if (request.poisoned || poisoned) state = ModuleState::poisoned;
  // The claim may be older than a commit of this daemon's. The record of a poisoned word names the
  // version that the bytes never became, and those of that commit they were.
  if (state == ModuleState::poisoned && !poisoned && keep) ++version;
  block.name.store(payload_hash(request.module.data(), request.module.size()));
  const ModuleWord word =
      fill_next_record(block, held.word.epoch, state, keep ? held.transaction : request.transaction,
                       version, keep ? held.selection : request.selection);
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

/// The fd that came under `ticket`, which is used up. None if there is a problem with it.
UniqueFd Registrar::claim_fd(Session& session, std::uint64_t ticket, const std::string& label,
                             std::vector<Error>& problems) {
  auto found = session.tickets.find(ticket);
  if (found == session.tickets.end()) {
    drain_tickets(session);
    found = session.tickets.find(ticket);
  }
  if (found == session.tickets.end()) {
    problems.push_back(
        {Errc::unknown_ticket,
         0,
         label + " names ticket " + std::to_string(ticket) + ", for which no fd arrived",
         {}});
    return {};
  }
  if (!found->second.refusal.empty())
    problems.push_back({Errc::quota, 0, label + ": " + found->second.refusal, {}});
  UniqueFd fd = std::move(found->second.fd);
  session.tickets.erase(found);
  return fd;
}

Result<Registrar::Mapped> Registrar::map_regions(Session& session, RegisterRequest& request) {
  // Claim every ticket first, so that a refused registration leaves none behind.
  std::vector<UniqueFd> fds;
  std::vector<Error> problems;
  for (RegionClaim& claim : request.regions) {
    const std::string label = region_label(session, request, fds.size());
    fds.emplace_back();
    if (!claim.device) {
      fds.back() = claim_fd(session, claim.ticket, label, problems);
      continue;
    }
    for (std::size_t i = 0; i < claim.piece_tickets.size(); ++i)
      claim.device->pieces[i].fd = claim_fd(session, claim.piece_tickets[i], label, problems);
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

/// The fds of device memory: a refused registration leaves them to nobody, and what was opened by
/// them needs them no longer.
void Registrar::drop_fds(RegisterRequest& request) {
  std::vector<UniqueFd> fds;
  for (RegionClaim& claim : request.regions) {
    if (!claim.device) continue;
    for (DevicePiece& piece : claim.device->pieces) {
      if (piece.fd) fds.push_back(std::move(piece.fd));
    }
  }
  close_later(std::move(fds));
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
    for (const MappedRegion& region : old.regions) used.registered_bytes -= region.bytes;
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
    const RegionClaim& claim = request.regions[i];
    if (claim.device) {
      add_device_region(session, claim, mapped);
      continue;
    }
    if (!fds[i]) continue;
    auto done = map_fd(fds[i].get(), claim.bytes, access_of(session),
                       region_label(session, request, i), mapped);
    if (done) mapped.infos.back().pool = claim.pool;
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
  MappedRegion region;
  region.bytes = declared_bytes;
  region.host = std::move(mapping);
  mapped.regions.push_back(std::move(region));
  mapped.infos.push_back({declared_bytes, info.device, info.inode});
  return {};
}

/// Device memory is opened later, off the loop. Its identity is its exporter's word: allocation ids
/// are unique in one process, whatever its sessions, so that two processes never have one in
/// common.
void Registrar::add_device_region(const Session& session, const RegionClaim& claim,
                                  Mapped& mapped) {
  MappedRegion region;
  region.bytes = claim.bytes;
  region.kind = claim.device->kind;
  mapped.regions.push_back(std::move(region));
  // No st_dev is that large.
  constexpr std::uint64_t kNoFileSystem = std::uint64_t{1} << 63;
  mapped.infos.push_back({claim.bytes, kNoFileSystem | static_cast<std::uint64_t>(session.peer.pid),
                          claim.device->pieces.front().allocation_id, claim.pool});
}

Result<std::shared_ptr<Module>> Registrar::place(Session& session, const RegisterRequest& request,
                                                 std::shared_ptr<Registration> registration,
                                                 const std::shared_ptr<void>& answer) {
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
    found->second->registration->awaited = answer;
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
  if (session.role == Role::observer) {
    return replies_.send_error(session, request_id,
                               {Errc::permission, 0, "an observer registers nothing", {}});
  }
  auto request = decode(message, ManifestLimits{});
  const auto refuse = [&](const Error& error) {
    if (request) drop_fds(*request);
    replies_.send_error(session, request_id, error);
  };
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
  registration->regions = std::move(mapped->regions);
  registration->generation = next_generation_++;

  struct Answer {
    bool due = false;  ///< the module was placed
    std::uint32_t slot = 0;
    Result<void> outcome;
    std::uint64_t took_us = 0;
  };
  const auto answer = std::make_shared<Answer>();
  const std::uint64_t session_id = session.id;
  const std::uint64_t generation = registration->generation;
  std::shared_ptr<void> awaited = when_let_go(completions_, [this, session_id, request_id,
                                                             generation, answer] {
    const auto owner = registry_.find(session_id);
    if (owner == nullptr || !answer->due) return;
    if (!answer->outcome) {
      replies_.send_error(*owner, request_id, answer->outcome.error());
      return devices_.judge(answer->outcome.error());
    }
    auto& fbb = replies_.builder();
    replies_.send(*owner, request_id, wire::Body::Registered,
                  wire::CreateRegistered(fbb, generation, answer->took_us, answer->slot).Union());
  });
  auto module = place(session, *request, registration, awaited);
  if (!module) return refuse(module.error());
  answer->due = true;
  answer->slot = (*module)->slot;
  if (session.role == Role::engine) {
    write_initial_words(session.memory->response_region().modules[(*module)->slot], *request);
  }

  const Exporter exporter{session.id, session.peer.pid, session.peer.uid};
  auto job = std::make_unique<MakeReadyJob>(
      registration, devices_, access_of(session), exporter, std::move(*request),
      [this, session_id, registration, answer, awaited = std::move(awaited)](
          RegisterRequest& done, Result<void> outcome, std::uint64_t took_us) {
        drop_fds(done);
        answer->outcome = std::move(outcome);
        answer->took_us = took_us;
        registration->populated = answer->outcome.has_value();
        scheduler_.advance();
        const auto owner = registry_.find(session_id);
        if (owner == nullptr) return;
        if (!answer->outcome) {
          for (auto entry = owner->modules.begin(); entry != owner->modules.end(); ++entry) {
            if (entry->second->registration != registration) continue;
            release_module(*owner, *entry->second);
            owner->modules.erase(entry);
            break;
          }
        }
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
  std::shared_ptr<Registration> registration = std::move((*module)->registration);
  session.modules.erase((*module)->name);
  registration->awaited = when_let_go(completions_, [this, session_id = session.id, request_id] {
    if (const auto owner = registry_.find(session_id)) replies_.send_ok(*owner, request_id);
  });
  drop_later(std::move(registration));
}

}  // namespace refit::daemon
