// A trainer of another uid is refused by name, and nothing else is touched.
//
// Needs root, to become somebody else; says so where it cannot run, which is no pass.

#include <sys/stat.h>
#include <unistd.h>

#include "support/client_process.hpp"
#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

class ForeignUid : public DaemonTest {};

// Goal: the daemon's refusal names both uids. Method: socket and directory are opened to everybody,
// so that only the daemon can refuse; the trainer's process really changes its uid.
TEST_F(ForeignUid, TrainerIsRefusedNamingBothUids) {
  if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can start a trainer of another uid";
  start();
  ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
  ASSERT_EQ(::chmod(socket_.c_str(), 0666), 0);
  auto target = model_of(small_tensors(), 30);
  auto old_bytes = model_of(small_tensors(), 30);
  Engine engine = make_engine("flux", *target);
  ClientProcess sut;
  ASSERT_EQ(sut.ask("setuid 65534"), "ok");
  ASSERT_EQ(sut.ask("trainer stranger " + socket_), "ok");
  ASSERT_EQ(sut.ask("module transformer 31"), "ok");
  const std::string answer = sut.ask("refit flux transformer 5000");
  EXPECT_EQ(answer.rfind("error permission", 0), 0U) << answer;
  EXPECT_NE(answer.find("65534"), std::string::npos) << answer;
  EXPECT_NE(answer.find("uid 0"), std::string::npos) << answer;
  EXPECT_TRUE(target->equals(*old_bytes));
  EXPECT_EQ(engine.version("transformer"), 0U);

  // The same name is free for an engine of the other uid: names are unique per uid.
  ClientProcess other;
  ASSERT_EQ(other.ask("setuid 65534"), "ok");
  EXPECT_EQ(other.ask("engine flux " + socket_), "ok");

  auto source = model_of(small_tensors(), 32);
  Trainer trainer = make_trainer(*source);
  engine.bind_to_this_thread();
  EXPECT_TRUE(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(target->equals(*source));
}

// Goal: without being let in by the file system, another uid gets a message that says what to do.
TEST_F(ForeignUid, SocketThatIsClosedToItSaysSo) {
  if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can start a trainer of another uid";
  start();
  ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
  ClientProcess sut;
  ASSERT_EQ(sut.ask("setuid 65534"), "ok");
  const std::string answer = sut.ask("trainer stranger " + socket_);
  EXPECT_EQ(answer.rfind("error permission", 0), 0U) << answer;
  EXPECT_NE(answer.find(socket_), std::string::npos) << answer;
}

}  // namespace
}  // namespace refit::test
