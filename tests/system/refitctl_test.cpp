// refitctl as an operator uses it: the real tool and the real daemon as processes of their own, on
// a private socket. The test's process is the engine and the trainer, through the client library.
//
// One thread, and one that Engine::serve() owns. Knows the tool by its arguments, texts, JSON and
// exit status alone.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <refit/engine.hpp>
#include <refit/memory.hpp>
#include <refit/observer.hpp>
#include <refit/trainer.hpp>
#include <string>
#include <thread>
#include <vector>

namespace refit {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

constexpr int kPatienceMs = 30'000;
constexpr std::size_t kTensorBytes = 64;
// sha256sum and xxh128sum of 64 times "*".
constexpr const char* kStarsSha256 =
    "4ac5b1038ff9a79b5ed7a8cbbb97f2b658871d6a02c0d12e1aec4bba51ec19d9";
constexpr const char* kStarsXxh3 = "afa9a28f5b7fe2699c7fae802125e66b";

Deadline soon() { return Deadline::in(milliseconds(kPatienceMs)); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

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
  bool default_sigpipe = true;
  bool as_nobody = false;  ///< drops root's rights, which no permission stops
};

// Reads from both ends while writing the input, so that no full pipe stops anybody.
Finished run(const std::string& program, const std::vector<std::string>& arguments,
             const RunOptions& options = {}) {
  Finished finished;
  std::array<int, 2> in{}, out{}, err{};
  if (::pipe2(in.data(), O_CLOEXEC) != 0 || ::pipe2(out.data(), O_CLOEXEC) != 0 ||
      ::pipe2(err.data(), O_CLOEXEC) != 0) {
    ADD_FAILURE() << "pipe2: " << std::strerror(errno);
    return finished;
  }
  std::vector<std::string> words = arguments;
  words.insert(words.begin(), program);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  // Opened before rights are dropped: the build folder may be another user's.
  const int binary = ::open(program.c_str(), O_PATH | O_CLOEXEC);

  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(in[0], STDIN_FILENO);
    ::dup2(options.out_fd >= 0 ? options.out_fd : out[1], STDOUT_FILENO);
    ::dup2(err[1], STDERR_FILENO);
    std::signal(SIGPIPE, options.default_sigpipe ? SIG_DFL : SIG_IGN);
    for (const char* name : {"REFIT_SOCKET", "NO_COLOR"}) ::unsetenv(name);
    for (const auto& [name, value] : options.environment) ::setenv(name.c_str(), value.c_str(), 1);
    if (options.as_nobody && ::geteuid() == 0 && (::setgid(65534) != 0 || ::setuid(65534) != 0)) {
      ::_exit(126);
    }
    ::fexecve(binary, argv.data(), environ);
    ::_exit(127);
  }
  for (const int fd : {in[0], out[1], err[1], binary}) ::close(fd);
  ::fcntl(in[1], F_SETFL, O_NONBLOCK);

  std::size_t written = 0;
  if (options.input.empty()) {
    ::close(in[1]);
    in[1] = -1;
  }
  std::array<pollfd, 3> fds{{{in[1], POLLOUT, 0}, {out[0], POLLIN, 0}, {err[0], POLLIN, 0}}};
  while (fds[1].fd >= 0 || fds[2].fd >= 0) {
    if (::poll(fds.data(), fds.size(), kPatienceMs) <= 0) {
      ADD_FAILURE() << program << " hangs";
      ::kill(pid, SIGKILL);
      break;
    }
    if (fds[0].fd >= 0 && fds[0].revents != 0) {
      const ssize_t count =
          ::write(in[1], options.input.data() + written, options.input.size() - written);
      if (count > 0) written += static_cast<std::size_t>(count);
      if (written == options.input.size() || (count < 0 && errno != EAGAIN)) {
        ::close(in[1]);
        fds[0].fd = in[1] = -1;
      }
    }
    for (const std::size_t i : {std::size_t{1}, std::size_t{2}}) {
      if (fds[i].fd < 0 || fds[i].revents == 0) continue;
      std::array<char, 65536> buffer;
      const ssize_t count = ::read(fds[i].fd, buffer.data(), buffer.size());
      if (count > 0) {
        (i == 1 ? finished.out : finished.err)
            .append(buffer.data(), static_cast<std::size_t>(count));
      } else {
        fds[i].fd = -1;
      }
    }
  }
  for (const int fd : {in[1], out[0], err[0]}) {
    if (fd >= 0) ::close(fd);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  finished.status = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  return finished;
}

/// A daemon on a socket of its own; ended and waited for with the object.
class Daemon {
 public:
  explicit Daemon(std::string socket_path) : socket_path_(std::move(socket_path)) {}
  ~Daemon() { stop(SIGKILL); }
  Daemon(const Daemon&) = delete;
  Daemon& operator=(const Daemon&) = delete;

