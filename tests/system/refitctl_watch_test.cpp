// `refitctl status --watch` against a live daemon: on a pseudo terminal it redraws, in a pipe it
// appends, and a daemon that restarts is waited for.
//
// One thread; the tool runs beside it, and what it writes is awaited part by part.
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "refitctl/format/frame.hpp"
#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

/// A watch that runs beside the test.
class Watch {
 public:
  enum class Output { pipe, terminal };

  Watch(std::vector<std::string> arguments, Output output) {
    arguments.insert(arguments.begin(), REFITCTL_PATH);
    std::vector<char*> argv;
    for (std::string& word : arguments) argv.push_back(word.data());
    argv.push_back(nullptr);
    std::array<int, 2> fds{};
    if (output == Output::pipe) {
      EXPECT_EQ(::pipe2(fds.data(), O_CLOEXEC), 0);
    } else {
      winsize size{10, 40, 0, 0};
      EXPECT_EQ(::openpty(&fds[0], &fds[1], nullptr, nullptr, &size), 0);
    }
    reader_ = fds[0];
    pid_ = ::fork();
    if (pid_ == 0) {
      ::close(fds[0]);
      ::setsid();
      if (output == Output::terminal) ::ioctl(fds[1], TIOCSCTTY, 0);
      ::dup2(fds[1], STDOUT_FILENO);
      ::setenv("TERM", "xterm", 1);
      ::unsetenv("NO_COLOR");
      ::execv(argv[0], argv.data());
      ::_exit(127);
    }
    ::close(fds[1]);
  }
  ~Watch() {
    close_reader();
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  /// Reads on until `part` was written after what was awaited before; true if it was.
  bool await(const std::string& part) {
    for (const Deadline deadline = soon();;) {
      const std::size_t found = text_.find(part, seen_);
      if (found != std::string::npos) {
        seen_ = found + part.size();
        return true;
      }
      if (!read_some(deadline)) return false;
    }
  }
  /// Its exit status after `signal` (0: none), with everything that it wrote read; -1 if it hangs.
  int end(int signal) {
    if (signal != 0) ::kill(pid_, signal);
    while (reader_ >= 0 && read_some(soon())) {
    }
    int status = -1;
    for (const Deadline deadline = soon(); ::waitpid(pid_, &status, WNOHANG) != pid_;) {
      if (deadline.passed()) return -1;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  }
  void resize(unsigned short rows, unsigned short columns) const {
    const winsize size{rows, columns, 0, 0};
    EXPECT_EQ(::ioctl(reader_, TIOCSWINSZ, &size), 0);
  }
  void type(const std::string& keys) const {
    EXPECT_EQ(::write(reader_, keys.data(), keys.size()), static_cast<ssize_t>(keys.size()));
  }
  void close_reader() {
    if (reader_ >= 0) ::close(std::exchange(reader_, -1));
  }
  [[nodiscard]] const std::string& text() const { return text_; }
  [[nodiscard]] pid_t pid() const { return pid_; }

 private:
  bool read_some(Deadline deadline) {
    pollfd entry{reader_, POLLIN, 0};
    if (::poll(&entry, 1, deadline.remaining_ms()) <= 0) return false;
    std::array<char, 65536> buffer;
    const ssize_t count = ::read(reader_, buffer.data(), buffer.size());
    if (count <= 0) return false;
    text_.append(buffer.data(), static_cast<std::size_t>(count));
    return true;
  }

  int reader_ = -1;
  pid_t pid_ = -1;
  std::string text_;
  std::size_t seen_ = 0;
};

class RefitctlWatch : public RefitctlSystem {
 protected:
  [[nodiscard]] std::vector<std::string> arguments(std::vector<std::string> more = {}) const {
    std::vector<std::string> all{"--socket", socket_path_, "status", "--watch", "0.1"};
    all.insert(all.end(), more.begin(), more.end());
    return all;
  }
  std::size_t observer_count() {
    std::size_t count = 0;
    auto observer = Observer::connect("counter", {socket_path_, Waiting::off}, soon());
    EXPECT_TRUE(observer);
    const auto status = observer->status(soon());
    for (const SessionStatus& session : status->sessions)
      count += session.name == "refitctl" ? 1U : 0U;
    return count;
  }
};

TEST_F(RefitctlWatch, PipeGetsLinesOfWhatChanges) {
  // Goal: a refit between two turns is in the second, over one session. Method: the session's id is
  // that of the tool's first one as long as it runs.
  daemon_->start();
  start_engine({"a"});
  Watch sut(arguments(), Watch::Output::pipe);
  ASSERT_TRUE(sut.await("engine0/transformer state=initial version=0 refits=0\n")) << sut.text();

  ASSERT_TRUE(refit_once({"a"}, '+'));
  const bool seen = sut.await("engine0/transformer state=committed version=1 refits=1");
  const bool and_again = sut.await("refitd pid=") && sut.await("refitd pid=");
  const std::size_t sessions = observer_count();

  EXPECT_TRUE(seen) << sut.text();
  EXPECT_TRUE(and_again) << sut.text();
  EXPECT_EQ(sessions, 1U);
  EXPECT_EQ(sut.end(SIGINT), 0);
  EXPECT_FALSE(contains(sut.text(), "\x1b"));
}

TEST_F(RefitctlWatch, DaemonThatRestartsIsWaitedFor) {
  daemon_->start();
  const std::string first = std::to_string(daemon_->pid());
  Watch sut(arguments(), Watch::Output::pipe);
  ASSERT_TRUE(sut.await("refitd pid=" + first)) << sut.text();

  daemon_->stop(SIGKILL);
  const bool gone = sut.await("the daemon is gone, since");
  daemon_->start();
  const std::string second = std::to_string(daemon_->pid());
  const bool told = sut.await("pid " + first + " before, " + second + " now\n");
  const bool back = sut.await("refitd pid=" + second);

  EXPECT_TRUE(gone) << sut.text();
  EXPECT_TRUE(told) << sut.text();
  EXPECT_TRUE(back) << sut.text();
  EXPECT_EQ(sut.end(SIGTERM), 0);
}

TEST_F(RefitctlWatch, DaemonThatStandsStillIsNotGone) {
  // Goal: a stopped daemon is told from a dead one, keeps its session, and Ctrl-C is heard
  // meanwhile.
  daemon_->start();
  Watch sut(arguments(), Watch::Output::pipe);
  ASSERT_TRUE(sut.await("refitd pid="));

  daemon_->suspend();
  const bool silent = sut.await("the daemon does not answer, since");
  ::kill(daemon_->pid(), SIGCONT);
  const bool back = sut.await("refitd pid=");

  EXPECT_TRUE(silent) << sut.text();
  EXPECT_TRUE(back) << sut.text();
  EXPECT_EQ(observer_count(), 1U);
  EXPECT_FALSE(contains(sut.text(), "restarted"));
  EXPECT_EQ(sut.end(SIGINT), 0);
}

TEST_F(RefitctlWatch, JsonIsOneObjectATurn) {
  daemon_->start();
  Watch sut(arguments({"--json"}), Watch::Output::pipe);
  ASSERT_TRUE(sut.await("\n"));
  daemon_->stop(SIGKILL);
  ASSERT_TRUE(sut.await("\"error\"")) << sut.text();
  ASSERT_TRUE(sut.await("\n"));
  ASSERT_EQ(sut.end(SIGINT), 0);

  std::size_t answers = 0;
  std::size_t errors = 0;
  for (std::size_t begin = 0; begin < sut.text().size();) {
    const std::size_t end = sut.text().find('\n', begin);
    const json turn = json::parse(sut.text().substr(begin, end - begin), nullptr, false);
    ASSERT_FALSE(turn.is_discarded()) << sut.text();
    EXPECT_TRUE(turn.contains("time"));
    answers += turn.contains("daemon") ? 1U : 0U;
    errors += turn.contains("error") ? 1U : 0U;
    begin = end + 1;
  }
  EXPECT_GE(answers, 1U);
  EXPECT_GE(errors, 1U);
}

TEST_F(RefitctlWatch, ReaderThatGoesAwayEndsIt) {
  daemon_->start();
  Watch sut(arguments(), Watch::Output::pipe);
  ASSERT_TRUE(sut.await("refitd pid="));

  sut.close_reader();

  EXPECT_EQ(sut.end(0), 0);
}

TEST_F(RefitctlWatch, TerminalIsRedrawnInItsSizeAndLeftAsItWas) {
  // Goal: frames overwrite each other, none is higher or wider than the screen, a resize is
  // followed, and Ctrl-C gives the screen back. Method: the tool's controlling terminal is a pseudo
  // terminal of 10 x 40, and Ctrl-C is typed there.
  daemon_->start();
  start_engine({"a"});
  Watch sut(arguments(), Watch::Output::terminal);
  const bool entered = sut.await(std::string(ctl::kEnterScreen));
  const bool small = sut.await("more lines)");
  const std::size_t small_end = sut.text().size();
  sut.resize(60, 200);
  const bool large = sut.await("\x1b[J");
  const bool whole = sut.await("engine0/transformer") && sut.await("Sessions");
  sut.type("\x03");
  const int status = sut.end(0);

  EXPECT_TRUE(entered) << sut.text();
  EXPECT_TRUE(small) << sut.text();
  EXPECT_TRUE(large && whole) << sut.text();
  EXPECT_EQ(status, 0);
  const std::string& text = sut.text();
  EXPECT_EQ(text.find(ctl::kEnterScreen), text.rfind(ctl::kEnterScreen)) << "entered twice";
  EXPECT_GT(text.find(ctl::kLeaveScreen), text.rfind("\x1b[J")) << "left before the last frame";
  EXPECT_FALSE(contains(text, "\x1b[2J")) << "clearing before drawing flickers";
  // No frame of the small screen scrolls it.
  const std::string first = text.substr(0, text.find("\x1b[J"));
  EXPECT_LE(std::count(first.begin(), first.end(), '\n'), 9);
  EXPECT_GT(small_end, 0U);
}

TEST_F(RefitctlWatch, TerminalIsGivenBackWhileStopped) {
  // Goal: Ctrl-Z shows the shell's screen, and `fg` the watch again. Method: as a shell sees it, by
  // waitpid() and SIGCONT.
  daemon_->start();
  Watch sut(arguments(), Watch::Output::terminal);
  ASSERT_TRUE(sut.await(std::string(ctl::kEnterScreen)));
  ASSERT_TRUE(sut.await("\x1b[J"));

  ::kill(sut.pid(), SIGTSTP);
  const bool left = sut.await(std::string(ctl::kLeaveScreen));
  int stopped = 0;
  EXPECT_EQ(::waitpid(sut.pid(), &stopped, WUNTRACED), sut.pid());
  ::kill(sut.pid(), SIGCONT);
  const bool again = sut.await(std::string(ctl::kEnterScreen));

  EXPECT_TRUE(left) << sut.text();
  EXPECT_TRUE(WIFSTOPPED(stopped));
  EXPECT_TRUE(again) << sut.text();
  EXPECT_EQ(sut.end(SIGTERM), 0);
}

TEST_F(RefitctlWatch, AbsentDaemonIsAnErrorAtTheStart) {
  const Finished sut = refitctl({"status", "--watch"});

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "no daemon at")) << sut.err;
}

TEST_F(RefitctlWatch, IntervalsThatMakeNoSenseAreRefused) {
  for (const char* interval : {"0", "-1", "x", "1s", "nan", "100000"}) {
    const Finished sut = refitctl({"status", "--watch=" + std::string(interval)});

    EXPECT_EQ(sut.status, 2) << interval << sut.err;
    EXPECT_TRUE(contains(sut.err, "--watch")) << sut.err;
  }
}

}  // namespace
}  // namespace refit::test
