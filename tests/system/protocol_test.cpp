// Hostile clients against the real daemon: whatever is said on the socket, on the ring or by the
// memory behind a ticket, it ends at most the session that said it, with a reason.
//
// Each attack is made by a RawClient. Beside it stand an honest trainer and engine whose sessions
// were open before; they are refitted and read back after every attack, by the same daemon process.
//
// Not here: client memory that faults (SIGBUS). It cannot be made through a region that the daemon
// takes: tmpfs fills a punched hole with a new page, F_SEAL_SHRINK forbids truncation, and hugetlb
// memory, which does fault, is refused. The guard has unit tests (tests/unit/memory).

#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/memfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "ipc/state_word.hpp"
#include "support/bystander.hpp"
#include "support/daemon_process.hpp"
#include "support/eventually.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

using Kind = RawClient::Answer::Kind;

constexpr int kHonestSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr std::size_t kPage = 4096;

class Protocol : public ::testing::Test {
 protected:
  void TearDown() override { bystander_.goes_on(); }

  RawClient join(Role role = Role::trainer, const std::string& name = "hostile") {
    return RawClient::joined(socket_, role, name);
  }
  /// The daemon ended this session and said why.
  static void expect_ended(RawClient& client, const std::string& reason) {
    const auto end = client.ended();
    EXPECT_EQ(end.kind, Kind::closed);
    EXPECT_EQ(end.code, Errc::protocol) << end.message;
    EXPECT_NE(end.message.find(reason), std::string::npos) << end.message;
  }
  /// The daemon holds no more fds than `before`. It may hold fewer: it closes what earlier
  /// registrations brought on a thread of its own, perhaps after `before` was counted.
  void expect_fds_back(std::size_t before) const {
    EXPECT_TRUE(eventually([&] { return count_fds(daemon_.pid()) <= before; }))
        << count_fds(daemon_.pid()) << " fds are open, " << before << " were";
  }
  /// One more than the ring holds, and no reply is read. In between the daemon has to look where
  /// the client's position is.
  static void ping_until_the_replies_are_full(RawClient& client) {
    const std::uint64_t before = client.response().request_head.load();
    for (std::uint64_t i = 0; i <= kRingSlots; ++i) {
      client.post(wire::Opcode::ping, empty_message());
      const auto taken = [&] { return client.response().request_head.load() > before + i; };
      if (!eventually(taken, std::chrono::seconds(1))) break;
    }
  }
  /// The session is alive and answers.
  static void expect_alive(RawClient& client) {
    const auto pong = client.call(wire::Opcode::ping, empty_message());
    ASSERT_TRUE(pong) << "the session ended";
    EXPECT_EQ(pong->code, Errc::ok) << pong->message;
  }
  static std::string text(const RawClient::Reply& reply) {
    std::string all = reply.message;
    for (const std::string& line : reply.details) all += "\n" + line;
    return all;
  }
  /// The request was refused with `code`, its text has all of `parts`, and the session lives.
  static void expect_refused(RawClient& client, const std::optional<RawClient::Reply>& reply,
                             Errc code, const std::vector<std::string>& parts = {}) {
    ASSERT_TRUE(reply) << "the session ended instead";
    EXPECT_EQ(reply->code, code) << text(*reply);
    for (const std::string& part : parts)
      EXPECT_NE(text(*reply).find(part), std::string::npos) << part << "\n" << text(*reply);
    expect_alive(client);
  }
  /// Registers one tensor of a page as `module`.
  static void register_page(RawClient& client, const std::string& module, std::uint64_t ticket,
                            int fd) {
    ASSERT_TRUE(client.send_ticket(ticket, fd));
    const auto reply =
        client.call(wire::Opcode::register_module,
                    register_message(module, {{ticket, kPage}}, {byte_tensor("t", kPage)}));
    ASSERT_TRUE(reply);
    ASSERT_EQ(reply->code, Errc::ok) << text(*reply);
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  DaemonProcess daemon_{socket_};
  Bystander bystander_{socket_, daemon_.pid()};
};

// ---- the handshake

TEST_F(Protocol, OtherProtocolVersionIsRefusedNamingBoth) {
  for (const unsigned version : {0U, kProtocolVersion + 1U, 0xffffU}) {
    RawClient sut(socket_);
    Preamble old;
    old.protocol_version = static_cast<std::uint16_t>(version);
    ASSERT_TRUE(sut.hello(Role::engine, "old", old));
    const auto answer = sut.answer();
    EXPECT_EQ(answer.kind, Kind::nak);
    EXPECT_EQ(answer.code, Errc::protocol_version);
    EXPECT_NE(answer.message.find("client speaks protocol " + std::to_string(version)),
              std::string::npos)
        << answer.message;
    EXPECT_NE(answer.message.find("daemon speaks protocol " + std::to_string(kProtocolVersion)),
              std::string::npos)
        << answer.message;
    EXPECT_EQ(sut.ended().kind, Kind::closed);
  }
}

TEST_F(Protocol, OtherLayoutIsRefusedNamingBoth) {
  RawClient sut(socket_);
  Preamble other;
  other.layout_hash = 0x1234;
  ASSERT_TRUE(sut.hello(Role::engine, "other", other));
  const auto answer = sut.answer();
  EXPECT_EQ(answer.code, Errc::protocol_version);
  char own[17];
  std::snprintf(own, sizeof own, "%016llx", static_cast<unsigned long long>(kLayoutHash));
  EXPECT_NE(answer.message.find("0000000000001234"), std::string::npos) << answer.message;
  EXPECT_NE(answer.message.find(own), std::string::npos) << answer.message;
}

TEST_F(Protocol, HelloThatIsNoneIsRefused) {
  const auto expect_nak = [&](RawClient& sut) {
    const auto answer = sut.answer();
    EXPECT_EQ(answer.kind, Kind::nak);
    EXPECT_EQ(answer.code, Errc::protocol) << answer.message;
    EXPECT_EQ(sut.ended().kind, Kind::closed);
  };
  {
    SCOPED_TRACE("a ticket instead");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send(SocketMessage::ticket, Bytes(8)));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("no body");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send(SocketMessage::hello, {}));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("a body that does not verify");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send(SocketMessage::hello, Bytes(64, 0xff)));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("another magic");
    RawClient sut(socket_);
    Preamble preamble;
    preamble.magic = 0;
    ASSERT_TRUE(sut.hello(Role::engine, "x", preamble));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("three bytes");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send_raw({1, 2, 3}));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("more than a message may have");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send(SocketMessage::hello, Bytes(3 * kSocketMessageBytesMax)));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("more fds than a message may have");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send_raw(Bytes(16), std::vector<int>(20, 0)));
    expect_nak(sut);
  }
  {
    SCOPED_TRACE("nothing at all");
    RawClient sut(socket_);
    ASSERT_TRUE(sut.send_raw({}));
    EXPECT_NE(sut.ended().kind, Kind::silence);
  }
}