  void start(const char* program = REFITD_PATH, const std::string& point = "") {
    pid_ = ::fork();
    if (pid_ == 0) {
      if (!point.empty()) ::setenv("REFIT_POINT", point.c_str(), 1);
      ::execl(program, program, "--socket", socket_path_.c_str(), nullptr);
      ::_exit(127);
    }
    ASSERT_GT(pid_, 0);
    const Deadline deadline = soon();
    for (;;) {
      auto probe = Observer::connect("probe", {socket_path_, Waiting::off}, deadline);
      if (probe) return;
      ASSERT_FALSE(deadline.passed()) << probe.error().to_string();
      ASSERT_EQ(::waitpid(pid_, nullptr, WNOHANG), 0) << "the daemon ended at its start";
      std::this_thread::sleep_for(milliseconds(5));
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
      std::this_thread::sleep_for(milliseconds(5));
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
    REFIT_TRY_ASSIGN(Trainer trainer,
                     Trainer::connect("trainer0", {socket_path_, Waiting::off}, soon()));
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

TEST_F(RefitctlSystem, IdleDaemonShowsItself) {
  daemon_->start();

  const Finished text = refitctl({"status"});
  const json root = parsed(refitctl({"status", "--json"}));

  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.err, "");
  EXPECT_TRUE(contains(text.out, "pid " + std::to_string(daemon_->pid()))) << text.out;
  EXPECT_TRUE(contains(text.out, socket_path_)) << text.out;
  EXPECT_TRUE(contains(text.out, "no engine has registered one")) << text.out;
  EXPECT_FALSE(contains(text.out, "\x1b"));
  const json& daemon = root.at("daemon");
  EXPECT_EQ(daemon.at("pid"), daemon_->pid());
  EXPECT_EQ(daemon.at("socket"), socket_path_);
  EXPECT_EQ(daemon.at("draining"), false);
  EXPECT_GT(daemon.at("uptime_us"), 0);
  EXPECT_GT(daemon.at("copy_threads"), 0);
  EXPECT_NE(daemon.at("copy_kernel"), "");
  EXPECT_NE(daemon.at("version"), "");
  EXPECT_TRUE(daemon.at("waiting") == "off" || daemon.at("waiting") == "adaptive" ||
              daemon.at("waiting") == "always");
  EXPECT_EQ(root.at("modules"), json::array());
  EXPECT_TRUE(contains(refitctl({"modules"}).out, "No module is registered"));
}

TEST_F(RefitctlSystem, StatusShowsTheLastRefit) {
  daemon_->start();
  const std::vector<std::string> names{"a", "b"};
  start_engine(names);
  const auto report = refit_once(names, '+');
  ASSERT_TRUE(report) << report.error().to_string();

  const Finished text = refitctl({"status"});
  const json root = parsed(refitctl({"status", "--json"}));

  ASSERT_EQ(text.status, 0) << text.err;
  for (const std::string& part :
       {std::string("engine0/transformer"), std::string("committed"),
        std::string("trainer0/transformer"), report->transaction.to_string().substr(0, 8),
        std::string("WAIT"), std::string("GATE"), std::string("COPY"), std::string("CHECK"),
        std::string("TOTAL")}) {
    EXPECT_TRUE(contains(text.out, part)) << part << "\n" << text.out;
  }
  EXPECT_EQ(root.at("daemon").at("refits"), 1);
  ASSERT_EQ(root.at("modules").size(), 1U);
  const json& module = root.at("modules").at(0);
  EXPECT_EQ(module.at("engine"), "engine0");
  EXPECT_EQ(module.at("module"), "transformer");
  EXPECT_EQ(module.at("state"), "committed");
  EXPECT_EQ(module.at("version"), report->version);
  EXPECT_EQ(module.at("source"), "trainer0/transformer");
  EXPECT_EQ(module.at("transaction"), report->transaction.to_string());
  EXPECT_EQ(module.at("tensors"), 2);
  EXPECT_EQ(module.at("bytes"), 2 * kTensorBytes);
  EXPECT_EQ(module.at("refits"), 1);
  EXPECT_EQ(module.at("populated"), true);
  const json& last = module.at("last_refit");
  EXPECT_EQ(last.at("bytes"), 2 * kTensorBytes);
  for (const char* phase : {"wait_us", "gate_us", "copy_us", "check_us", "total_us"}) {
    EXPECT_GE(last.at(phase), 0) << phase;
  }
  EXPECT_GE(last.at("total_us").get<double>(), last.at("copy_us").get<double>());
  bool engine_listed = false;
  for (const json& session : root.at("sessions")) {
    engine_listed =
        engine_listed || (session.at("role") == "engine" && session.at("name") == "engine0" &&
                          session.at("pid") == ::getpid() && session.at("uid") == ::geteuid() &&
                          session.at("modules") == 1);
  }
  EXPECT_TRUE(engine_listed) << root.at("sessions");
  EXPECT_EQ(parsed(refitctl({"modules", "--json"})).at("modules"), root.at("modules"));
  EXPECT_TRUE(contains(refitctl({"modules"}).out, "engine0/transformer"));
}

TEST_F(RefitctlSystem, TensorsAreListedInOrderOfRegistration) {
  daemon_->start();
  start_engine({"z", "a"});

  const Finished text = refitctl({"tensors", "engine0/transformer"});
  const json root = parsed(refitctl({"tensors", "engine0/transformer", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, "engine0/transformer  2 tensors, 128 B")) << text.out;
  EXPECT_LT(text.out.find("\nz "), text.out.find("\na ")) << text.out;
  EXPECT_TRUE(contains(text.out, "torch.uint8  (8, 8)")) << text.out;
  ASSERT_EQ(root.at("tensors").size(), 2U);
  EXPECT_EQ(root.at("tensors").at(0).at("name"), "z");
  EXPECT_EQ(root.at("tensors").at(1).at("offset_bytes"), kTensorBytes);
  EXPECT_EQ(root.at("tensors").at(1).at("shape"), json({8, 8}));
  EXPECT_EQ(root.at("tensors").at(1).at("bytes"), kTensorBytes);
}

TEST_F(RefitctlSystem, DigestsAreThoseOfOtherTools) {
  daemon_->start();
  start_engine({"a", "b"});
  std::memset(bytes_of(1), '-', kTensorBytes);

  const Finished text =
      refitctl({"digest", "engine0/transformer", "--kind", "raw", "--tensor", "a"});
  const json raw = parsed(refitctl({"digest", "engine0/transformer", "--kind", "raw", "--json"}));
  const json xxh3 = parsed(refitctl({"digest", "engine0/transformer", "--kind", "xxh3", "--json"}));
  const json sglang = parsed(refitctl({"digest", "engine0/transformer", "--module", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, std::string(kStarsSha256) + "  a\n")) << text.out;
  EXPECT_FALSE(contains(text.out, "  b\n")) << text.out;
  EXPECT_EQ(raw.at("tensors").size(), 2U);
  EXPECT_EQ(raw.at("tensors").at("a"), kStarsSha256);
  EXPECT_NE(raw.at("tensors").at("b"), kStarsSha256);
  EXPECT_EQ(raw.at("kind"), "raw");
  EXPECT_TRUE(raw.at("module_digest").is_null());
  EXPECT_EQ(xxh3.at("tensors").at("a"), kStarsXxh3);
  EXPECT_EQ(sglang.at("kind"), "sglang");
  EXPECT_NE(sglang.at("tensors").at("a"), kStarsSha256);
  EXPECT_EQ(sglang.at("module_digest").get<std::string>().size(), 64U);
}

TEST_F(RefitctlSystem, SavedDigestChecksUntilABitChanges) {
  // Goal: `digest --json` is what `check` takes, and check sees a single bit. Method: every kind is
  // saved, checked, and checked again with one bit of one tensor flipped in the engine's memory.
  daemon_->start();
  start_engine({"a", "b", "c"});

  for (const std::vector<std::string>& kind :
       {std::vector<std::string>{"--kind", "sglang"}, {"--kind", "raw"}, {"--module"}}) {
    std::vector<std::string> digest{"digest", "engine0/transformer", "--json"};
    digest.insert(digest.end(), kind.begin(), kind.end());
    const Finished saved = refitctl(digest);
    ASSERT_EQ(saved.status, 0) << saved.err;
    const std::string manifest = file("saved.json", saved.out);

    const Finished same = refitctl({"check", manifest});
    bytes_of(1)[63] ^= std::byte{1};
    const Finished changed = refitctl({"check", manifest});
    const json root = parsed(refitctl({"check", manifest, "--json"}));
    bytes_of(1)[63] ^= std::byte{1};
    RunOptions piped;
    piped.input = saved.out;
    const Finished restored = refitctl({"check", "-"}, piped);

    EXPECT_EQ(same.status, 0) << same.out << same.err;
    EXPECT_TRUE(contains(same.out, "3 of 3 tensors")) << same.out;
    EXPECT_EQ(changed.status, 1);
    EXPECT_TRUE(contains(changed.out, "FAILED")) << changed.out;
    EXPECT_TRUE(contains(changed.out, "mismatched 1\n  b\n")) << changed.out;
    EXPECT_EQ(root.at("ok"), false);
    EXPECT_EQ(root.at("equal"), 2);
    EXPECT_EQ(root.at("mismatched"), json({"b"}));
    EXPECT_EQ(root.at("missing"), json::array());
    EXPECT_EQ(root.at("module_equal"), kind[0] == "--module" ? json(false) : json());
    EXPECT_EQ(restored.status, 0) << restored.out << restored.err;
  }
}

TEST_F(RefitctlSystem, Xxh3IsNoCheck) {
  daemon_->start();
  start_engine({"a"});
  const Finished saved = refitctl({"digest", "engine0/transformer", "--kind", "xxh3", "--json"});
  ASSERT_EQ(saved.status, 0) << saved.err;

  const Finished sut = refitctl({"check", file("xxh3.json", saved.out)});

  EXPECT_EQ(sut.status, 2);
  EXPECT_TRUE(contains(sut.err, "proves nothing")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "--kind sglang")) << sut.err;
}

TEST_F(RefitctlSystem, PlainManifestIsCheckedAgainstTheTargetGiven) {
  daemon_->start();
  start_engine({"a", "b"});
  const json plain = {{"a", kStarsSha256}, {"nowhere", kStarsSha256}};
  const std::string with_missing = file("missing.json", plain.dump());
  const std::string partial = file("partial.json", json{{"a", kStarsSha256}}.dump());

  const Finished missing =
      refitctl({"check", with_missing, "--target", "engine0/transformer", "--kind", "raw"});
  const Finished some = refitctl({"check", "engine0/transformer", partial, "--kind", "raw"});
  const Finished homeless = refitctl({"check", partial});

  EXPECT_EQ(missing.status, 1);
  EXPECT_TRUE(contains(missing.out, "missing 1\n  nowhere\n")) << missing.out;
  EXPECT_EQ(some.status, 0) << some.out << some.err;
  EXPECT_TRUE(contains(some.out, "1 tensor of the module not in the manifest")) << some.out;
  EXPECT_EQ(homeless.status, 2);
  EXPECT_TRUE(contains(homeless.err, "names no engine and module")) << homeless.err;
  EXPECT_TRUE(contains(homeless.err, partial)) << homeless.err;
}

TEST_F(RefitctlSystem, PoisonedModuleFailsCheckAndDigest) {
  // Goal: bytes that may be a mix are never a good answer, even if they equal what is expected.
  // Method: a daemon of the test build dies between the first byte and the commit; the next daemon
  // learns of it from the engine.
  const std::vector<std::string> names{"a", "b"};
  daemon_->start(REFITD_TEST_PATH, "writing.half=kill");
  start_engine(names);
  const Finished saved = refitctl({"digest", "engine0/transformer", "--json"});
  ASSERT_EQ(saved.status, 0) << saved.err;
  const std::string manifest = file("saved.json", saved.out);
  ASSERT_FALSE(refit_once(names, '+'));
  ASSERT_TRUE(daemon_->killed_itself()) << "the point was not hit";
  daemon_->start();
  trainer_.reset();
  const auto reconnected = engine_->reconnect(soon());
  ASSERT_TRUE(reconnected) << reconnected.error().to_string();
  // The same bytes as when they were saved: only the state differs.
  std::memset(memory_->data(), '*', names.size() * kTensorBytes);

  const Finished check = refitctl({"check", manifest});
  const Finished digest = refitctl({"digest", "engine0/transformer"});
  const json status_root = parsed(refitctl({"status", "--json"}));

  EXPECT_EQ(check.status, 1) << check.out << check.err;
  EXPECT_TRUE(contains(check.out, "poisoned")) << check.out;
  EXPECT_TRUE(contains(check.out, "FAILED")) << check.out;
  EXPECT_EQ(digest.status, 1) << digest.out << digest.err;
  EXPECT_TRUE(contains(digest.out, "the module is not whole")) << digest.out;
  EXPECT_EQ(status_root.at("modules").at(0).at("state"), "poisoned");
}

TEST_F(RefitctlSystem, WhatIsNotThereIsNamed) {
  daemon_->start();
  start_engine({"a"});

  const Finished engine = refitctl({"tensors", "nobody/transformer"});
  const Finished module = refitctl({"digest", "engine0/vae"});
  const Finished tensor = refitctl({"digest", "engine0/transformer", "--tensor", "nowhere"});
  const Finished as_json = refitctl({"tensors", "nobody/transformer", "--json"});

  EXPECT_EQ(engine.status, 1);
  EXPECT_TRUE(contains(engine.err, "nobody")) << engine.err;
  EXPECT_TRUE(contains(engine.err, "refitctl modules")) << engine.err;
  EXPECT_EQ(engine.out, "");
  EXPECT_EQ(module.status, 1);
  EXPECT_TRUE(contains(module.err, "vae")) << module.err;
  EXPECT_NE(tensor.status, 0);
  EXPECT_TRUE(contains(tensor.err, "nowhere")) << tensor.err;
  EXPECT_TRUE(contains(tensor.err, "refitctl tensors")) << tensor.err;
  EXPECT_EQ(as_json.status, 1);
  EXPECT_EQ(as_json.out, "");
  const json error = json::parse(as_json.err).at("error");
  EXPECT_EQ(error.at("code"), "no_such_engine");
  EXPECT_EQ(error.at("exit"), 1);
  EXPECT_TRUE(contains(error.at("message"), "nobody"));
}

TEST_F(RefitctlSystem, NameThatReordersTextIsWrittenOutAndStillChecked) {
  // The daemon refuses control characters; what reorders text is a letter to it.
  daemon_->start();
  start_engine({"odd\u202e\u540d\\"});

  for (const char* command : {"tensors", "digest"}) {
    const Finished sut = refitctl({command, "engine0/transformer"});

    EXPECT_EQ(sut.status, 0) << sut.err;
    EXPECT_TRUE(contains(sut.out, "odd\\u{202e}\u540d\\\\")) << sut.out;
    EXPECT_FALSE(contains(sut.out, "\u202e"));
  }
  RunOptions piped;
  piped.input = refitctl({"digest", "engine0/transformer", "--json"}).out;
  const Finished checked = refitctl({"check", "-"}, piped);
  EXPECT_EQ(checked.status, 0) << checked.out << checked.err;
}

TEST_F(RefitctlSystem, MissingDaemonSaysHowToStartOne) {
  const Finished absent = refitctl({"status"});
  const Finished as_json = refitctl({"status", "--json"});
  daemon_->start();
  daemon_->stop(SIGKILL);
  const Finished dead = refitctl({"status"});

  for (const Finished& sut : {absent, dead}) {
    EXPECT_EQ(sut.status, 1);
    EXPECT_EQ(sut.out, "");
    EXPECT_TRUE(contains(sut.err, "refitd --socket " + socket_path_)) << sut.err;
    EXPECT_TRUE(contains(sut.err, "REFIT_SOCKET")) << sut.err;
  }
  EXPECT_EQ(json::parse(as_json.err).at("error").at("native"), ENOENT);
}

TEST_F(RefitctlSystem, StoppedDaemonEndsInTheTimeout) {
  daemon_->start();
  daemon_->suspend();

  const Finished sut = refitctl({"status", "--timeout", "0.2"});
  ::kill(daemon_->pid(), SIGCONT);

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "no answer within 0.2 s")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "--timeout")) << sut.err;
}

TEST_F(RefitctlSystem, SocketOfAnotherIsAMatterOfPermission) {
  daemon_->start();
  ASSERT_EQ(::chmod(socket_path_.c_str(), 0), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"status"}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, socket_path_)) << sut.err;
  EXPECT_TRUE(contains(sut.err, "ls -l")) << sut.err;
}

