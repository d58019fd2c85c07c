#include "requests.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>

#include "ipc/handshake.hpp"
#include "memory/device_sharing.hpp"

namespace refit {
namespace {

Digest digest_from_wire(const flatbuffers::Vector<std::uint8_t>* bytes) {
  Digest digest;
  if (bytes == nullptr || bytes->size() > digest.bytes.size()) return digest;
  std::copy(bytes->begin(), bytes->end(), digest.bytes.begin());
  digest.length = static_cast<std::uint8_t>(bytes->size());
  return digest;
}

std::vector<std::string> names_from_wire(
    const flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>* names) {
  std::vector<std::string> copied;
  if (names == nullptr) return copied;
  for (const auto* name : *names) copied.emplace_back(view(name));
  return copied;
}

std::vector<NamedDigest> digests_from_wire(
    const flatbuffers::Vector<flatbuffers::Offset<wire::TensorDigest>>* digests) {
  std::vector<NamedDigest> copied;
  if (digests == nullptr) return copied;
  for (const auto* entry : *digests)
    copied.emplace_back(std::string(view(entry->name())), digest_from_wire(entry->value()));
  return copied;
}

using Tickets = std::vector<std::uint64_t>;

/// The fds of every region, and the tickets that they went under: one for host memory, one for each
/// segment of a VMM range, none for what needs none.
Result<std::vector<Tickets>> send_fds(Session& session, const ModuleSpec& module,
                                      Deadline deadline) {
  std::vector<std::vector<int>> fds;
  std::size_t count = 0;
  for (const auto& memory : module.regions()) {
    auto& of_region = fds.emplace_back();
    if (const auto* host = dynamic_cast<const SharedMemory*>(memory.get()))
      of_region.push_back(host->fd());
    if (const auto* device = dynamic_cast<const DeviceMemory*>(memory.get())) {
      REFIT_TRY(device->shared().still_there());
      for (const DevicePiece& piece : device->shared().exported().pieces) {
        if (piece.fd) of_region.push_back(piece.fd.get());
      }
    }
    count += of_region.size();
  }
  if (count > kUnclaimedTicketsMax) {
    return fail(Errc::quota,
                module.name() + ": " + std::to_string(count) +
                    " regions and segments that need an fd; the limit is " +
                    std::to_string(kUnclaimedTicketsMax) +
                    ": put tensors into fewer, larger regions; of PyTorch's expandable "
                    "segments there is an fd for each 20 MiB, and "
                    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False needs none");
  }
  std::vector<Tickets> tickets;
  for (const auto& of_region : fds) {
    auto& sent = tickets.emplace_back();
    for (const int fd : of_region) {
      REFIT_TRY_ASSIGN(const std::uint64_t ticket, session.send_fd(fd, deadline));
      sent.push_back(ticket);
    }
  }
  return tickets;
}

template <std::size_t kBytes>
flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> bytes_of(
    flatbuffers::FlatBufferBuilder& fbb, const std::array<std::uint8_t, kBytes>& bytes) {
  return fbb.CreateVector(bytes.data(), bytes.size());
}

flatbuffers::Offset<wire::Region> device_region(flatbuffers::FlatBufferBuilder& fbb,
                                                const Exported& exported, const Tickets& tickets,
                                                bool pool) {
  std::vector<flatbuffers::Offset<wire::DevicePiece>> pieces;
  for (std::size_t i = 0; i < exported.pieces.size(); ++i) {
    const DevicePiece& piece = exported.pieces[i];
    flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> handle;
    if (exported.kind == RegionKind::cuda_legacy) handle = bytes_of(fbb, piece.handle);
    const std::uint64_t ticket = exported.kind == RegionKind::cuda_vmm ? tickets[i] : 0;
    pieces.push_back(wire::CreateDevicePiece(fbb, piece.bytes, ticket, handle));
  }
  const auto device = bytes_of(fbb, exported.device.bytes);
  const auto list = fbb.CreateVector(pieces);
  return wire::CreateRegion(fbb, 0, exported.bytes, pool,
                            static_cast<wire::RegionKind>(exported.kind), device, list,
                            exported.pieces.front().allocation_id);
}

Unexpected wrong_body(const char* what) {
  return fail(Errc::protocol, std::string("the daemon's reply is not a ") + what);
}

}  // namespace

std::uint64_t daemon_budget_us(Deadline deadline) {
  using std::chrono::microseconds;
  const auto left =
      std::chrono::duration_cast<microseconds>(deadline.point() - Deadline::Clock::now());
  if (left.count() <= 0) return 0;
  return static_cast<std::uint64_t>((left - std::min(left / 10, microseconds(100'000))).count());
}

Result<std::uint64_t> post_registration(Session& session, const ModuleSpec& module,
                                        const HeldState& held, Deadline deadline,
                                        std::uint32_t residency_base) {
  REFIT_TRY_ASSIGN(const std::vector<Tickets> tickets, send_fds(session, module, deadline));
  auto& fbb = session.builder();
  std::vector<flatbuffers::Offset<wire::Region>> regions;
  for (std::size_t i = 0; i < tickets.size(); ++i) {
    const bool pool = module.is_pool(static_cast<std::uint32_t>(i));
    const auto* device = dynamic_cast<const DeviceMemory*>(module.regions()[i].get());
    regions.push_back(
        device == nullptr
            ? wire::CreateRegion(fbb, tickets[i].front(), module.regions()[i]->bytes(), pool)
            : device_region(fbb, device->shared().exported(), tickets[i], pool));
  }
  std::vector<flatbuffers::Offset<wire::Tensor>> tensors;
  tensors.reserve(module.tensors().size());
  const auto dims = [&fbb](const Dims& values) {
    return values.empty() ? flatbuffers::Offset<flatbuffers::Vector<std::uint64_t>>()
                          : fbb.CreateVector(values);
  };
  for (const TensorSpec& spec : module.tensors()) {
    const auto name = fbb.CreateString(spec.name);
    const auto shape = dims(spec.shape);
    const auto strides = dims(spec.strides);
    const auto global_shape = dims(spec.global_shape);
    const auto box_offset = dims(spec.box_offset);
    tensors.push_back(wire::CreateTensor(fbb, name, static_cast<std::uint8_t>(spec.dtype), shape,
                                         strides, spec.region, spec.offset_bytes, global_shape,
                                         box_offset, spec.layer_buffer, spec.layer_offset_bytes));
  }
  std::vector<flatbuffers::Offset<wire::NameRule>> rules;
  for (const NameRule& rule : module.name_map()) {
    const auto pattern = fbb.CreateString(rule.pattern);
    const auto target = fbb.CreateString(rule.target);
    rules.push_back(wire::CreateNameRule(fbb, pattern, target, rule.part, rule.parts));
  }
  const auto transaction = to_wire(held.transaction);
  const auto name = fbb.CreateString(module.name());
  const auto region_list = fbb.CreateVector(regions);
  const auto tensor_list = fbb.CreateVector(tensors);
  const auto rule_list = fbb.CreateVector(rules);
  std::vector<flatbuffers::Offset<wire::LayerBuffer>> buffers;
  for (const std::uint64_t bytes : module.layer_buffers())
    buffers.push_back(wire::CreateLayerBuffer(fbb, bytes));
  const auto buffer_list = fbb.CreateVector(buffers);
  flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> event;
  flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> event_device;
  if (module.fence() != nullptr) {
    event = bytes_of(fbb, module.fence()->event().handle());
    event_device = bytes_of(fbb, module.fence()->event().device().bytes);
  }
  fbb.Finish(wire::CreateRegisterModule(
      fbb, name, region_list, tensor_list, rule_list, held.version, &transaction, held.poisoned,
      held.selection, held.asleep, buffer_list, residency_base, event, event_device));
  return session.post(wire::Opcode::register_module);
}

Result<std::uint32_t> registered_slot(const wire::Reply& reply) {
  const auto* registered = reply.body_as_Registered();
  if (registered == nullptr || registered->slot() >= kModulesMax) return wrong_body("registration");
  return registered->slot();
}

Result<std::uint32_t> register_module(Session& session, const ModuleSpec& module,
                                      const HeldState& held, Deadline deadline,
                                      std::uint32_t residency_base) {
  REFIT_TRY_ASSIGN(const std::uint64_t request,
                   post_registration(session, module, held, deadline, residency_base));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.await(request, deadline, Expect::long_running));
  return registered_slot(*reply);
}

Result<void> unregister_module(Session& session, const std::string& module, Deadline deadline) {
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateUnregisterModule(fbb, fbb.CreateString(module)));
  REFIT_TRY(session.call(wire::Opcode::unregister_module, deadline, Expect::brief));
  return {};
}

flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<wire::ExpectedDigest>>>
expected_to_wire(flatbuffers::FlatBufferBuilder& fbb, const std::vector<NamedDigest>& expected) {
  std::vector<flatbuffers::Offset<wire::ExpectedDigest>> list;
  list.reserve(expected.size());
  for (const auto& [name, value] : expected) {
    const auto text = fbb.CreateString(name);
    const auto bytes = fbb.CreateVector(value.bytes.data(), value.length);
    list.push_back(wire::CreateExpectedDigest(fbb, text, bytes));
  }
  return fbb.CreateVector(list);
}

Result<CheckReport> check(Session& session, const CheckRequest& request, Deadline deadline) {
  auto& fbb = session.builder();
  const auto engine = fbb.CreateString(request.engine);
  const auto module = fbb.CreateString(request.module);
  const auto list = expected_to_wire(fbb, request.expected);
  fbb.Finish(wire::CreateCheck(fbb, engine, module, static_cast<std::uint8_t>(request.kind), list,
                               daemon_budget_us(deadline),
                               static_cast<std::uint8_t>(request.place)));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::check, deadline, Expect::long_running));
  const auto* body = reply->body_as_Checked();
  if (body == nullptr) return wrong_body("check report");
  CheckReport report;
  report.verified = body->verified();
  report.missing = names_from_wire(body->missing());
  report.mismatched = names_from_wire(body->mismatched());
  report.device_mismatched = names_from_wire(body->device_mismatched());
  report.absent = names_from_wire(body->absent());
  report.state = static_cast<ModuleState>(body->state());
  report.version = body->version();
  if (body->proven()) report.proven_version = body->proven_version();
  return report;
}

Result<DigestReport> digest(Session& session, const DigestRequest& request, Deadline deadline) {
  auto& fbb = session.builder();
  const auto engine = fbb.CreateString(request.engine);
  const auto module = fbb.CreateString(request.module);
  const auto selection = fbb.CreateVectorOfStrings(request.selection);
  fbb.Finish(wire::CreateDigestQuery(fbb, engine, module, static_cast<std::uint8_t>(request.kind),
                                     selection, request.per_module, daemon_budget_us(deadline),
                                     static_cast<std::uint8_t>(request.place)));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::digest, deadline, Expect::long_running));
  const auto* body = reply->body_as_Digests();
  if (body == nullptr) return wrong_body("digest report");
  DigestReport report;
  report.tensors = digests_from_wire(body->tensors());
  report.device = digests_from_wire(body->device());
  report.absent = names_from_wire(body->absent());
  report.module = digest_from_wire(body->module_digest());
  report.state = static_cast<ModuleState>(body->state());
  report.version = body->version();
  return report;
}

}  // namespace refit
