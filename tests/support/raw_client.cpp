#include "support/raw_client.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "digest/digest.hpp"

namespace refit::test {
namespace {

constexpr int kPatienceMs = 20'000;
constexpr std::size_t kArenaStart = offsetof(RequestRegion, arena);

Bytes finished(const flatbuffers::FlatBufferBuilder& fbb) {
  return {fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()};
}

[[noreturn]] void give_up(const std::string& what) {
  std::fprintf(stderr, "fixture failed: %s\n", what.c_str());
  std::abort();
}

}  // namespace

RawClient::RawClient(const std::string& socket)
    : socket_(UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0))) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket.size() >= sizeof address.sun_path) give_up("socket path too long");
  std::memcpy(address.sun_path, socket.c_str(), socket.size() + 1);
  if (::connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    give_up("connecting to the daemon");
}

RawClient RawClient::joined(const std::string& socket, Role role, const std::string& name) {
  RawClient client(socket);
  client.hello(role, name);
  const Answer answer = client.answer();
  if (answer.kind != Answer::Kind::welcome)
    give_up("no WELCOME for " + name + ": " + answer.message);
  return client;
}

bool RawClient::send_raw(const Bytes& message, const std::vector<int>& fds) {
  iovec part{const_cast<std::uint8_t*>(message.data()), message.size()};
  msghdr header{};
  header.msg_iov = &part;
  header.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(sizeof(int) * 64)> control{};
  if (!fds.empty()) {
    header.msg_control = control.data();
    header.msg_controllen = CMSG_SPACE(sizeof(int) * fds.size());
    cmsghdr* rights = CMSG_FIRSTHDR(&header);
    rights->cmsg_level = SOL_SOCKET;
    rights->cmsg_type = SCM_RIGHTS;
    rights->cmsg_len = CMSG_LEN(sizeof(int) * fds.size());
    std::memcpy(CMSG_DATA(rights), fds.data(), sizeof(int) * fds.size());
  }
  return ::sendmsg(socket_.get(), &header, MSG_NOSIGNAL) >= 0;
}

bool RawClient::send(SocketMessage kind, const Bytes& body, const std::vector<int>& fds,
                     const Preamble& preamble) {
  Preamble head = preamble;
  head.kind = static_cast<std::uint16_t>(kind);
  Bytes message(sizeof head);
  std::memcpy(message.data(), &head, sizeof head);
  message.insert(message.end(), body.begin(), body.end());
  return send_raw(message, fds);
}

bool RawClient::hello(Role role, const std::string& name, const Preamble& preamble) {
  flatbuffers::FlatBufferBuilder fbb;
  fbb.Finish(wire::CreateHello(fbb, static_cast<std::uint8_t>(role), fbb.CreateString(name)));
  return send(SocketMessage::hello, finished(fbb), {}, preamble);
}

RawClient::Answer RawClient::answer() {
  Answer answer;
  ReceivedMessage message;
  pollfd entry{socket_.get(), POLLIN, 0};
  if (::poll(&entry, 1, kPatienceMs) <= 0) return answer;
  switch (receive_message(socket_.get(), message)) {
    case Receive::nothing_yet:
      return answer;
    case Receive::closed:
      answer.kind = Answer::Kind::closed;
      return answer;
    case Receive::peer_broke_protocol:
      give_up("the daemon's message is not refit's");
    case Receive::message:
      break;
  }
  if (message.preamble.kind == static_cast<std::uint16_t>(SocketMessage::nak)) {
    const auto* nak = verified_root<wire::Nak>(message.body.data(), message.body.size());
    if (nak == nullptr) give_up("a NAK does not verify");
    answer.kind = Answer::Kind::nak;
    answer.code = static_cast<Errc>(nak->code());
    answer.message = view(nak->message());
    return answer;
  }
  if (message.fds.size() != kWelcomeFdCount) give_up("a WELCOME without its fds");
  answer.kind = Answer::Kind::welcome;
  auto request = Mapping::map(message.fds[kRequestRegionFd].get(), kRequestRegionBytes,
                              Access::read_write, "request");
  auto response = Mapping::map(message.fds[kResponseRegionFd].get(), kResponseRegionBytes,
                               Access::read_only, "response");
  if (!request || !response) give_up("mapping the session's regions");
  request_ = std::move(*request);
  response_ = std::move(*response);
  response_fd_ = std::move(message.fds[kResponseRegionFd]);
  daemon_doorbell_ = std::move(message.fds[kDaemonDoorbellFd]);
  client_doorbell_ = std::move(message.fds[kClientDoorbellFd]);
  return answer;
}

RawClient::Answer RawClient::ended() {
  Answer reason;
  for (;;) {
    Answer next = answer();
    if (next.kind == Answer::Kind::silence) return next;
    if (next.kind == Answer::Kind::closed) {
      reason.kind = Answer::Kind::closed;
      return reason;
    }
    reason = std::move(next);
  }
}

