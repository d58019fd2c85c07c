#include "client.hpp"

#include <fcntl.h>

#include <cstring>

#include "daemon.hpp"
#include "digest/digest.hpp"
#include "world.hpp"

namespace refit::sim {
namespace {

constexpr std::size_t kPayloadSlotBytes = 16 * 1024;

}  // namespace

Client::Client(World& owner, Role its_role, std::string its_name)
    : world(owner), role(its_role), name(std::move(its_name)), process(owner.kernel.self()) {}

bool Client::connect(microseconds patience) {
  Kernel& kernel = world.kernel;
  const Time until = kernel.now() + patience;
  if (world.daemon == nullptr) return false;
  const auto server = world.daemon_process;
  auto connecting = std::make_shared<Connecting>();
  connecting->role = role;
  connecting->name = name;
  connecting->client = process;
  world.daemon->backlog.push_back(connecting);
  kernel.wait([&] { return connecting->answered || server->socket_closed(); }, until);
  if (kernel.dying()) return false;
  if (!connecting->answered) {
    connecting->given_up = true;
    if (connecting->link) connecting->link->closed_by_client = true;
    return false;
  }
  if (connecting->link == nullptr) return false;
  link = connecting->link;
  RequestRegion& request = *reinterpret_cast<RequestRegion*>(link->memory->request.data());
  const ResponseRegion& response = link->memory->response_region();
  regions = Regions(request, response, link->daemon_bell.other_end());
  requests_ = std::make_unique<RingProducer>(request.requests, response.request_head);
  replies_ = std::make_unique<RingConsumer>(response.responses, request.response_head);
  return true;
}

void Client::disconnect() {
  if (link != nullptr && !world.kernel.dying()) link->closed_by_client = true;
  link.reset();
  requests_.reset();
  replies_.reset();
}

std::uint64_t Client::post(wire::Opcode opcode) {
  if (requests_->room() != RingProducer::Push::ok) return 0;
  REFIT_ASSERT(builder.GetSize() <= kPayloadSlotBytes);
  Descriptor descriptor;
  std::byte* payload = descriptor.payload;
  if (builder.GetSize() > kInlinePayloadBytes) {
    descriptor.payload_offset =
        offsetof(RequestRegion, arena) + requests_->position() % kRingSlots * kPayloadSlotBytes;
    payload = link->memory->request.data() + descriptor.payload_offset;
  }
  std::memcpy(payload, builder.GetBufferPointer(), builder.GetSize());
  descriptor.opcode = static_cast<std::uint16_t>(opcode);
  descriptor.payload_bytes = static_cast<std::uint32_t>(builder.GetSize());
  descriptor.request_id = next_request_++;
  descriptor.payload_xxh3 = payload_hash(builder.GetBufferPointer(), builder.GetSize());
  if (requests_->push(descriptor) != RingProducer::Push::ok) return 0;
  regions.ring_daemon();
  return descriptor.request_id;
}

bool Client::take(std::uint64_t request, Answer& answer) {
  Descriptor descriptor;
  while (replies_->peek(descriptor) == RingConsumer::Peek::message) {
    const std::byte* payload = descriptor.payload_bytes > kInlinePayloadBytes
                                   ? link->memory->response.data() + descriptor.payload_offset
                                   : descriptor.payload;
    reply_.assign(payload, payload + descriptor.payload_bytes);
    const bool wanted = descriptor.request_id == request;
    const bool intact = payload_hash(reply_.data(), reply_.size()) == descriptor.payload_xxh3;
    replies_->advance();
    if (world.kernel.dying()) return false;
    if (!intact) world.kernel.violate("a reply's payload does not have its hash");
    if (!wanted) continue;
    answer.reply = verified_root<wire::Reply>(reply_.data(), reply_.size());
    if (answer.reply == nullptr) {
      world.kernel.violate("a reply does not verify");
      return false;
    }
    answer.replied = true;
    answer.code = static_cast<Errc>(answer.reply->code());
    return true;
  }
  return false;
}

Client::Answer Client::await(std::uint64_t request, Time deadline) {
  Kernel& kernel = world.kernel;
  Answer answer;
  for (;;) {
    if (take(request, answer)) return answer;
    answer.code = Errc::daemon_gone;
    if (kernel.dying()) return answer;
    const bool woken =
        kernel.wait([&] { return link->client_bell.rung() || link->hung_up(); }, deadline);
    if (kernel.dying()) return answer;
    if (!woken) {
      // As Session::give_up: before the call returns.
      regions.request_region().abandoned_request.store(request);
      answer.code = Errc::deadline;
      return answer;
    }
    if (link->client_bell.rung()) {
      link->client_bell.drain();
      continue;
    }
    if (replies_->empty()) return answer;
  }
}

tl::expected<std::uint32_t, Errc> Client::register_module(const Shape& shape,
                                                          const std::vector<TensorSpec>& tensors,
                                                          const Memory& memory,
                                                          const HeldState& held, Time deadline) {
  const std::uint64_t ticket = next_ticket_++;
  if (!world.kernel.dying()) {
    link->tickets.emplace_back(ticket,
                               UniqueFd::adopt(::fcntl(memory.fd.get(), F_DUPFD_CLOEXEC, 3)));
  }
  builder.Clear();
  auto& fbb = builder;
  const std::vector<flatbuffers::Offset<wire::Region>> regions_list{
      wire::CreateRegion(fbb, ticket, shape.bytes())};
  std::vector<flatbuffers::Offset<wire::Tensor>> list;
  for (const TensorSpec& spec : tensors) {
    const auto text = fbb.CreateString(spec.name);
    const auto extents = fbb.CreateVector(spec.shape);
    const auto strides = fbb.CreateVector(spec.strides);
    list.push_back(wire::CreateTensor(fbb, text, static_cast<std::uint8_t>(spec.dtype), extents,
                                      strides, 0, spec.offset_bytes));
  }
  const auto transaction = to_wire(held.transaction);
  const auto text = fbb.CreateString(shape.name);
  const auto region_vector = fbb.CreateVector(regions_list);
  const auto tensor_vector = fbb.CreateVector(list);
  fbb.Finish(wire::CreateRegisterModule(fbb, text, region_vector, tensor_vector, 0, held.version,
                                        &transaction, held.poisoned, held.selection));
  const std::uint64_t request = post(wire::Opcode::register_module);
  if (request == 0) return tl::unexpected(Errc::quota);
  const Answer answer = await(request, deadline);
  if (!answer.replied) return tl::unexpected(answer.code);
  if (answer.code != Errc::ok) {
    ++world.model.counts["registration refused: " + std::string(errc_name(answer.code))];
    return tl::unexpected(answer.code);
  }
  return answer.reply->body_as_Registered()->slot();
}

}  // namespace refit::sim