TEST_F(Protocol, HelloWithValuesThatDoNotExistIsRefused) {
  const auto send_hello = [&](std::uint8_t role, std::uint8_t waiting, bool with_name) {
    RawClient sut(socket_);
    flatbuffers::FlatBufferBuilder fbb;
    const auto name = fbb.CreateString("x");
    fbb.Finish(wire::CreateHello(
        fbb, role, with_name ? name : flatbuffers::Offset<flatbuffers::String>(), waiting));
    EXPECT_TRUE(sut.send(SocketMessage::hello,
                         {fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()}));
    return sut.answer();
  };
  for (const auto& answer : {send_hello(3, 0, true), send_hello(255, 0, true),
                             send_hello(0, 3, true), send_hello(0, 0, false)}) {
    EXPECT_EQ(answer.kind, Kind::nak);
    EXPECT_EQ(answer.code, Errc::bad_argument) << answer.message;
  }
}

TEST_F(Protocol, GarbageOnTheSocketReachesNobodyElse) {
  std::mt19937 random(7);
  for (int i = 0; i < 200; ++i) {
    RawClient sut(socket_);
    Bytes garbage(random() % 300);
    for (auto& byte : garbage) byte = static_cast<std::uint8_t>(random());
    sut.send_raw(garbage);
  }
}

TEST_F(Protocol, ConnectionThatSaysNothingIsToldSo) {
  RawClient sut(socket_);
  const auto answer = sut.answer();
  EXPECT_EQ(answer.kind, Kind::nak);
  EXPECT_EQ(answer.code, Errc::deadline) << answer.message;
  EXPECT_NE(answer.message.find("HELLO"), std::string::npos) << answer.message;
}

// Goal: connections that never say HELLO do not keep an honest client out.
TEST_F(Protocol, SilentConnectionsDoNotKeepOthersOut) {
  std::vector<RawClient> silent;
  for (int i = 0; i < 200; ++i) silent.emplace_back(socket_);
  Bystander newcomer(socket_, daemon_.pid(), "newcomer");
  newcomer.goes_on();
}

TEST_F(Protocol, ConnectFloodLeavesNothingBehind) {
  const std::size_t before = count_fds(daemon_.pid());
  for (int i = 0; i < 1000; ++i) {
    RawClient sut(socket_);
    if (i % 2 == 0) sut.hello(Role::trainer, "flood");
  }
  expect_fds_back(before);
}

TEST_F(Protocol, TooManySessionsAreRefusedAndTheOldOnesLive) {
  std::vector<RawClient> sessions;
  RawClient::Answer refusal;
  for (int i = 0; i < 80 && refusal.kind != Kind::nak; ++i) {
    RawClient sut(socket_);
    ASSERT_TRUE(sut.hello(Role::trainer, "many"));
    refusal = sut.answer();
    if (refusal.kind == Kind::welcome) sessions.push_back(std::move(sut));
  }
  EXPECT_EQ(refusal.kind, Kind::nak);
  EXPECT_EQ(refusal.code, Errc::quota) << refusal.message;
  EXPECT_NE(refusal.message.find("64"), std::string::npos) << refusal.message;
  ASSERT_FALSE(sessions.empty());
  expect_alive(sessions.front());
  expect_alive(sessions.back());
}

// Goal: the words that say what an engine may run on are the daemon's alone. Method: a client tries
// to get a writable view of the response region in each way that an fd gives.
TEST_F(Protocol, ResponseRegionTakesNoWriterButTheDaemon) {
  const RawClient sut = join();
  const int fd = sut.response_fd();
  EXPECT_EQ(::mmap(nullptr, kResponseRegionBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0),
            MAP_FAILED);
  EXPECT_EQ(errno, EPERM);
  const std::string path = "/proc/self/fd/" + std::to_string(fd);
  const UniqueFd reopened = UniqueFd::adopt(::open(path.c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(reopened);
  EXPECT_EQ(::mmap(nullptr, kResponseRegionBytes, PROT_WRITE, MAP_SHARED, reopened.get(), 0),
            MAP_FAILED);
  const std::uint64_t word = 0;
  EXPECT_EQ(::pwrite(fd, &word, sizeof word, 0), -1);
  EXPECT_EQ(errno, EPERM);
  void* const reader = ::mmap(nullptr, kResponseRegionBytes, PROT_READ, MAP_SHARED, fd, 0);
  ASSERT_NE(reader, MAP_FAILED);
  EXPECT_EQ(::mprotect(reader, kResponseRegionBytes, PROT_READ | PROT_WRITE), -1);
  ::munmap(reader, kResponseRegionBytes);
  EXPECT_EQ(::ftruncate(fd, 0), -1);
  EXPECT_NE(::fcntl(fd, F_GET_SEALS) & F_SEAL_SEAL, 0);
}

// ---- the socket after it

TEST_F(Protocol, SecondHelloEndsTheSession) {
  RawClient sut = join();
  ASSERT_TRUE(sut.hello(Role::trainer, "again"));
  expect_ended(sut, "ticket");
}

TEST_F(Protocol, TicketWithoutOneFdEndsTheSession) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  for (const std::size_t fds : {0U, 2U, 8U}) {
    RawClient sut = join();
    ASSERT_TRUE(sut.send(SocketMessage::ticket, Bytes(8), std::vector<int>(fds, fd.get())));
    expect_ended(sut, "one fd");
  }
}

TEST_F(Protocol, TicketOfAnotherLengthEndsTheSession) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  for (const std::size_t bytes : {0U, 7U, 9U}) {
    RawClient sut = join();
    ASSERT_TRUE(sut.send(SocketMessage::ticket, Bytes(bytes), {fd.get()}));
    expect_ended(sut, "ticket");
  }
}

