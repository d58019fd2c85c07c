#include "server/reports.hpp"

#include <unistd.h>

#include "ipc/state_word.hpp"
#include "version.hpp"

namespace refit::daemon {

void reply_status(Replies& replies, Session& asker, std::uint64_t request_id,
                  const Registry& registry, const DaemonFacts& facts) {
  auto& fbb = replies.builder();
  std::vector<flatbuffers::Offset<wire::SessionStatus>> sessions;
  std::vector<flatbuffers::Offset<wire::ModuleStatus>> modules;
  for (const auto& [id, session] : registry.sessions) {
    const auto name = fbb.CreateString(session->name);
    sessions.push_back(wire::CreateSessionStatus(
        fbb, id, static_cast<std::uint8_t>(session->role), name, session->peer.uid,
        static_cast<std::uint32_t>(session->peer.pid),
        static_cast<std::uint32_t>(session->modules.size()), session->asleep));
    if (session->role != Role::engine) continue;
    for (const auto& [module_name, module] : session->modules) {
      const ModuleReading reading =
          read_module(session->memory->response_region().modules[module->slot]);
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
          registration.populated, registration.asleep));
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

}  // namespace refit::daemon
