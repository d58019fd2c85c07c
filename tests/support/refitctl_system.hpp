// RefitctlSystem: refitctl as an operator uses it. The real tool and the real daemon are processes
// of their own, on a private socket; the test's process is the engine and the trainer.
//
// One thread. Knows the tool by its arguments, texts, JSON and exit status alone.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <refit/engine.hpp>
#include <refit/memory.hpp>
#include <refit/observer.hpp>
#include <refit/trainer.hpp>
#include <string>
#include <thread>
#include <vector>

#include "support/text.hpp"

namespace refit::test {

using nlohmann::json;

inline constexpr int kPatienceMs = 30'000;
inline constexpr std::size_t kTensorBytes = 64;
inline Deadline soon() { return Deadline::in(std::chrono::milliseconds(kPatienceMs)); }

/// What a finished process left. `status` is the exit status, or 1000 + the signal that ended it.
struct Finished {
  int status = -1;
  std::string out;
  std::string err;
};

struct RunOptions {
  std::string input;
  std::map<std::string, std::string> environment;
  int out_fd = -1;  ///< standard output goes there instead of into Finished::out
  int err_fd = -1;  ///< likewise
  bool default_sigpipe = true;
  bool as_nobody = false;  ///< drops root's rights, which no permission stops
};

Finished run(const std::string& program, const std::vector<std::string>& arguments,
             const RunOptions& options = {});

/// A daemon on a socket of its own; ended and waited for with the object.
class Daemon {
 public:
  explicit Daemon(std::string socket_path) : socket_path_(std::move(socket_path)) {}
  ~Daemon() { stop(SIGKILL); }
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  void start(const char* program = REFITD_PATH, const std::string& point = "",
             const std::vector<std::string>& more = {}) {
    std::vector<std::string> words{program, "--socket", socket_path_};
    words.insert(words.end(), more.begin(), more.end());
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    pid_ = ::fork();
    if (pid_ == 0) {
      if (!point.empty()) ::setenv("REFIT_POINT", point.c_str(), 1);
      ::execv(program, argv.data());
      ::_exit(127);
    }
    ASSERT_GT(pid_, 0);
    const Deadline deadline = soon();
    for (;;) {
      auto probe = Observer::connect("probe", {socket_path_, Waiting::off}, deadline);
      if (probe) return;
      ASSERT_FALSE(deadline.passed()) << probe.error().to_string();
      ASSERT_EQ(::waitpid(pid_, nullptr, WNOHANG), 0) << "the daemon ended at its start";
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  void stop(int signal) {
    if (pid_ <= 0) return;
    ::kill(pid_, SIGCONT);
    ::kill(pid_, signal);
    ::waitpid(pid_, nullptr, 0);
    pid_ = -1;
  }

  /// Stands still when this returns.
  void suspend() {
    ::kill(pid_, SIGSTOP);
    ::waitpid(pid_, nullptr, WUNTRACED);
  }

  /// True once it died of SIGKILL that it sent itself.
  bool killed_itself() {
    const std::optional<int> status = wait();
    return status && WIFSIGNALED(*status) && WTERMSIG(*status) == SIGKILL;
  }

  /// Waits until it has ended with status 0, told by somebody else.
  bool ended_well() {
    const std::optional<int> status = wait();
    return status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0;
  }

  /// Asks it to end; true if it did so with status 0, or was not running.
  bool ends_well() {
    if (pid_ <= 0) return true;
    ::kill(pid_, SIGTERM);
    const std::optional<int> status = wait();
    return status && WIFEXITED(*status) && WEXITSTATUS(*status) == 0;
  }

  [[nodiscard]] pid_t pid() const { return pid_; }

 private:
  // What waitpid() said, or nothing if it runs on.
  std::optional<int> wait() {
    int status = 0;
    const Deadline deadline = soon();
    while (::waitpid(pid_, &status, WNOHANG) == 0) {
      if (deadline.passed()) return std::nullopt;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    pid_ = -1;
    return status;
  }

  std::string socket_path_;
  pid_t pid_ = -1;
};

class RefitctlSystem : public testing::Test {
 protected:
  void SetUp() override {
    // A folder of a short name, because a socket's path has 107 bytes; others may pass through it.
    std::string path = "/tmp/refitctl-test-XXXXXX";
    ASSERT_NE(::mkdtemp(path.data()), nullptr);
    folder_ = path;
    ASSERT_EQ(::chmod(folder_.c_str(), 0755), 0);
    socket_path_ = folder_ + "/refitd.sock";
    daemon_.emplace(socket_path_);
  }

  void TearDown() override {
    trainer_.reset();
    engine_.reset();
    EXPECT_TRUE(!daemon_ || daemon_->ends_well());
    daemon_.reset();
    std::error_code ignored;
    if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
  }

  Finished refitctl(std::vector<std::string> arguments, const RunOptions& options = {}) {
    arguments.insert(arguments.begin(), {"--socket", socket_path_});
    return run(REFITCTL_PATH, arguments, options);
  }

  static json parsed(const Finished& finished) {
    json root = json::parse(finished.out, nullptr, false);
    EXPECT_FALSE(root.is_discarded()) << "no JSON: " << finished.out << finished.err;
    return root;
  }

  std::string file(const std::string& name, const std::string& content) {
    std::string path = folder_ + "/" + name;
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  std::byte* bytes_of(std::size_t tensor) { return memory_->data() + tensor * kTensorBytes; }

  /// Registers engine0/transformer: uint8 tensors of 64 bytes, every one full of "*".
  void start_engine(const std::vector<std::string>& names) {
    auto memory = SharedMemory::allocate(names.size() * kTensorBytes, "engine");
    ASSERT_TRUE(memory) << memory.error().to_string();
    memory_ = *memory;
    std::memset(memory_->data(), '*', names.size() * kTensorBytes);
    ModuleSpec spec("transformer");
    for (std::size_t i = 0; i < names.size(); ++i) {
      ASSERT_TRUE(spec.add(names[i], DType::uint8, {8, 8}, memory_, bytes_of(i)));
    }
    auto engine = Engine::connect("engine0", {socket_path_, Waiting::off}, soon());
    ASSERT_TRUE(engine) << engine.error().to_string();
    engine_.emplace(std::move(*engine));
    const auto registered = engine_->register_module(spec, soon());
    ASSERT_TRUE(registered) << registered.error().to_string();
  }

  /// Registers the same tensors at a trainer, every one full of `fill`, and refits once.
  Result<RefitReport> refit_once(const std::vector<std::string>& names, char fill) {
    auto memory = SharedMemory::allocate(names.size() * kTensorBytes, "trainer");
    if (!memory) return Unexpected(memory.error());
    std::memset((*memory)->data(), fill, names.size() * kTensorBytes);
    ModuleSpec spec("transformer");
    for (std::size_t i = 0; i < names.size(); ++i) {
      REFIT_TRY(
          spec.add(names[i], DType::uint8, {8, 8}, *memory, (*memory)->data() + i * kTensorBytes));
    }
    REFIT_TRY_ASSIGN(
        Trainer trainer,
        Trainer::connect("trainer0", {socket_path_, Waiting::off, /*reconnect=*/false}, soon()));
    REFIT_TRY(trainer.register_module(spec, soon()));
    trainer_.emplace(std::move(trainer));
    engine_->bind_to_this_thread();
    RefitTarget target;
    target.engine = "engine0";
    target.module = "transformer";
    return trainer_->refit(target, soon());
  }

  std::string folder_;
  std::string socket_path_;
  std::optional<Daemon> daemon_;
  std::shared_ptr<SharedMemory> memory_;
  std::optional<Engine> engine_;
  std::optional<Trainer> trainer_;
};

}  // namespace refit::test