TEST_F(RefitctlSystem, UnreadableManifestIsAMatterOfPermission) {
  const std::string manifest = file("secret.json", "{}");
  ASSERT_EQ(::chmod(manifest.c_str(), 0), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"check", manifest}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, manifest)) << sut.err;
}

TEST_F(RefitctlSystem, BadArgumentsAreToldBeforeTheDaemonIsAsked) {
  // No daemon runs: whatever reached for one would say so and end with 1.
  const std::string broken = file("broken.json", "{\"a\": \"xyz\"}");
  const std::string no_json = file("no.json", "weights");
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{}, "a command is missing"},
      {{"stats"}, "\"stats\""},
      {{"status", "--colour"}, "--colour"},
      {{"status", "--timeout", "0"}, "--timeout"},
      {{"tensors"}, "ENGINE/MODULE"},
      {{"tensors", "engine0"}, "\"engine0\""},
      {{"digest", "e/m", "--kind", "md5"}, "md5"},
      {{"check"}, "MANIFEST.json"},
      {{"check", folder_ + "/absent.json"}, "absent.json"},
      {{"check", folder_}, "directory"},
      {{"check", broken}, "\"a\""},
      {{"check", no_json}, "not JSON"},
  };

  for (const auto& [arguments, part] : cases) {
    const Finished sut = refitctl(arguments);

    EXPECT_EQ(sut.status, 2) << part << "\n" << sut.err;
    EXPECT_EQ(sut.out, "");
    EXPECT_TRUE(contains(sut.err, part)) << part << "\n" << sut.err;
  }
  const Finished as_json = refitctl({"status", "--colour", "--json"});
  EXPECT_EQ(json::parse(as_json.err).at("error").at("exit"), 2);
  const Finished no_socket = run(REFITCTL_PATH, {"--socket", broken, "status"});
  EXPECT_EQ(no_socket.status, 2) << no_socket.err;
}

