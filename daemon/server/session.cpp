#include "server/session.hpp"

#include <fcntl.h>

#include <cerrno>
#include <cstring>

#include "digest/digest.hpp"
#include "ipc/handshake.hpp"
#include "version.hpp"

namespace refit::daemon {
namespace {

constexpr std::size_t kReplyAreaBytes = kResponseRegionBytes - offsetof(ResponseRegion, payload);

Result<std::shared_ptr<SessionMemory>> make_memory(UniqueFd& request_fd, UniqueFd& response_fd) {
  auto memory = std::make_shared<SessionMemory>();
  constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  REFIT_TRY_ASSIGN(request_fd, make_memfd("refit-request", kRequestRegionBytes));
  {
    REFIT_TRY_ASSIGN(const Mapping writable, Mapping::map(request_fd.get(), kRequestRegionBytes,
                                                          Access::read_write, "refit-request"));
    REFIT_TRY(back_with_memory(request_fd.get(), writable, "refit-request"));
  }
  REFIT_TRY_ASSIGN(memory->request, Mapping::map(request_fd.get(), kRequestRegionBytes,
                                                 Access::read_only, "refit-request"));
  REFIT_TRY(add_seals(request_fd.get(), kSeals, "refit-request"));
  REFIT_TRY_ASSIGN(response_fd, make_memfd("refit-response", kResponseRegionBytes));
  // Our writable mapping must exist before the seal that lets nobody make another.
  REFIT_TRY_ASSIGN(memory->response, Mapping::map(response_fd.get(), kResponseRegionBytes,
                                                  Access::read_write, "refit-response"));
  REFIT_TRY(back_with_memory(response_fd.get(), memory->response, "refit-response"));
  REFIT_TRY(add_seals(response_fd.get(), kSeals | F_SEAL_FUTURE_WRITE, "refit-response"));
  // Replies move through the whole region; a page that was never touched would fault in the middle
  // of a refit.
  REFIT_TRY(populate(memory->request, Access::read_only, "refit-request"));
  REFIT_TRY(populate(memory->response, Access::read_write, "refit-response"));
  return memory;
}

}  // namespace

Result<std::shared_ptr<Session>> Session::open(std::uint64_t id, UniqueFd socket,
                                               PeerCredentials peer, UniqueFd pidfd, Role role,
                                               std::string name, Waiting daemon_waiting,
                                               int daemon_pidfd) {
  UniqueFd request_fd;
  UniqueFd response_fd;
  REFIT_TRY_ASSIGN(auto memory, make_memory(request_fd, response_fd));
  REFIT_TRY_ASSIGN(Doorbell daemon_doorbell, Doorbell::create());
  daemon_doorbell.ring();  // never read, so that ring_myself() finds it rung
  UniqueFd client_bell;
  REFIT_TRY_ASSIGN(Doorbell client_doorbell, Doorbell::create_for_peer(client_bell));
  auto session = over(std::move(memory), std::move(daemon_doorbell), std::move(client_doorbell));
  session->id = id;
  session->role = role;
  session->name = std::move(name);
  session->peer = std::move(peer);
  session->pidfd = std::move(pidfd);
  if (daemon_waiting == Waiting::always) session->memory->response_region().daemon_awake.store(1);

  flatbuffers::FlatBufferBuilder fbb;
  fbb.Finish(wire::CreateWelcome(fbb, id, kRequestRegionBytes, kResponseRegionBytes,
                                 fbb.CreateString(kVersion),
                                 static_cast<std::uint8_t>(daemon_waiting)));
  int fds[kWelcomeFdCount];
  fds[kRequestRegionFd] = request_fd.get();
  fds[kResponseRegionFd] = response_fd.get();
  fds[kDaemonDoorbellFd] = session->daemon_doorbell_.fd();
  fds[kClientDoorbellFd] = client_bell.get();
  fds[kDaemonPidfd] = daemon_pidfd;
  REFIT_TRY(send_message(socket.get(), SocketMessage::welcome, fbb.GetBufferPointer(),
                         fbb.GetSize(), fds, kWelcomeFdCount));
  session->socket = std::move(socket);
  return session;
}

std::shared_ptr<Session> Session::over(std::shared_ptr<SessionMemory> memory,
                                       Doorbell daemon_doorbell, Doorbell client_doorbell) {
  std::shared_ptr<Session> session(new Session);
  session->memory = std::move(memory);
  session->daemon_doorbell_ = std::move(daemon_doorbell);
  session->client_doorbell_ = std::move(client_doorbell);
  const RequestRegion& request = session->memory->request_region();
  ResponseRegion& response = session->memory->response_region();
  session->requests_ = std::make_unique<RingConsumer>(request.requests, response.request_head);
  session->replies_ = std::make_unique<RingProducer>(response.responses, request.response_head);
  return session;
}

std::size_t Session::region_count() const noexcept {
  std::size_t count = 0;
  for (const auto& [module_name, module] : modules) count += module->registration->regions.size();
  return count;
}

std::uint64_t Session::registered_bytes() const noexcept {
  std::uint64_t bytes = 0;
  for (const auto& [module_name, module] : modules) {
    for (const MappedRegion& region : module->registration->regions) bytes += region.bytes;
  }
  return bytes;
}

std::string Session::label() const {
  return std::string(role_name(role)) + " " + name + " (session " + std::to_string(id) + ", pid " +
         std::to_string(peer.pid) + ")";
}

Session::Next Session::next_request(Request& out, std::string& reason) {
  Descriptor descriptor;
  switch (requests_->peek(descriptor)) {
    case RingConsumer::Peek::empty:
      return Next::none;
    case RingConsumer::Peek::peer_broke_protocol:
      reason = "its ring position is impossible";
      return Next::violation;
    case RingConsumer::Peek::message:
      break;
  }
  const std::byte* payload = descriptor.payload;
  if (descriptor.payload_bytes > kInlinePayloadBytes) {
    constexpr std::uint64_t kArena = offsetof(RequestRegion, arena);
    if (descriptor.payload_bytes > kPayloadBytesMax || descriptor.payload_offset < kArena ||
        descriptor.payload_offset > kRequestRegionBytes ||
        descriptor.payload_bytes > kRequestRegionBytes - descriptor.payload_offset) {
      reason = "a request's payload lies outside the arena";
      return Next::violation;
    }
    payload = memory->request.data() + descriptor.payload_offset;
  }
  payload_.assign(payload, payload + descriptor.payload_bytes);
  requests_->advance();
  if (payload_hash(payload_.data(), payload_.size()) != descriptor.payload_xxh3) {
    reason = "a request's payload does not have its hash";
    return Next::violation;
  }
  out.opcode = static_cast<wire::Opcode>(descriptor.opcode);
  out.id = descriptor.request_id;
  out.payload = payload_.data();
  out.payload_bytes = payload_.size();
  return Next::request;
}

std::byte* Session::allocate_payload(std::size_t bytes) {
  std::uint64_t start = payload_position_;
  // A payload never wraps: what does not fit before the end starts over at the beginning.
  if (start % kReplyAreaBytes + bytes > kReplyAreaBytes)
    start += kReplyAreaBytes - start % kReplyAreaBytes;
  const std::uint64_t end = start + ((bytes + 63) & ~std::uint64_t{63});
  const auto fits = [&] {
    const std::uint64_t consumed = replies_->consumed();
    if (consumed == replies_->position()) return true;
    const std::uint64_t free_from = consumed == 0 ? 0 : payload_ends_[(consumed - 1) % kRingSlots];
    return end - free_from <= kReplyAreaBytes;
  };
  if (!fits() && !(replies_->look() && fits())) return nullptr;
  payload_position_ = end;
  return memory->response.data() + offsetof(ResponseRegion, payload) + start % kReplyAreaBytes;
}

bool Session::reply(std::uint64_t request_id, const flatbuffers::FlatBufferBuilder& builder) {
  const std::size_t bytes = builder.GetSize();
  if (bytes > kPayloadBytesMax) return false;
  // Before anything else: payload_ends_ knows one turn of the ring.
  if (replies_->room() != RingProducer::Push::ok) return false;
  Descriptor descriptor;
  std::byte* payload = descriptor.payload;
  if (bytes > kInlinePayloadBytes) {
    payload = allocate_payload(bytes);
    if (payload == nullptr) return false;
    descriptor.payload_offset = static_cast<std::uint64_t>(payload - memory->response.data());
  }
  std::memcpy(payload, builder.GetBufferPointer(), bytes);
  descriptor.payload_bytes = static_cast<std::uint32_t>(bytes);
  descriptor.request_id = request_id;
  descriptor.payload_xxh3 = payload_hash(builder.GetBufferPointer(), bytes);
  payload_ends_[replies_->position() % kRingSlots] = payload_position_;
  if (replies_->push(descriptor) != RingProducer::Push::ok) return false;
  wake_client();
  return true;
}

}  // namespace refit::daemon