TEST_F(Protocol, TruncatedAndForeignMessagesEndTheSession) {
  for (const Bytes& message : {Bytes(3), Bytes(15), Bytes(16), Bytes(64, 0xee), Bytes(9000)}) {
    RawClient sut = join();
    ASSERT_TRUE(sut.send_raw(message));
    expect_ended(sut, "truncated");
  }
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient sut = join();
  ASSERT_TRUE(sut.send(SocketMessage::ticket, Bytes(8), std::vector<int>(30, fd.get())));
  expect_ended(sut, "truncated");
}

TEST_F(Protocol, TicketThatIsSentTwiceEndsTheSession) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient sut = join();
  ASSERT_TRUE(sut.send_ticket(5, fd.get()));
  ASSERT_TRUE(sut.send_ticket(5, fd.get()));
  expect_ended(sut, "twice");
}

TEST_F(Protocol, MoreUnclaimedTicketsThanAreAllowedEndTheSession) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  const std::size_t before = count_fds(daemon_.pid());
  RawClient sut = join();
  for (std::uint64_t ticket = 0; ticket <= kUnclaimedTicketsMax; ++ticket)
    sut.send_ticket(ticket, fd.get());
  expect_ended(sut, std::to_string(kUnclaimedTicketsMax));
  expect_fds_back(before);
}

// Goal: a client that fills the daemon with fds does not take them from others.
// Method: a daemon that was started with few fds allowed; many sessions with a few tickets each,
// more than that together; then a newcomer must register.
TEST_F(Protocol, TicketsOfOneClientDoNotExhaustTheDaemonsFds) {
  rlimit limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &limit), 0);
  const rlimit few{256, limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  const std::string socket = directory_.path() + "/few.sock";
  DaemonProcess daemon(socket);
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &limit), 0);
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  std::vector<RawClient> hoarders;
  for (int i = 0; i < 40; ++i) {
    RawClient hoarder(socket);
    ASSERT_TRUE(hoarder.hello(Role::trainer, "hoarder"));
    if (hoarder.answer().kind != Kind::welcome) break;
    for (std::uint64_t ticket = 0; ticket < 4; ++ticket) hoarder.send_ticket(ticket, fd.get());
    hoarders.push_back(std::move(hoarder));
  }
  Bystander newcomer(socket, daemon.pid(), "newcomer");
  newcomer.goes_on();
}

// ---- the ring

TEST_F(Protocol, SequenceThatIsNotTheSlotsEndsTheSession) {
  for (const std::uint64_t sequence :
       {std::uint64_t{2}, std::uint64_t{65}, std::uint64_t{1} << 40, ~std::uint64_t{0}}) {
    RawClient sut = join();
    sut.next_slot().sequence.store(sequence);
    sut.ring();
    expect_ended(sut, "ring position");
  }
}

TEST_F(Protocol, SequenceThatGoesBackEndsTheSession) {
  for (const std::uint64_t sequence : {0U, 1U, 5U}) {
    RawClient sut = join();
    for (std::uint32_t i = 0; i < kRingSlots + 1; ++i) expect_alive(sut);
    sut.next_slot().sequence.store(sequence);
    sut.ring();
    expect_ended(sut, "ring position");
  }
}

// Method: FlatBuffers does not mind zeros behind a message, which take it to any length.
TEST_F(Protocol, PayloadArrivesInTheSlotAndBesideIt) {
  RawClient sut = join();
  for (std::size_t bytes = empty_message().size(); bytes <= 2 * kInlinePayloadBytes; ++bytes) {
    Bytes message = empty_message();
    message.resize(bytes);
    const auto pong = sut.call(wire::Opcode::ping, message);
    ASSERT_TRUE(pong) << bytes;
    EXPECT_EQ(pong->code, Errc::ok) << bytes;
  }
}

TEST_F(Protocol, PayloadOutsideTheArenaEndsTheSession) {
  const auto spoiled = [&](const std::function<void(Descriptor&)>& spoil) {
    RawClient sut = join();
    Descriptor descriptor =
        sut.describe(wire::Opcode::tensors, tensors_message("engine", "module"));
    ASSERT_GT(descriptor.payload_bytes, kInlinePayloadBytes);
    spoil(descriptor);
    sut.push(descriptor);
    expect_ended(sut, "outside the arena");
  };
  spoiled([](Descriptor& d) { d.payload_offset = 0; });
  spoiled([](Descriptor& d) { d.payload_offset = offsetof(RequestRegion, arena) - 1; });
  spoiled([](Descriptor& d) { d.payload_offset = kRequestRegionBytes - 3; });
  spoiled([](Descriptor& d) { d.payload_offset = kRequestRegionBytes + 1; });
  spoiled([](Descriptor& d) { d.payload_offset = ~std::uint64_t{0}; });
  spoiled([](Descriptor& d) { d.payload_offset = ~std::uint64_t{0} - d.payload_bytes + 1; });
  spoiled([](Descriptor& d) { d.payload_bytes = kPayloadBytesMax + 1; });
  spoiled([](Descriptor& d) { d.payload_bytes = ~std::uint32_t{0}; });
  spoiled([](Descriptor& d) {
    d.payload_bytes = kPayloadBytesMax;
    d.payload_offset = kRequestRegionBytes - kPayloadBytesMax + 1;
  });
}

TEST_F(Protocol, WrongPayloadHashEndsTheSession) {
  for (const Bytes& message : {empty_message(), tensors_message("engine", "module")}) {
    RawClient sut = join();
    Descriptor descriptor = sut.describe(wire::Opcode::ping, message);
    descriptor.payload_xxh3 ^= 1;
    sut.push(descriptor);
    expect_ended(sut, "hash");
  }
}

TEST_F(Protocol, UnknownOpcodeEndsTheSession) {
  for (const unsigned opcode : {0U, 99U, 255U, 65535U}) {
    RawClient sut = join();
    sut.post(static_cast<wire::Opcode>(opcode), empty_message());
    expect_ended(sut, "opcode " + std::to_string(opcode));
  }
}