bool RawClient::send_ticket(std::uint64_t ticket, int fd) {
  Bytes body(sizeof ticket);
  std::memcpy(body.data(), &ticket, sizeof ticket);
  return send(SocketMessage::ticket, body, {fd});
}

Descriptor RawClient::describe(wire::Opcode opcode, const Bytes& payload) {
  if (payload.size() > kRequestRegionBytes - kArenaStart) give_up("payload larger than the arena");
  Descriptor descriptor;
  if (payload.size() <= kInlinePayloadBytes) {
    std::memcpy(descriptor.payload, payload.data(), payload.size());
  } else {
    if (arena_position_ + payload.size() > kRequestRegionBytes - kArenaStart) arena_position_ = 0;
    descriptor.payload_offset = kArenaStart + arena_position_;
    std::memcpy(request_.data() + descriptor.payload_offset, payload.data(), payload.size());
    arena_position_ += (payload.size() + 63) & ~std::size_t{63};
  }
  descriptor.opcode = static_cast<std::uint16_t>(opcode);
  descriptor.payload_bytes = static_cast<std::uint32_t>(payload.size());
  descriptor.request_id = next_request_++;
  descriptor.payload_xxh3 = payload_hash(payload.data(), payload.size());
  return descriptor;
}

void RawClient::publish(const Descriptor& descriptor) {
  RingSlot& slot = next_slot();
  slot.descriptor = descriptor;
  slot.sequence.store(++position_);
}

void RawClient::push(const Descriptor& descriptor) {
  publish(descriptor);
  ring();
}

void RawClient::ring() const {
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(daemon_doorbell_.get(), &one, sizeof one);
}

std::uint64_t RawClient::post(wire::Opcode opcode, const Bytes& payload) {
  const Descriptor descriptor = describe(opcode, payload);
  push(descriptor);
  return descriptor.request_id;
}

std::uint64_t RawClient::replies() const {
  std::uint64_t count = replies_taken_;
  while (response().responses[count % kRingSlots].sequence.load() == count + 1) ++count;
  return count;
}

void RawClient::skip_replies() {
  replies_taken_ = replies();
  request().response_head.store(replies_taken_);
}

std::optional<RawClient::Reply> RawClient::next_reply() {
  while (unread() == 0) {
    pollfd entries[] = {{client_doorbell_.get(), POLLIN, 0},
                        {socket_.get(), POLLIN | POLLRDHUP, 0}};
    if (::poll(entries, 2, kPatienceMs) <= 0) return std::nullopt;
    if (entries[0].revents != 0) {
      std::array<char, 4096> sink;
      [[maybe_unused]] const auto got = ::read(client_doorbell_.get(), sink.data(), sink.size());
    }
    if (unread() == 0 && entries[1].revents != 0) return std::nullopt;
  }
  const Descriptor descriptor = response().responses[replies_taken_ % kRingSlots].descriptor;
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(
      descriptor.payload_bytes > kInlinePayloadBytes ? response_.data() + descriptor.payload_offset
                                                     : descriptor.payload);
  const Bytes payload(bytes, bytes + descriptor.payload_bytes);
  request().response_head.store(++replies_taken_);
  const auto* message = verified_root<wire::Reply>(payload.data(), payload.size());
  if (message == nullptr) give_up("a reply does not verify");
  Reply reply;
  reply.request = descriptor.request_id;
  reply.code = static_cast<Errc>(message->code());
  reply.message = view(message->message());
  if (message->details() != nullptr) {
    for (const auto* line : *message->details()) reply.details.emplace_back(view(line));
  }
  return reply;
}

std::optional<RawClient::Reply> RawClient::reply(std::uint64_t request) {
  for (;;) {
    auto one = next_reply();
    if (!one || one->request == request) return one;
  }
}

std::optional<RawClient::Reply> RawClient::call(wire::Opcode opcode, const Bytes& payload) {
  return reply(post(opcode, payload));
}