TEST_F(RefitctlSystem, UnusableEnvironmentIsABadConfiguration) {
  RunOptions options;
  options.environment["REFIT_SOCKET"] = "/" + std::string(200, 's');
  const Finished too_long = run(REFITCTL_PATH, {"status"}, options);
  options.environment["REFIT_SOCKET"] = file("plain", "no socket");
  const Finished no_socket = run(REFITCTL_PATH, {"status"}, options);

  EXPECT_EQ(too_long.status, 6) << too_long.err;
  EXPECT_TRUE(contains(too_long.err, "REFIT_SOCKET")) << too_long.err;
  EXPECT_EQ(no_socket.status, 6) << no_socket.err;
  EXPECT_TRUE(contains(no_socket.err, "REFIT_SOCKET")) << no_socket.err;
}

TEST_F(RefitctlSystem, EnvironmentNamesTheSocket) {
  daemon_->start();
  RunOptions options;
  options.environment["REFIT_SOCKET"] = socket_path_;

  const Finished sut = run(REFITCTL_PATH, {"status"}, options);

  EXPECT_EQ(sut.status, 0) << sut.err;
  EXPECT_TRUE(contains(sut.out, socket_path_)) << sut.out;
}

TEST_F(RefitctlSystem, HelpAndVersionNeedNoDaemon) {
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"--help"},
                                                    {"--version"},
                                                    {"status", "--help"},
                                                    {"modules", "--help"},
                                                    {"tensors", "--help"},
                                                    {"digest", "--help"},
                                                    {"check", "--help"}}) {
    const Finished sut = refitctl(arguments);

    EXPECT_EQ(sut.status, 0);
    EXPECT_EQ(sut.err, "");
    EXPECT_NE(sut.out, "");
  }
}