// Goal: no opcode takes a message that does not verify. Deep nesting is not among them: no table of
// the schema contains itself.
TEST_F(Protocol, MessageThatDoesNotVerifyEndsTheSession) {
  std::mt19937 random(11);
  const Bytes honest = refit_message(TransactionId::random(), {{"bystander", "bystander", "m"}});
  for (unsigned opcode = 1; opcode <= 11; ++opcode) {
    for (const Bytes& payload :
         {Bytes{}, Bytes{1, 2, 3}, Bytes(16, 0xff), Bytes(honest.begin(), honest.begin() + 9)}) {
      RawClient sut = join();
      sut.post(static_cast<wire::Opcode>(opcode), payload);
      expect_ended(sut, "does not verify");
    }
  }
  for (std::size_t cut = 8; cut < honest.size(); cut += 24) {
    RawClient sut = join();
    sut.post(wire::Opcode::refit, {honest.end() - static_cast<std::ptrdiff_t>(cut), honest.end()});
    EXPECT_NE(sut.ended().kind, Kind::silence) << cut;
  }
}

/// `count` tables or strings that are all the same one: FlatBuffers lets offsets share, so a small
/// message can claim to be an enormous one.
template <typename T>
flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<T>>> repeated(
    flatbuffers::FlatBufferBuilder& fbb, flatbuffers::Offset<T> one, std::size_t count) {
  return fbb.CreateVector(std::vector<flatbuffers::Offset<T>>(count, one));
}