Bytes register_message(const std::string& module, const std::vector<RawRegion>& regions,
                       const std::vector<TensorSpec>& tensors, const std::vector<NameRule>& rules,
                       const RawLayers& layers) {
  flatbuffers::FlatBufferBuilder fbb;
  std::vector<flatbuffers::Offset<wire::Region>> region_list;
  for (std::uint32_t i = 0; i < regions.size(); ++i) {
    const bool pool = std::count(layers.pools.begin(), layers.pools.end(), i) > 0;
    region_list.push_back(wire::CreateRegion(fbb, regions[i].ticket, regions[i].bytes, pool));
  }
  std::vector<flatbuffers::Offset<wire::Tensor>> tensor_list;
  for (const TensorSpec& spec : tensors) {
    const auto name = fbb.CreateString(spec.name);
    const auto shape = fbb.CreateVector(spec.shape);
    const auto strides = fbb.CreateVector(spec.strides);
    tensor_list.push_back(wire::CreateTensor(fbb, name, static_cast<std::uint8_t>(spec.dtype),
                                             shape, strides, spec.region, spec.offset_bytes, 0, 0,
                                             spec.layer_buffer, spec.layer_offset_bytes));
  }
  std::vector<flatbuffers::Offset<wire::NameRule>> rule_list;
  for (const NameRule& rule : rules) {
    const auto pattern = fbb.CreateString(rule.pattern);
    const auto target = fbb.CreateString(rule.target);
    rule_list.push_back(wire::CreateNameRule(fbb, pattern, target, rule.part, rule.parts));
  }
  const auto name = fbb.CreateString(module);
  const auto all_regions = fbb.CreateVector(region_list);
  const auto all_tensors = fbb.CreateVector(tensor_list);
  const auto all_rules = fbb.CreateVector(rule_list);
  std::vector<flatbuffers::Offset<wire::LayerBuffer>> buffer_list;
  for (const std::uint64_t bytes : layers.buffer_bytes)
    buffer_list.push_back(wire::CreateLayerBuffer(fbb, bytes));
  const auto all_buffers = fbb.CreateVector(buffer_list);
  fbb.Finish(wire::CreateRegisterModule(fbb, name, all_regions, all_tensors, all_rules, 0, nullptr,
                                        false, 0, layers.asleep, all_buffers, layers.words));
  return finished(fbb);
}

Bytes refit_message(const TransactionId& id, const std::vector<RawTarget>& targets,
                    std::uint64_t deadline_us, wire::Staging staging) {
  flatbuffers::FlatBufferBuilder fbb;
  std::vector<flatbuffers::Offset<wire::Target>> list;
  for (const RawTarget& target : targets) {
    const auto engine = fbb.CreateString(target.engine);
    const auto module = fbb.CreateString(target.module);
    const auto source = fbb.CreateString(target.source);
    const auto selection = fbb.CreateVectorOfStrings(target.selection);
    list.push_back(wire::CreateTarget(fbb, engine, module, source, selection));
  }
  const auto all = fbb.CreateVector(list);
  const wire::TransactionId wire_id = to_wire(id);
  fbb.Finish(wire::CreateRefit(fbb, &wire_id, all, staging, false, deadline_us));
  return finished(fbb);
}

Bytes digest_message(const std::string& engine, const std::string& module,
                     const std::vector<std::string>& selection, std::uint64_t deadline_us) {
  flatbuffers::FlatBufferBuilder fbb;
  const auto engine_name = fbb.CreateString(engine);
  const auto module_name = fbb.CreateString(module);
  const auto names = fbb.CreateVectorOfStrings(selection);
  fbb.Finish(wire::CreateDigestQuery(fbb, engine_name, module_name, 1, names, false, deadline_us));
  return finished(fbb);
}

Bytes check_message(const std::string& engine, const std::string& module,
                    const std::vector<std::string>& expected) {
  flatbuffers::FlatBufferBuilder fbb;
  std::vector<flatbuffers::Offset<wire::ExpectedDigest>> list;
  for (const std::string& one : expected) {
    const auto name = fbb.CreateString(one);
    const auto value = fbb.CreateVector(std::vector<std::uint8_t>(32));
    list.push_back(wire::CreateExpectedDigest(fbb, name, value));
  }
  const auto engine_name = fbb.CreateString(engine);
  const auto module_name = fbb.CreateString(module);
  const auto all = fbb.CreateVector(list);
  fbb.Finish(wire::CreateCheck(fbb, engine_name, module_name, 1, all, 20'000'000));
  return finished(fbb);
}

Bytes unregister_message(const std::string& module) {
  flatbuffers::FlatBufferBuilder fbb;
  fbb.Finish(wire::CreateUnregisterModule(fbb, fbb.CreateString(module)));
  return finished(fbb);
}

Bytes tensors_message(const std::string& engine, const std::string& module) {
  flatbuffers::FlatBufferBuilder fbb;
  const auto engine_name = fbb.CreateString(engine);
  const auto module_name = fbb.CreateString(module);
  fbb.Finish(wire::CreateTensorsQuery(fbb, engine_name, module_name));
  return finished(fbb);
}

Bytes empty_message() {
  flatbuffers::FlatBufferBuilder fbb;
  fbb.Finish(wire::CreateStatusQuery(fbb));
  return finished(fbb);
}

UniqueFd honest_memfd(std::size_t bytes, int seals) {
  auto fd = make_memfd("raw", bytes);
  if (!fd || ::posix_fallocate(fd->get(), 0, static_cast<off_t>(bytes)) != 0)
    give_up("making a memfd");
  if (seals != 0 && !add_seals(fd->get(), seals, "raw")) give_up("sealing a memfd");
  return std::move(*fd);
}

TensorSpec byte_tensor(const std::string& name, std::uint64_t bytes) {
  TensorSpec spec;
  spec.name = name;
  spec.dtype = DType::uint8;
  spec.shape = {bytes};
  return spec;
}

}  // namespace refit::test
