#include "server/reports.hpp"

#include <unistd.h>

#include <chrono>
#include <optional>
#include <set>
#include <vector>

#include "ipc/handshake.hpp"
#include "ipc/state_word.hpp"
#include "version.hpp"

namespace refit::daemon {
namespace {

std::uint64_t whole_us_between(Clock::time_point from, Clock::time_point to) {
  const auto us = std::chrono::duration_cast<std::chrono::microseconds>(to - from).count();
  return us < 0 ? 0 : static_cast<std::uint64_t>(us);
}

/// Without the request that is being answered.
std::uint32_t in_flight_of(const Session& session, const Session& asker) {
  const bool asks = &session == &asker && session.in_flight > 0;
  return static_cast<std::uint32_t>(session.in_flight - (asks ? 1 : 0));
}

flatbuffers::Offset<wire::PhaseHistogram> histogram(flatbuffers::FlatBufferBuilder& fbb,
                                                    const Histogram& of_phase) {
  const auto& counts = of_phase.counts();
  return wire::CreatePhaseHistogram(fbb, fbb.CreateVector(counts.data(), counts.size()),
                                    of_phase.sum_us());
}

/// What each uid uses of what is limited per uid: of all uids to an operator, else of the asker's.
flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<wire::QuotaUse>>> quotas(
    flatbuffers::FlatBufferBuilder& fbb, const Session& asker, const Registry& registry,
    const Limits& limits) {
  std::set<uid_t> uids;
  for (const auto& [id, session] : registry.sessions) {
    const uid_t uid = session->peer.uid;
    if (uid == asker.peer.uid || Registry::is_operator(asker.peer.uid)) uids.insert(uid);
  }
  std::vector<flatbuffers::Offset<wire::QuotaUse>> list;
  for (const uid_t uid : uids) {
    const Usage use = registry.usage_of(uid);
    const auto add = [&, owner = uid](const char* quota, std::uint64_t used, std::uint64_t limit) {
      const auto name = fbb.CreateString(quota);
      list.push_back(wire::CreateQuotaUse(fbb, owner, name, used, limit));
    };
    add("sessions", use.sessions, limits.sessions_per_uid);
    add("requests", use.requests, limits.requests_per_uid);
    add("regions", use.regions, limits.regions_per_uid);
    add("registered_bytes", use.registered_bytes, limits.registered_bytes_per_uid);
    add("unclaimed_fds", use.unclaimed_fds, limits.unclaimed_fds_per_uid);
    add("tensors", use.tensors, limits.tensors_per_uid);
  }
  return fbb.CreateVector(list);
}

flatbuffers::Offset<wire::ModuleMetrics> module_metrics(flatbuffers::FlatBufferBuilder& fbb,
                                                        const Session& engine, const Module& module,
                                                        Clock::time_point now) {
  const Registration& registration = *module.registration;
  const ModuleReading reading = read_module(engine.memory->response_region().modules[module.slot]);
  const auto engine_name = fbb.CreateString(engine.name);
  const auto module_name = fbb.CreateString(module.name);
  const std::optional<Proof>& proof = registration.proof;
  return wire::CreateModuleMetrics(
      fbb, engine_name, module_name, engine.peer.uid, static_cast<std::uint8_t>(reading.word.state),
      reading.version, module.refits, registration.manifest->bytes(), proof.has_value(),
      proof ? proof->version : 0, proof ? whole_us_between(proof->at, now) : 0);
}

}  // namespace

void reply_status(Replies& replies, Session& asker, std::uint64_t request_id,
                  const Registry& registry, const DaemonFacts& facts) {
  auto& fbb = replies.builder();
  std::vector<flatbuffers::Offset<wire::SessionStatus>> sessions;
  std::vector<flatbuffers::Offset<wire::ModuleStatus>> modules;
  for (const auto& [id, session] : registry.sessions) {
    const auto name = fbb.CreateString(session->name);
    const bool restricted = !Registry::may_see(asker, *session);
    sessions.push_back(wire::CreateSessionStatus(
        fbb, id, static_cast<std::uint8_t>(session->role), name, session->peer.uid,
        restricted ? 0 : static_cast<std::uint32_t>(session->peer.pid),
        restricted ? 0 : static_cast<std::uint32_t>(session->modules.size()), session->asleep,
        restricted ? 0 : static_cast<std::uint32_t>(session->region_count()),
        restricted ? 0 : session->registered_bytes(),
        restricted ? 0 : in_flight_of(*session, asker),
        restricted ? 0 : whole_us_between(session->connected, facts.now), restricted));
    if (session->role != Role::engine) continue;
    for (const auto& [module_name, module] : session->modules) {
      const ModuleReading reading =
          read_module(session->memory->response_region().modules[module->slot]);
      if (restricted) {
        const auto only_name = fbb.CreateString(module_name);
        wire::ModuleStatusBuilder told(fbb);
        told.add_engine(name);
        told.add_module_name(only_name);
        told.add_state(static_cast<std::uint8_t>(reading.word.state));
        told.add_version(reading.version);
        told.add_asleep(module->registration->asleep);
        told.add_uid(session->peer.uid);
        told.add_restricted(true);
        modules.push_back(told.Finish());
        continue;
      }
      const auto transaction = to_wire(reading.transaction);
      const wire::Phases last(module->last.wait_us, module->last.gate_us, module->last.copy_us,
                              module->last.check_us, module->last.total_us);
      const auto module_text = fbb.CreateString(module_name);
      const auto source = fbb.CreateString(module->last_source);
      const Registration& registration = *module->registration;
      modules.push_back(wire::CreateModuleStatus(
          fbb, name, module_text, static_cast<std::uint8_t>(reading.word.state), reading.version,
          source, &transaction, static_cast<std::uint32_t>(registration.manifest->tensors().size()),
          registration.manifest->bytes(), module->refits, &last, module->last_bytes,
          registration.populated, registration.asleep, session->peer.uid, /*restricted=*/false,
          registration.proof.has_value(), registration.proof ? registration.proof->version : 0));
    }
  }
  const auto version = fbb.CreateString(kVersion);
  const auto kernel = fbb.CreateString(facts.copy_kernel);
  const auto socket = fbb.CreateString(facts.socket);
  const auto session_list = fbb.CreateVector(sessions);
  const auto module_list = fbb.CreateVector(modules);
  replies.send(
      asker, request_id, wire::Body::Status,
      wire::CreateStatus(fbb, version, static_cast<std::uint32_t>(::getpid()), facts.uptime_us,
                         static_cast<std::uint8_t>(facts.waiting), facts.copy_threads, kernel,
                         socket, facts.draining, facts.refits, session_list, module_list)
          .Union());
}

void reply_tensors(Replies& replies, Session& asker, std::uint64_t request_id,
                   const Registry& registry, const wire::TensorsQuery& query) {
  auto engine = registry.engine_for(asker, view(query.engine()));
  if (!engine) return replies.send_error(asker, request_id, engine.error());
  auto module = registry.module_of(**engine, view(query.module_name()));
  if (!module) return replies.send_error(asker, request_id, module.error());
  auto& fbb = replies.builder();
  std::vector<flatbuffers::Offset<wire::Tensor>> tensors;
  for (const TensorSpec& spec : (*module)->registration->manifest->tensors()) {
    const auto name = fbb.CreateString(spec.name);
    const auto shape = fbb.CreateVector(spec.shape);
    const auto strides = fbb.CreateVector(spec.strides);
    const auto global_shape = fbb.CreateVector(spec.global_shape);
    const auto box_offset = fbb.CreateVector(spec.box_offset);
    tensors.push_back(wire::CreateTensor(fbb, name, static_cast<std::uint8_t>(spec.dtype), shape,
                                         strides, spec.region, spec.offset_bytes, global_shape,
                                         box_offset, spec.layer_buffer, spec.layer_offset_bytes));
  }
  const auto list = fbb.CreateVector(tensors);
  replies.send(asker, request_id, wire::Body::TensorList,
               wire::CreateTensorList(fbb, list).Union());
}

void reply_metrics(Replies& replies, Session& asker, std::uint64_t request_id,
                   const Registry& registry, const DaemonFacts& facts,
                   const Statistics& statistics) {
  auto& fbb = replies.builder();
  std::vector<flatbuffers::Offset<wire::ModuleMetrics>> modules;
  for (const auto& [id, session] : registry.sessions) {
    if (session->role != Role::engine || !Registry::may_see(asker, *session)) continue;
    for (const auto& [name, module] : session->modules)
      modules.push_back(module_metrics(fbb, *session, *module, facts.now));
  }
  std::vector<flatbuffers::Offset<wire::FailureCount>> failures;
  const auto& counts = statistics.failures();
  for (std::size_t code = 0; code < counts.size(); ++code) {
    if (counts[code] == 0) continue;
    failures.push_back(
        wire::CreateFailureCount(fbb, static_cast<std::uint16_t>(code), counts[code]));
  }
  const auto version = fbb.CreateString(kVersion);
  const auto kernel = fbb.CreateString(facts.copy_kernel);
  const auto failure_list = fbb.CreateVector(failures);
  const auto bounds = fbb.CreateVector(Histogram::kBoundsUs.data(), Histogram::kBoundsUs.size());
  const auto wait = histogram(fbb, statistics.wait());
  const auto gate = histogram(fbb, statistics.gate());
  const auto copy = histogram(fbb, statistics.copy());
  const auto total = histogram(fbb, statistics.total());
  const auto quota_list = quotas(fbb, asker, registry, facts.limits);
  const auto module_list = fbb.CreateVector(modules);
  replies.send(
      asker, request_id, wire::Body::Metrics,
      wire::CreateMetrics(
          fbb, version, kProtocolVersion, kLayoutHash, kernel,
          static_cast<std::uint8_t>(facts.waiting), facts.draining, facts.uptime_us,
          statistics.committed_count(), statistics.moved_bytes(), failure_list, bounds, wait, gate,
          copy, total, statistics.checks(), statistics.tensors_verified(),
          statistics.tensors_mismatched(), statistics.tensors_missing(), quota_list, module_list,
          statistics.proofs(ProofResult::equal), statistics.proofs(ProofResult::different),
          statistics.proofs(ProofResult::overtaken), statistics.proofs(ProofResult::unreadable),
          statistics.proofs(ProofResult::refuted))
          .Union());
}

}  // namespace refit::daemon
