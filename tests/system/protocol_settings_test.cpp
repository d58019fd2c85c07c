// The protocol where it depends on how the daemon was started: its timeouts, and what it answers
// while a copy does not end.
//
// Nothing is asserted about how long something took, only about what came before what.

#include <fcntl.h>

#include <fstream>
#include <thread>

#include "ipc/state_word.hpp"
#include "support/daemon_test.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

using Kind = RawClient::Answer::Kind;

/// Too much to be copied by the loop itself.
constexpr std::size_t kMebibyte = std::size_t{1} << 20;

class ProtocolSettings : public DaemonTest {
 protected:
  void start_with(const std::string& settings) {
    const std::string file = directory_.path() + "/refitd.toml";
    std::ofstream(file) << settings;
    DaemonOptions how;
    how.arguments = {"--config", file};
    start(how);
  }
  static std::optional<RawClient::Reply> register_all(RawClient& client, std::uint64_t ticket) {
    return client.call(wire::Opcode::register_module,
                       register_message("m", {{ticket, kMebibyte}}, {byte_tensor("t", kMebibyte)}));
  }

  UniqueFd memory_ = honest_memfd(kMebibyte, F_SEAL_SHRINK);
};

// Method: the ticket is sent before the silent connection begins, so it outlives that one only if
// each has a time of its own.
TEST_F(ProtocolSettings, SilentConnectionIsRefusedAfterTheConfiguredTime) {
  start_with("hello_timeout_ms = 100\nfd_timeout_ms = 600000\n");
  RawClient beside = RawClient::joined(socket_, Role::trainer, "beside");
  ASSERT_TRUE(beside.send_ticket(1, memory_.get()));
  RawClient sut(socket_);

  const auto answer = sut.answer();

  EXPECT_EQ(answer.kind, Kind::nak);
  EXPECT_EQ(answer.code, Errc::deadline) << answer.message;
  const auto registered = register_all(beside, 1);
  ASSERT_TRUE(registered);
  EXPECT_EQ(registered->code, Errc::ok) << registered->message;
}

// Method: the mirror image: a connection that was silent before the ticket was sent is still
// welcome when the ticket is gone.
TEST_F(ProtocolSettings, FdThatNobodyClaimsIsClosedAfterTheConfiguredTime) {
  start_with("hello_timeout_ms = 600000\nfd_timeout_ms = 100\n");
  RawClient silent(socket_);
  RawClient sut = RawClient::joined(socket_, Role::trainer, "forgetful");
  ASSERT_TRUE(sut.send_ticket(1, memory_.get()));
  // A ticket that it does not know makes the daemon read all that wait.
  ASSERT_EQ(register_all(sut, 99)->code, Errc::unknown_ticket);

  // Once the time has passed a turn of the loop lets go of it, and a ping is one.
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(sut.call(wire::Opcode::ping, empty_message()));

  const auto refused = register_all(sut, 1);
  ASSERT_TRUE(refused) << "the session ended";
  EXPECT_EQ(refused->code, Errc::unknown_ticket) << refused->message;
  ASSERT_TRUE(silent.hello(Role::trainer, "silent"));
  EXPECT_EQ(silent.answer().kind, Kind::welcome);
}

// Goal: memory that is being written is not given up, whatever the engine's library does about it.
// Method: a copy thread that never ends its part; an engine that answers its gate and then asks for
// sleep, as refit's own library would not.
TEST_F(ProtocolSettings, SleepInTheMiddleOfAWriteIsRefusedByTheDaemonItself) {
  start_armed("copy.ended=hang");
  RawClient sut = RawClient::joined(socket_, Role::engine, "flux");
  ASSERT_TRUE(sut.send_ticket(1, memory_.get()));
  ASSERT_EQ(register_all(sut, 1)->code, Errc::ok);
  RawClient trainer = RawClient::joined(socket_, Role::trainer, "trainer");
  const UniqueFd source = honest_memfd(kMebibyte, F_SEAL_SHRINK);
  ASSERT_TRUE(trainer.send_ticket(1, source.get()));
  ASSERT_EQ(register_all(trainer, 1)->code, Errc::ok);
  trainer.post(wire::Opcode::refit, refit_message({1, 2}, {{"flux", "m", "m"}}));
  trainer.ring();
  ASSERT_TRUE(eventually(
      [&] { return GateWord::unpack(sut.response().gate.load()).state == GateState::prepare; }));
  const std::uint64_t epoch = GateWord::unpack(sut.response().gate.load()).epoch;
  sut.request().gate_answer.store(AnswerWord{epoch, AnswerState::ready}.pack());
  sut.ring();
  ASSERT_TRUE(eventually(
      [&] { return read_module(sut.response().modules[0]).word.state == ModuleState::writing; }));

  const auto refused = sut.call(wire::Opcode::sleep, empty_message());

  ASSERT_TRUE(refused) << "the session ended";
  EXPECT_EQ(refused->code, Errc::busy) << refused->message;
  EXPECT_NE(refused->message.find("engine flux is being written"), std::string::npos)
      << refused->message;
}

}  // namespace
}  // namespace refit::test