TEST_F(RefitctlSystem, ReaderThatWentAwayIsQuiet) {
  // Whether SIGPIPE was inherited as ignored (services, scripts) or not (shells).
  for (const bool default_sigpipe : {true, false}) {
    std::array<int, 2> fds{};
    ASSERT_EQ(::pipe2(fds.data(), O_CLOEXEC), 0);
    ::close(fds[0]);
    RunOptions options;
    options.out_fd = fds[1];
    options.default_sigpipe = default_sigpipe;

    const Finished sut = refitctl({"--help"}, options);
    ::close(fds[1]);

    EXPECT_EQ(sut.status, 0);
    EXPECT_EQ(sut.err, "");
  }
}

TEST_F(RefitctlSystem, OutputThatCannotBeWrittenIsAnError) {
  RunOptions options;
  options.out_fd = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(options.out_fd, 0);

  const Finished sut = refitctl({"--help"}, options);
  ::close(options.out_fd);

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "cannot write the output")) << sut.err;
}

TEST_F(RefitctlSystem, ColoursAreForTerminalsOnly) {
  // Goal: a terminal gets them, unless NO_COLOR is set; a pipe never. Method: standard output is a
  // pseudo terminal, whose other end is read after the tool ended; its text is far below what the
  // terminal holds.
  daemon_->start();
  const auto on_terminal = [this](std::map<std::string, std::string> environment) {
    int master = -1;
    int terminal = -1;
    EXPECT_EQ(::openpty(&master, &terminal, nullptr, nullptr, nullptr), 0);
    RunOptions options;
    options.out_fd = terminal;
    options.environment = std::move(environment);
    EXPECT_EQ(refitctl({"status"}, options).status, 0);
    std::array<char, 8192> buffer{};
    const ssize_t count = ::read(master, buffer.data(), buffer.size());
    ::close(terminal);
    ::close(master);
    return std::string(buffer.data(), count > 0 ? static_cast<std::size_t>(count) : 0);
  };

  EXPECT_TRUE(contains(on_terminal({{"TERM", "xterm"}}), "\x1b["));
  const std::string plain = on_terminal({{"TERM", "xterm"}, {"NO_COLOR", "1"}});
  EXPECT_TRUE(contains(plain, "refitd"));
  EXPECT_FALSE(contains(plain, "\x1b"));
  EXPECT_FALSE(contains(on_terminal({{"TERM", "dumb"}}), "\x1b"));
}

}  // namespace
}  // namespace refit