// Goal: what a message claims to hold is bounded before it is copied. Unbounded, each of these
// would make the daemon ask for some 100 GB.
TEST_F(Protocol, MessagesThatShareTheirPartsCostNoMemory) {
  const std::string long_text(2'000'000, 'n');
  const std::vector<std::uint64_t> long_dims(200'000, 1);
  const auto bytes = [](const flatbuffers::FlatBufferBuilder& fbb) {
    return Bytes(fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize());
  };
  const auto refused = [&](wire::Opcode opcode, const Bytes& payload, const char* what) {
    SCOPED_TRACE(what);
    ASSERT_LE(payload.size(), kPayloadBytesMax);
    RawClient sut = join();
    const auto reply = sut.call(opcode, payload);
    if (!reply) {
      EXPECT_EQ(sut.ended().kind, Kind::closed);
      return;
    }
    EXPECT_NE(reply->code, Errc::ok);
  };
  flatbuffers::FlatBufferBuilder fbb;
  {
    const auto name = fbb.CreateString(long_text);
    const auto expected =
        wire::CreateExpectedDigest(fbb, name, fbb.CreateVector(std::vector<std::uint8_t>(32)));
    const auto engine = fbb.CreateString("bystander");
    fbb.Finish(
        wire::CreateCheck(fbb, engine, engine, 1, repeated(fbb, expected, 100'000), 1'000'000));
    refused(wire::Opcode::check, bytes(fbb), "names of a check");
  }
  fbb.Clear();
  {
    const auto name = fbb.CreateString(long_text);
    const auto engine = fbb.CreateString("bystander");
    fbb.Finish(wire::CreateDigestQuery(fbb, engine, engine, 1, repeated(fbb, name, 300'000), false,
                                       1'000'000));
    refused(wire::Opcode::digest, bytes(fbb), "selection of a digest");
  }
  fbb.Clear();
  {
    // The same tensor over and over: a request of a megabyte would hash for minutes.
    const auto name = fbb.CreateString("embed.weight");
    const auto engine = fbb.CreateString("bystander");
    fbb.Finish(wire::CreateDigestQuery(fbb, engine, engine, 1, repeated(fbb, name, 300'000), false,
                                       1'000'000));
    refused(wire::Opcode::digest, bytes(fbb), "one tensor selected often");
  }
  fbb.Clear();
  {
    const auto tensor =
        wire::CreateTensor(fbb, fbb.CreateString("t"), 11, fbb.CreateVector(long_dims));
    const auto name = fbb.CreateString("m");
    fbb.Finish(wire::CreateRegisterModule(fbb, name, 0, repeated(fbb, tensor, 60'000)));
    refused(wire::Opcode::register_module, bytes(fbb), "dimensions of a tensor");
  }
  fbb.Clear();
  {
    const auto tensor = wire::CreateTensor(fbb, fbb.CreateString(long_text), 11);
    const auto name = fbb.CreateString("m");
    fbb.Finish(wire::CreateRegisterModule(fbb, name, 0, repeated(fbb, tensor, 60'000)));
    refused(wire::Opcode::register_module, bytes(fbb), "names of tensors");
  }
  fbb.Clear();
  {
    const auto text = fbb.CreateString(long_text);
    const auto rule = wire::CreateNameRule(fbb, text, text);
    const auto name = fbb.CreateString("m");
    fbb.Finish(wire::CreateRegisterModule(fbb, name, 0, 0, repeated(fbb, rule, 256)));
    refused(wire::Opcode::register_module, bytes(fbb), "name rules");
  }
  // A refit needs a source before its selection is looked at.
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient trainer = join();
  register_page(trainer, "m", 1, fd.get());
  fbb.Clear();
  const auto text = fbb.CreateString(long_text);
  const auto names = repeated(fbb, text, 300'000);
  const auto engine = fbb.CreateString("bystander");
  const auto source = fbb.CreateString("m");
  const auto target = wire::CreateTarget(fbb, engine, engine, source, names);
  const wire::TransactionId id(1, 2);
  const auto targets = fbb.CreateVector(std::vector<flatbuffers::Offset<wire::Target>>{target});
  fbb.Finish(wire::CreateRefit(fbb, &id, targets));
  const auto reply = trainer.call(wire::Opcode::refit, bytes(fbb));
  if (reply) {
    EXPECT_NE(reply->code, Errc::ok);
  }
}

TEST_F(Protocol, ReplyPositionAheadOfTheDaemonEndsTheSession) {
  RawClient sut = join();
  sut.request().response_head.store(std::uint64_t{1} << 50);
  ping_until_the_replies_are_full(sut);
  EXPECT_EQ(sut.ended().kind, Kind::closed);
}

TEST_F(Protocol, ReplyPositionThatGoesBackEndsAtMostTheSession) {
  RawClient sut = join();
  for (int i = 0; i < 100; ++i) expect_alive(sut);
  sut.request().response_head.store(1);
  ping_until_the_replies_are_full(sut);
  EXPECT_EQ(sut.ended().kind, Kind::closed);
}

TEST_F(Protocol, ClientThatNeverReadsItsRepliesLosesItsSession) {
  RawClient sut = join();
  ping_until_the_replies_are_full(sut);
  EXPECT_EQ(sut.ended().kind, Kind::closed);
}

// Goal: the reply that finds no room may be that of an operation which another one's end set free.
// Method: the reply ring is filled to its last slot while a refit, or a digest behind it, waits;
// its deadline then makes the daemon answer.
TEST_F(Protocol, ReplyRingThatIsFullWhenWaitingWorkFailsEndsTheSessionOnly) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  for (const int digests : {0, 3}) {
    SCOPED_TRACE(digests);
    RawClient engine = join(Role::engine, "idle");
    register_page(engine, "m", 1, fd.get());
    const UniqueFd source = honest_memfd(kPage, kHonestSeals);
    RawClient sut = join();
    register_page(sut, "m", 1, source.get());
    // Two refits, so that the end of the session finds one more of its own.
    for (std::uint64_t id = 1; id <= 2; ++id)
      sut.post(wire::Opcode::refit, refit_message({7, id}, {{"idle", "m", "m"}}, 2'000'000));
    for (int i = 0; i < digests; ++i)
      sut.post(wire::Opcode::digest, digest_message("idle", "m", {}, 2'000'000));
    for (std::uint32_t i = 0; i < kRingSlots; ++i) {
      const std::uint64_t before = sut.unread();
      sut.post(wire::Opcode::ping, empty_message());
      if (!eventually([&] { return sut.unread() > before; }, std::chrono::seconds(2))) break;
    }
    EXPECT_EQ(sut.ended().kind, Kind::closed);
    expect_alive(engine);
  }
}

TEST_F(Protocol, UnansweredRequestsAreBounded) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient engine = join(Role::engine, "idle");
  register_page(engine, "m", 1, fd.get());
  const UniqueFd source = honest_memfd(kPage, kHonestSeals);
  RawClient sut = join();
  register_page(sut, "m", 1, source.get());
  const auto refused = [&] {
    for (std::uint64_t i = 1; i <= 1000; ++i) {
      // An hour's deadline each; nothing answers them.
      sut.post(wire::Opcode::refit, refit_message({9, i}, {{"idle", "m", "m"}}, 3'600'000'000));
      if (!eventually([&] { return sut.response().request_head.load() > i; },
                      std::chrono::seconds(1)))
        return true;
      if (sut.unread() > 0) return true;
    }
    return false;
  };
  EXPECT_TRUE(refused()) << "a thousand refits wait at once for one client";
}

// Goal: the daemon never blocks in ringing a client, nor in ringing itself.
// Method: a doorbell's file description is shared, so its client may clear O_NONBLOCK and fill it.
// Then it publishes a whole ring, with a registration first: the daemon ends its turn after one and
// comes back for the rest.
TEST_F(Protocol, DoorbellThatIsMadeToBlockHoldsNobodyUp) {
  RawClient sut = join();
  const auto fill = [](int bell) {
    ::fcntl(bell, F_SETFL, ::fcntl(bell, F_GETFL) | O_NONBLOCK);
    for (std::uint64_t value = ~std::uint64_t{0} - 1; value > 0; value /= 2) {
      while (::write(bell, &value, sizeof value) == static_cast<ssize_t>(sizeof value)) {
      }
    }
    ::fcntl(bell, F_SETFL, ::fcntl(bell, F_GETFL) & ~O_NONBLOCK);
  };
  const auto relieve = [](int bell) {
    ::fcntl(bell, F_SETFL, ::fcntl(bell, F_GETFL) | O_NONBLOCK);
    std::array<char, 4096> sink;
    while (::read(bell, sink.data(), sink.size()) > 0) {
    }
  };
  fill(sut.client_doorbell());
  sut.publish(sut.describe(wire::Opcode::register_module, register_message("a/b", {}, {})));
  for (int i = 1; i < 60; ++i) sut.publish(sut.describe(wire::Opcode::ping, empty_message()));
  fill(sut.daemon_doorbell());  // its first write is the edge that the daemon sees
  EXPECT_TRUE(eventually([&] { return sut.unread() > 0; }));
  // A daemon that is stuck is let go at the end, so that the test can end too.
  EXPECT_TRUE(eventually([&] { return sut.unread() == 60; }, std::chrono::seconds(5)))
      << "the daemon is stuck";
  const auto pong = bystander_.trainer().ping(Deadline::in(std::chrono::seconds(5)));
  EXPECT_TRUE(pong) << pong.error().to_string();
  relieve(sut.client_doorbell());
  relieve(sut.daemon_doorbell());
}

// ---- registration

TEST_F(Protocol, UnknownTicketIsRefused) {
  RawClient sut = join(Role::engine);
  const auto reply = sut.call(wire::Opcode::register_module,
                              register_message("m", {{77, kPage}}, {byte_tensor("t", 16)}));
  expect_refused(sut, reply, Errc::unknown_ticket, {"77", "m"});
}

TEST_F(Protocol, TicketIsGoodForOneRegistration) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient sut = join(Role::engine);
  register_page(sut, "m", 5, fd.get());
  const auto again = sut.call(wire::Opcode::register_module,
                              register_message("n", {{5, kPage}}, {byte_tensor("t", 16)}));
  expect_refused(sut, again, Errc::unknown_ticket, {"5"});
  RawClient twice = join(Role::trainer);
  ASSERT_TRUE(twice.send_ticket(6, fd.get()));
  const auto both =
      twice.call(wire::Opcode::register_module,
                 register_message("m", {{6, kPage}, {6, kPage}}, {byte_tensor("t", 16)}));
  expect_refused(twice, both, Errc::unknown_ticket, {"6"});
}

// Goal: every kind of fd that is no sealed memory of the declared length is refused by what it is.
TEST_F(Protocol, FdThatIsNotSealedMemoryIsRefusedWithWhatItIs) {
  int pipe_fds[2];
  ASSERT_EQ(::pipe2(pipe_fds, O_CLOEXEC), 0);
  const UniqueFd pipe_read = UniqueFd::adopt(pipe_fds[0]);
  const UniqueFd pipe_write = UniqueFd::adopt(pipe_fds[1]);
  const std::string path = directory_.path() + "/file";
  const UniqueFd file = UniqueFd::adopt(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  ASSERT_EQ(::ftruncate(file.get(), kPage), 0);
  const UniqueFd shm = UniqueFd::adopt(::open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  const UniqueFd directory = UniqueFd::adopt(::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  const UniqueFd null = UniqueFd::adopt(::open("/dev/null", O_RDWR | O_CLOEXEC));
  const UniqueFd event = UniqueFd::adopt(::eventfd(0, EFD_CLOEXEC));
  const UniqueFd unsealed = honest_memfd(kPage, 0);
  const UniqueFd only_grow = honest_memfd(kPage, F_SEAL_GROW);
  const UniqueFd small = honest_memfd(kPage, kHonestSeals);
  const UniqueFd no_write = honest_memfd(kPage, kHonestSeals | F_SEAL_FUTURE_WRITE);
  const UniqueFd huge =
      UniqueFd::adopt(::memfd_create("huge", MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_HUGETLB));
  RawClient sut = join(Role::engine);
  struct Case {
    const char* what;
    int fd;
    std::uint64_t bytes;
    std::vector<std::string> parts;
  };
  std::vector<Case> cases{{"pipe", pipe_read.get(), kPage, {"memfd"}},
                          {"socket", sut.socket(), kPage, {"memfd"}},
                          {"file", file.get(), kPage, {"memfd"}},
                          {"directory", directory.get(), kPage, {"memfd"}},
                          {"device", null.get(), kPage, {"memfd"}},
                          {"eventfd", event.get(), kPage, {"memfd"}},
                          {"unsealed memfd", unsealed.get(), kPage, {"F_SEAL_SHRINK"}},
                          {"memfd sealed otherwise", only_grow.get(), kPage, {"F_SEAL_SHRINK"}},
                          {"shorter than declared", small.get(), kPage + 1, {"4096", "4097"}},
                          {"far shorter than declared", small.get(), ~std::uint64_t{0}, {"4096"}},
                          {"nothing declared", small.get(), 0, {}},
                          {"not writable", no_write.get(), kPage, {}}};
  if (shm) cases.push_back({"file on tmpfs", shm.get(), kPage, {}});
  if (huge) {
    ASSERT_EQ(::ftruncate(huge.get(), 2 << 20), 0);
    ASSERT_EQ(::fcntl(huge.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
    cases.push_back({"hugetlb memfd", huge.get(), kPage, {"tmpfs"}});
  } else {
    std::printf("no hugetlb memfd on this host: that case was not run\n");
  }
  std::uint64_t ticket = 1;
  for (const Case& one : cases) {
    SCOPED_TRACE(one.what);
    ASSERT_TRUE(sut.send_ticket(++ticket, one.fd));
    const auto reply =
        sut.call(wire::Opcode::register_module,
                 register_message("m", {{ticket, one.bytes}}, {byte_tensor("t", 16)}));
    ASSERT_TRUE(reply) << "the session ended instead";
    EXPECT_TRUE(reply->code == Errc::bad_region || reply->code == Errc::os) << text(*reply);
    EXPECT_NE(text(*reply).find("hostile/m"), std::string::npos) << text(*reply);
    EXPECT_NE(text(*reply).find("region 0"), std::string::npos) << text(*reply);
    for (const std::string& part : one.parts)
      EXPECT_NE(text(*reply).find(part), std::string::npos) << text(*reply);
  }
  expect_alive(sut);
}

TEST_F(Protocol, EveryWrongRegionIsInOneError) {
  const UniqueFd unsealed = honest_memfd(kPage, 0);
  const UniqueFd good = honest_memfd(kPage, kHonestSeals);
  const UniqueFd null = UniqueFd::adopt(::open("/dev/null", O_RDWR | O_CLOEXEC));
  RawClient sut = join(Role::engine);
  expect_alive(sut);
  const std::size_t before = count_fds(daemon_.pid());
  ASSERT_TRUE(sut.send_ticket(1, unsealed.get()));
  ASSERT_TRUE(sut.send_ticket(2, good.get()));
  ASSERT_TRUE(sut.send_ticket(3, null.get()));
  ASSERT_TRUE(sut.send_ticket(4, good.get()));
  const auto reply = sut.call(
      wire::Opcode::register_module,
      register_message("m", {{1, kPage}, {2, kPage}, {3, kPage}, {4, 2 * kPage}, {99, kPage}},
                       {byte_tensor("t", 16)}));
  ASSERT_TRUE(reply);
  EXPECT_NE(reply->code, Errc::ok);
  for (const char* part : {"region 0", "region 2", "region 3", "region 4"})
    EXPECT_NE(text(*reply).find(part), std::string::npos) << part << "\n" << text(*reply);
  EXPECT_EQ(text(*reply).find("region 1"), std::string::npos) << text(*reply);
  expect_fds_back(before);
}

// Goal: the daemon does not pay for memory that a client only claims to have.
// Method: a sealed memfd of 64 MiB without a page; were it a TiB, populating it would end the
// daemon.
TEST_F(Protocol, RegionWithoutMemoryBehindItIsRefused) {
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  auto sparse = make_memfd("sparse", kBytes);
  ASSERT_TRUE(sparse);
  ASSERT_TRUE(add_seals(sparse->get(), kHonestSeals, "sparse"));
  for (const Role role : {Role::engine, Role::trainer}) {
    RawClient sut = join(role);
    ASSERT_TRUE(sut.send_ticket(1, sparse->get()));
    const auto reply = sut.call(wire::Opcode::register_module,
                                register_message("m", {{1, kBytes}}, {byte_tensor("t", 16)}));
    expect_refused(sut, reply, Errc::bad_region, {"region 0"});
  }
}

TEST_F(Protocol, RegionThatIsPunchedAfterRegistrationHurtsNobody) {
  constexpr std::size_t kBytes = std::size_t{8} << 20;
  const UniqueFd target = honest_memfd(kBytes, kHonestSeals);
  const UniqueFd source = honest_memfd(kBytes, kHonestSeals);
  RawClient engine = join(Role::engine, "punched");
  RawClient trainer = join(Role::trainer, "punched");
  for (const auto& [client, fd] : {std::pair{&engine, target.get()}, {&trainer, source.get()}}) {
    ASSERT_TRUE(client->send_ticket(1, fd));
    const auto reply =
        client->call(wire::Opcode::register_module,
                     register_message("m", {{1, kBytes}}, {byte_tensor("t", kBytes)}));
    ASSERT_TRUE(reply);
    ASSERT_EQ(reply->code, Errc::ok) << text(*reply);
    ASSERT_EQ(::fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, kBytes), 0);
  }
  const std::uint64_t request =
      trainer.post(wire::Opcode::refit, refit_message({3, 4}, {{"punched", "m", "m"}}));
  ASSERT_TRUE(eventually([&] {
    const GateWord gate = GateWord::unpack(engine.response().gate.load());
    if (gate.state != GateState::prepare) return false;
    engine.request().gate_answer.store(AnswerWord{gate.epoch, AnswerState::ready}.pack());
    engine.ring();
    return true;
  }));
  const auto reply = trainer.reply(request);
  ASSERT_TRUE(reply);
  const auto digests = trainer.call(wire::Opcode::digest, digest_message("punched", "m"));
  EXPECT_TRUE(digests);
}

TEST_F(Protocol, CountsOverTheLimitsAreRefused) {
  RawClient sut = join(Role::engine);
  flatbuffers::FlatBufferBuilder fbb;
  const auto name = fbb.CreateString("m");
  const auto tensor = wire::CreateTensor(fbb, name, 11);
  fbb.Finish(wire::CreateRegisterModule(fbb, name, 0, repeated(fbb, tensor, 65'537)));
  const auto many = sut.call(wire::Opcode::register_module,
                             {fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()});
  expect_refused(sut, many, Errc::quota, {"65537", "65536"});
  const auto regions = sut.call(wire::Opcode::register_module,
                                register_message("m", std::vector<RawRegion>(5000), {}));
  expect_refused(sut, regions, Errc::quota, {"5000", "4096"});
  const auto rules = sut.call(wire::Opcode::register_module,
                              register_message("m", {}, {}, std::vector<NameRule>(1000)));
  expect_refused(sut, rules, Errc::quota, {"1000"});
  // More tables than a message may have at all: it does not even verify.
  fbb.Clear();
  const auto other = fbb.CreateString("m");
  const auto table = wire::CreateTensor(fbb, other, 11);
  fbb.Finish(wire::CreateRegisterModule(fbb, other, 0, repeated(fbb, table, 800'000)));
  sut.post(wire::Opcode::register_module,
           {fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()});
  expect_ended(sut, "does not verify");
}

TEST_F(Protocol, ObserverRegistersNothingAndOnlyTrainersRefit) {
  RawClient observer = join(Role::observer);
  expect_refused(observer,
                 observer.call(wire::Opcode::register_module, register_message("m", {}, {})),
                 Errc::permission);
  for (const Role role : {Role::observer, Role::engine}) {
    RawClient sut = join(role, role == Role::engine ? "engine" : "observer");
    const auto reply = sut.call(wire::Opcode::refit,
                                refit_message({1, 1}, {{"bystander", "bystander", "bystander"}}));
    expect_refused(sut, reply, Errc::permission);
  }
}

// ---- refits

TEST_F(Protocol, RefitThatMakesNoSenseIsRefused) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  RawClient sut = join();
  register_page(sut, "m", 1, fd.get());
  const std::vector<RawTarget> one{{"bystander", "bystander", "m"}};
  const auto refit = [&](const Bytes& message) { return sut.call(wire::Opcode::refit, message); };
  expect_refused(sut, refit(refit_message({}, one)), Errc::bad_argument, {"transaction"});
  expect_refused(sut, refit(refit_message({1, 1}, {})), Errc::bad_argument, {"target"});
  expect_refused(sut, refit(refit_message({1, 1}, std::vector<RawTarget>(65, one[0]))), Errc::quota,
                 {"64"});
  expect_refused(sut, refit(refit_message({1, 1}, one, 1000, wire::Staging::shadow)),
                 Errc::unsupported, {"shadow"});
  expect_refused(sut, refit(refit_message({1, 1}, one, 1000, static_cast<wire::Staging>(9))),
                 Errc::unsupported);
  expect_refused(sut, refit(refit_message({1, 1}, one)), Errc::manifest_mismatch,
                 {"hostile/m", "bystander/bystander"});
  // No transaction and no targets at all.
  flatbuffers::FlatBufferBuilder fbb;
  fbb.Finish(wire::CreateRefit(fbb));
  expect_refused(sut, refit({fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()}),
                 Errc::bad_argument);
  fbb.Clear();
  const auto nameless = wire::CreateTarget(fbb);
  const wire::TransactionId id(1, 1);
  const auto targets = fbb.CreateVector(std::vector<flatbuffers::Offset<wire::Target>>{nameless});
  fbb.Finish(wire::CreateRefit(fbb, &id, targets));
  expect_refused(sut, refit({fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()}),
                 Errc::no_such_engine);
}

TEST_F(Protocol, DeadlinesOfZeroAndForeverAreTaken) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  const UniqueFd source = honest_memfd(kPage, kHonestSeals);
  RawClient engine = join(Role::engine, "idle");
  register_page(engine, "m", 1, fd.get());
  RawClient sut = join();
  register_page(sut, "m", 1, source.get());
  const std::vector<RawTarget> target{{"idle", "m", "m"}};
  expect_refused(sut, sut.call(wire::Opcode::refit, refit_message({1, 1}, target, 0)),
                 Errc::engine_not_ready, {"idle"});
  const std::uint64_t forever =
      sut.post(wire::Opcode::refit, refit_message({1, 2}, target, ~std::uint64_t{0}));
  expect_alive(sut);
  { const RawClient gone = std::move(engine); }
  const auto reply = sut.reply(forever);
  ASSERT_TRUE(reply);
  EXPECT_EQ(reply->code, Errc::engine_gone) << text(*reply);
}

// Goal: an engine's answer is a word that it may write at any time, with anything in it.
TEST_F(Protocol, GarbageInTheGateAnswerFailsThatEnginesRefitsOnly) {
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  const UniqueFd source = honest_memfd(kPage, kHonestSeals);
  RawClient engine = join(Role::engine, "liar");
  register_page(engine, "m", 1, fd.get());
  RawClient trainer = join();
  register_page(trainer, "m", 1, source.get());
  std::atomic<bool> stop{false};
  std::thread liar([&] {
    std::mt19937_64 random(3);
    while (!stop.load()) {
      const std::uint64_t epoch = GateWord::unpack(engine.response().gate.load()).epoch;
      engine.request().gate_answer.store(random() % 2 == 0 ? random() : epoch << 16 | random() % 4);
      engine.ring();
    }
  });
  int answered = 0;
  for (std::uint64_t i = 1; i <= 50; ++i) {
    const auto reply =
        trainer.call(wire::Opcode::refit, refit_message({5, i}, {{"liar", "m", "m"}}, 100'000));
    ASSERT_TRUE(reply) << "the trainer's session ended";
    EXPECT_TRUE(reply->code == Errc::ok || reply->code == Errc::engine_not_ready) << text(*reply);
    ++answered;
  }
  bystander_.goes_on();
  stop.store(true);
  liar.join();
  EXPECT_EQ(answered, 50);
}

// Goal: the daemon reads each shared word once; what changes between a check and its use must not
// matter (most of all under the sanitizers).
// Method: threads write garbage all over the request region while honest requests are published.
TEST_F(Protocol, RegionThatChangesWhileItIsReadEndsAtMostItsSession) {
  constexpr int kSessions = 40;
  int ended = 0;
  for (int i = 0; i < kSessions; ++i) {
    RawClient sut = join(i % 2 == 0 ? Role::trainer : Role::engine, "scribbler");
    std::atomic<bool> stop{false};
    std::thread scribbler([&, i] {
      std::mt19937_64 random(static_cast<std::uint64_t>(i));
      // Through a mapping of its own: what is under test is the daemon's reading, in another
      // process, and ThreadSanitizer would only see this process's two writers.
      void* alias = ::mremap(&sut.request(), 0, kRequestRegionBytes, MREMAP_MAYMOVE);
      auto* words = static_cast<std::atomic<std::uint64_t>*>(alias);
      constexpr std::size_t kHead = offsetof(RequestRegion, arena) / 8;
      constexpr std::size_t kSlots = offsetof(RequestRegion, requests) / 8;
      constexpr std::size_t kSlotWords = sizeof(RingSlot) / 8;
      while (!stop.load()) {
        // Descriptors and the payload's first kilobytes most of all; a sequence now and then,
        // because the one that the daemon reads next ends the session.
        const std::size_t at = random() % (kHead + 1024);
        const bool is_sequence = at >= kSlots && at < kSlots + kRingSlots * kSlotWords &&
                                 (at - kSlots) % kSlotWords == 0;
        if (is_sequence && random() % 16 != 0) continue;
        words[at].store(random() % 3 == 0 ? random() : words[at].load() ^ (1ULL << random() % 64));
      }
      ::munmap(alias, kRequestRegionBytes);
    });
    const Bytes refit = refit_message({1, 1}, {{"bystander", "bystander", "m"}}, 1000);
    const Bytes digest = digest_message("bystander", "bystander", {}, 1000);
    for (int k = 0; k < 300; ++k) {
      sut.post(k % 2 == 0 ? wire::Opcode::refit : wire::Opcode::digest,
               k % 2 == 0 ? refit : digest);
      sut.skip_replies();
      pollfd hangup{sut.socket(), POLLRDHUP, 0};
      if (::poll(&hangup, 1, 0) > 0) break;
    }
    // The daemon may still be reading what was posted last, and the scribbler goes on meanwhile.
    pollfd hangup{sut.socket(), POLLRDHUP, 0};
    ended += ::poll(&hangup, 1, 100) > 0 ? 1 : 0;
    stop.store(true);
    scribbler.join();
  }
  EXPECT_GT(ended, 0) << "no garbage was ever seen: the test shows nothing";
}

TEST_F(Protocol, LongUnknownNamesAreAnsweredBriefly) {
  RawClient sut = join();
  const std::string name(3'000'000, 'x');
  expect_refused(sut, sut.call(wire::Opcode::tensors, tensors_message(name, "m")),
                 Errc::no_such_engine);
  expect_refused(sut, sut.call(wire::Opcode::unregister_module, unregister_message(name)),
                 Errc::no_such_module);
  const auto control = sut.call(wire::Opcode::tensors, tensors_message("a\x1b[2Jb", "m"));
  expect_refused(sut, control, Errc::no_such_engine);
  EXPECT_EQ(text(*control).find('\x1b'), std::string::npos);
}

// Goal: a reply that would not fit into a message is an error, not the end of the session.
// Method: a manifest whose tensors' shapes stand in full in the answer and not in the request.
TEST_F(Protocol, ReplyThatDoesNotFitIsAnError) {
  RawClient engine = join(Role::engine, "wide");
  flatbuffers::FlatBufferBuilder fbb;
  const auto shape = fbb.CreateVector(std::vector<std::uint64_t>(8, 0));
  std::vector<flatbuffers::Offset<wire::Tensor>> tensors;
  for (int i = 0; i < 40'000; ++i) {
    const auto name = fbb.CreateString("tensor." + std::to_string(i));
    tensors.push_back(wire::CreateTensor(fbb, name, 11, shape));
  }
  const UniqueFd fd = honest_memfd(kPage, kHonestSeals);
  ASSERT_TRUE(engine.send_ticket(1, fd.get()));
  const auto all = fbb.CreateVector(tensors);
  const auto regions = fbb.CreateVector(
      std::vector<flatbuffers::Offset<wire::Region>>{wire::CreateRegion(fbb, 1, kPage)});
  const auto name = fbb.CreateString("m");
  fbb.Finish(wire::CreateRegisterModule(fbb, name, regions, all));
  const Bytes message{fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()};
  ASSERT_LE(message.size(), kPayloadBytesMax);
  const auto registered = engine.call(wire::Opcode::register_module, message);
  ASSERT_TRUE(registered);
  ASSERT_EQ(registered->code, Errc::ok) << text(*registered);
  RawClient sut = join(Role::observer);
  expect_refused(sut, sut.call(wire::Opcode::tensors, tensors_message("wide", "m")), Errc::quota);
}

}  // namespace
}  // namespace refit::test
