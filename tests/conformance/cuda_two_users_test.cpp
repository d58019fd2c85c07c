// Device memory of one user in a daemon of another: the client is uid 12345, the daemon is root.
//
// Method: this very test, started anew, becomes the other user before it calls the driver, is
// trainer and engine at once and compares the bytes itself. What a driver does with handles across
// users is not documented, and the fake one can do either; a real one's answer is printed
// (scripts/gpu-check records it), and each answer but wrong bytes is a right one: segments by fd
// must be refitted, with or without a fence, and legacy memory may be refused.

#include <grp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <fstream>

#include "conformance/refit_fixture.hpp"
#include "support/cuda/driver.hpp"
#include "support/line_reader.hpp"
#include "support/started_anew.hpp"

namespace refit::test {
namespace {

constexpr uid_t kStranger = 12345;

/// One refit as whoever this process is: "right", or what went wrong instead.
std::string refit_as_oneself(const std::string& socket, MemoryKind kind, bool with_fence) {
  const auto soon = [] { return Deadline::in(std::chrono::seconds(20)); };
  const auto tensors = small_tensors();
  const auto make = [&] {
    return Model("transformer", tensors, make_storage(kind, Model::sizes_of(tensors)));
  };
  Model source = make();
  Model target = make();
  for (Model* model : {&source, &target}) {
    if (!with_fence) model->spec().set_fence(nullptr);
  }
  source.fill(1);
  source.settle();
  auto trainer = Trainer::connect("trainer", {socket}, soon());
  auto engine = Engine::connect("flux", {socket}, soon());
  if (!trainer) return "refused: " + trainer.error().to_string();
  if (!engine) return "refused: " + engine.error().to_string();
  if (auto taken = trainer->register_module(source.spec(), soon()); !taken)
    return "refused: " + taken.error().to_string();
  if (auto taken = engine->register_module(target.spec(), soon()); !taken)
    return "refused: " + taken.error().to_string();
  engine->bind_to_this_thread();
  const auto report = trainer->refit({"flux", "transformer"}, soon());
  if (!report) return "refused: " + report.error().to_string();
  return target.equals(source) ? "right" : "wrong bytes";
}

constexpr const char* kMark = "REFIT_TEST_CUDA_STRANGER";  // the fd that it writes to
constexpr const char* kSocket = "REFIT_TEST_CUDA_SOCKET";

/// The whole life of the other user's process.
[[noreturn]] void be_stranger(MemoryKind kind) {
  if (::setgroups(0, nullptr) != 0 || ::setgid(kStranger) != 0 || ::setuid(kStranger) != 0)
    std::_Exit(1);
  // As a process that this user has started: to become one leaves /proc/PID root's.
  ::prctl(PR_SET_DUMPABLE, 1);
  const int to = std::atoi(std::getenv(kMark));
  for (const bool with_fence : {true, false}) {
    std::string line = refit_as_oneself(std::getenv(kSocket), kind, with_fence);
    for (char& c : line) c = c == '\n' ? ' ' : c;
    line += '\n';
    if (::write(to, line.data(), line.size()) != static_cast<ssize_t>(line.size())) std::_Exit(1);
  }
  std::_Exit(0);
}

/// Started as the running test, whose SetUp() lets it be that.
class Stranger {
 public:
  explicit Stranger(const std::string& socket)
      : process_(kMark, {{kSocket, socket}}, {"--gtest_filter=" + name_of_this_test()}) {
    from_.adopt(process_.from.release());
  }
  std::string hear() { return from_.next(); }

 private:
  static std::string name_of_this_test() {
    const auto* const test = ::testing::UnitTest::GetInstance()->current_test_info();
    return std::string(test->test_suite_name()) + "." + test->name();
  }

  StartedAnew process_;
  LineReader from_;
};

class CudaUsers : public ::testing::TestWithParam<MemoryKind> {
 protected:
  void SetUp() override {
    if (std::getenv(kMark) != nullptr) be_stranger(GetParam());
    if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can be several users";
    ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
    std::ofstream(config_) << "[cuda]\nlegacy_across_uids = true\n";
  }
  void TearDown() override { ::unsetenv("FAKECUDA_FOREIGN_UID"); }

  /// The stranger's answers, with a fence and without one.
  std::vector<std::string> ask() {
    DaemonOptions how;
    how.arguments = {"--config", config_};
    DaemonProcess daemon(socket_, how);
    EXPECT_EQ(::chmod(socket_.c_str(), 0666), 0);
    std::vector<std::string> answers;
    {
      Stranger stranger(socket_);
      for (int i = 0; i < 2; ++i) answers.push_back(stranger.hear());
    }
    daemon.send_signal(SIGTERM);
    EXPECT_EQ(daemon.wait_end(20'000), 0);
    std::printf("with a fence: %s\nwithout one: %s\n", answers[0].c_str(), answers[1].c_str());
    return answers;
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  std::string config_ = directory_.path() + "/refitd.toml";
};

bool is_refusal_of(const std::string& answer, const std::string& call) {
  return answer.rfind("refused: ", 0) == 0 && answer.find(call) != std::string::npos;
}

TEST_P(CudaUsers, MemoryIsRefittedOrRefusedByTheNameOfTheCall) {
  ::setenv("FAKECUDA_FOREIGN_UID", "allow", 1);
  const auto answers = ask();
  const bool legacy = GetParam() == MemoryKind::cuda_legacy;
  EXPECT_TRUE(answers[0] == "right" || is_refusal_of(answers[0], "cuIpcOpenEventHandle") ||
              (legacy && is_refusal_of(answers[0], "cuIpcOpenMemHandle")))
      << answers[0];
  EXPECT_TRUE(answers[1] == "right" || (legacy && is_refusal_of(answers[1], "cuIpcOpenMemHandle")))
      << answers[1];
  if (cuda::Driver::fake()) {
    EXPECT_EQ(answers, (std::vector<std::string>{"right", "right"}));
  }
}

TEST_P(CudaUsers, DriverThatKeepsHandlesToOneUserIsNamedInTheRefusal) {
  REFIT_FAKE_ONLY("a driver that is told to refuse");
  const auto answers = ask();
  if (GetParam() == MemoryKind::cuda_legacy) {
    for (const std::string& answer : answers)
      EXPECT_TRUE(is_refusal_of(answer, "cuIpcOpenMemHandle")) << answer;
  } else {
    EXPECT_TRUE(is_refusal_of(answers[0], "cuIpcOpenEventHandle")) << answers[0];
    EXPECT_EQ(answers[1], "right");
  }
}

INSTANTIATE_TEST_SUITE_P(Memory, CudaUsers, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
