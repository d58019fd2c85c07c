// Starting, watching and ending the bench's own processes. See process.hpp.
//
// Entered by the orchestrating thread only, which has no other threads beside it when it forks.
// Must not touch any process that it did not start.
#include "process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace refit::bench {
namespace {

using std::chrono::milliseconds;

std::atomic<bool> interrupt_seen{false};

std::string tail_of(const std::string& path) {
  std::ifstream stream(path);
  std::stringstream text;
  text << stream.rdbuf();
  std::string all = text.str();
  constexpr std::size_t kTailBytes = 2000;
  return all.size() > kTailBytes ? all.substr(all.size() - kTailBytes) : all;
}

bool answers(const std::string& path) {
  const UniqueFd probe = UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  return ::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
}

}  // namespace

std::string own_path() { return std::filesystem::read_symlink("/proc/self/exe").string(); }

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_seen = true; };
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) ::sigaction(number, &action, nullptr);
}

bool interrupted() noexcept { return interrupt_seen; }

Result<Child> Child::spawn(const SpawnOptions& options) {
  std::vector<std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    bool replaced = false;
    for (const auto& [name, value] : options.environment)
      replaced |= text.rfind(name + "=", 0) == 0;
    if (!replaced) environment.push_back(text);
  }
  for (const auto& [name, value] : options.environment) environment.push_back(name + "=" + value);
  char listen_pid[32] = "LISTEN_PID=";
  if (options.activated) environment.emplace_back("LISTEN_FDS=1");
  std::vector<char*> argv, envp;
  for (const std::string& text : options.arguments) argv.push_back(const_cast<char*>(text.c_str()));
  for (const std::string& text : environment) envp.push_back(const_cast<char*>(text.c_str()));
  if (options.activated) envp.push_back(listen_pid);
  argv.push_back(nullptr);
  envp.push_back(nullptr);

  UniqueFd output;
  if (!options.output_path.empty()) {
    output = UniqueFd::adopt(
        ::open(options.output_path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600));
    if (!output) return fail_os("open " + options.output_path, errno);
  }
  const pid_t parent = ::getpid();
  const pid_t pid = ::fork();
  if (pid < 0) return fail_os("fork", errno);
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    // A group of its own: Ctrl-C reaches the bench alone, which then ends its children in order.
    ::setpgid(0, 0);
    if (output) {
      ::dup2(output.get(), STDOUT_FILENO);
      ::dup2(output.get(), STDERR_FILENO);
    }
    if (options.inherited_fd == kInheritedFd) {
      ::fcntl(kInheritedFd, F_SETFD, 0);
    } else if (options.inherited_fd >= 0) {
      ::dup2(options.inherited_fd, kInheritedFd);
    }
    std::snprintf(listen_pid, sizeof listen_pid, "LISTEN_PID=%d", ::getpid());
    ::execve(argv[0], argv.data(), envp.data());
    ::_exit(127);
  }
  UniqueFd pidfd = UniqueFd::adopt(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!pidfd) {
    const int native = errno;
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return fail_os("pidfd_open", native);
  }
  return Child(pid, std::move(pidfd));
}

Child::~Child() {
  if (!pidfd_) return;
  signal(SIGKILL);
  wait(milliseconds(-1));
}

Child::Child(Child&& other) noexcept
    : pid_(other.pid_), pidfd_(std::move(other.pidfd_)), status_(other.status_) {}

Child& Child::operator=(Child&& other) noexcept {
  std::swap(pid_, other.pid_);
  std::swap(pidfd_, other.pidfd_);
  std::swap(status_, other.status_);
  return *this;
}

bool Child::alive() const {
  pollfd wait_for{pidfd_.get(), POLLIN, 0};
  return pidfd_ && ::poll(&wait_for, 1, 0) == 0;
}

void Child::signal(int number) const {
  if (pidfd_) ::syscall(SYS_pidfd_send_signal, pidfd_.get(), number, nullptr, 0);
}

bool Child::wait(milliseconds timeout) {
  if (!pidfd_) return true;
  const auto end = std::chrono::steady_clock::now() + timeout;
  while (true) {
    pollfd wait_for{pidfd_.get(), POLLIN, 0};
    const auto left = std::chrono::ceil<milliseconds>(end - std::chrono::steady_clock::now());
    const int ready = ::poll(
        &wait_for, 1, timeout.count() < 0 ? -1 : std::max(0, static_cast<int>(left.count())));
    if (ready > 0) break;
    if (ready == 0) return false;
    if (errno != EINTR) return false;
  }
  ::waitpid(pid_, &status_, 0);
  pidfd_.reset();
  return true;
}

bool Child::stop(int number, milliseconds timeout) {
  signal(number);
  if (!wait(timeout)) {
    signal(SIGKILL);
    wait(milliseconds(-1));
    return false;
  }
  return succeeded();
}

bool Child::succeeded() const noexcept {
  return !pidfd_ && WIFEXITED(status_) && WEXITSTATUS(status_) == 0;
}

std::string Child::ending() const {
  if (pidfd_) return "still running";
  if (WIFSIGNALED(status_)) return "ended by signal " + std::to_string(WTERMSIG(status_));
  return "exited with status " + std::to_string(WEXITSTATUS(status_));
}

Result<TemporaryDirectory> TemporaryDirectory::make() {
  const char* base = std::getenv("TMPDIR");
  std::string path =
      std::string(base != nullptr && *base != 0 ? base : "/tmp") + "/refit-bench-XXXXXX";
  if (::mkdtemp(path.data()) == nullptr) return fail_os("mkdtemp " + path, errno);
  return TemporaryDirectory(path);
}

TemporaryDirectory::~TemporaryDirectory() {
  if (path_.empty()) return;
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

Result<Peer> Peer::start(const std::string& role) {
  REFIT_TRY_ASSIGN(auto ends, Channel::make_pair());
  SpawnOptions options;
  options.arguments = {own_path(), "--role", role};
  options.inherited_fd = ends.second.fd();
  REFIT_TRY_ASSIGN(Child child, Child::spawn(options));
  return Peer(role, std::move(child), std::move(ends.first));
}

Result<Message> Peer::call(const nlohmann::json& command, int fd) {
  REFIT_TRY(tell(command, fd));
  return hear();
}

Result<void> Peer::tell(const nlohmann::json& command, int fd) {
  told_ = command.value("command", "?");
  return channel_.send(command, fd);
}

Result<Message> Peer::hear() {
  constexpr auto kTimeout = std::chrono::minutes(20);
  const auto end = std::chrono::steady_clock::now() + kTimeout;
  const std::string what = role_ + ", command '" + told_ + "'";
  while (std::chrono::steady_clock::now() < end) {
    if (interrupted()) return fail(Errc::shutting_down, "interrupted");
    auto message = channel_.receive(milliseconds(200));
    if (!message) {
      if (child_.wait(milliseconds(1000))) {
        return fail(Errc::engine_gone, "the bench's " + what + ": the process " + child_.ending());
      }
      return Unexpected(std::move(message).error());
    }
    if (!*message) continue;
    if ((*message)->body.contains("error")) {
      return fail(static_cast<Errc>((*message)->body.value("code", 1)),
                  "the bench's " + what + ": " + (*message)->body["error"].get<std::string>());
    }
    return std::move(**message);
  }
  return fail(Errc::deadline, "the bench's " + what + " did not answer in 20 minutes");
}

Result<void> Peer::end() {
  REFIT_TRY(call({{"command", "quit"}}));
  constexpr auto kPatience = std::chrono::seconds(60);  // a device's memory is given back slowly
  if (child_.wait(kPatience) && child_.succeeded()) return {};
  return fail(Errc::os, "the bench's " + role_ + " did not end well: it " + child_.ending());
}

Result<Daemon> Daemon::start(const DaemonOptions& options, const TemporaryDirectory& directory) {
  static int count = 0;
  const std::string base = directory.path() + "/daemon-" + std::to_string(++count);
  const std::string socket = base + ".sock";
  SpawnOptions spawn;
  spawn.arguments = {options.program, "--socket", socket, "--waiting", options.waiting};
  spawn.arguments.insert(spawn.arguments.end(), options.arguments.begin(), options.arguments.end());
  spawn.output_path = base + ".log";
  spawn.environment = options.environment;
  REFIT_TRY_ASSIGN(Child child, Child::spawn(spawn));
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!answers(socket)) {
    if (!child.alive() || std::chrono::steady_clock::now() > end) {
      child.wait(milliseconds(0));
      return fail(Errc::daemon_gone, "'" + options.program + "' does not answer on its socket (" +
                                         child.ending() + "); it wrote:\n" +
                                         tail_of(spawn.output_path));
    }
    ::usleep(5000);
  }
  return Daemon(std::move(child), socket, spawn.output_path);
}

Daemon::~Daemon() {
  if (!child_.owned() || child_.alive()) return;
  child_.wait(milliseconds(-1));
  std::fprintf(stderr, "refit_bench: the daemon %s by itself; it wrote:\n%s",
               child_.ending().c_str(), tail_of(log_).c_str());
}

Result<void> Daemon::stop() {
  if (child_.stop(SIGTERM, std::chrono::seconds(20))) return {};
  return fail(Errc::os, "the daemon did not end well after SIGTERM: it " + child_.ending() +
                            "; it wrote:\n" + tail_of(log_));
}

Result<ActivatedDaemon> ActivatedDaemon::start(const std::string& program,
                                               const TemporaryDirectory& directory) {
  static int count = 0;
  const std::string base = directory.path() + "/activated-" + std::to_string(++count);
  UniqueFd listener = UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  ActivatedDaemon daemon(program, base, std::move(listener));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, daemon.socket_.c_str(), sizeof address.sun_path - 1);
  const int fd = daemon.listener_.get();
  if (::bind(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(fd, 64) != 0) {
    return fail_os("listening at " + daemon.socket_, errno);
  }
  REFIT_TRY(daemon.spawn());
  return daemon;
}

Result<void> ActivatedDaemon::spawn() {
  SpawnOptions options;
  options.arguments = {program_};
  options.output_path = log_;
  options.inherited_fd = listener_.get();
  options.activated = true;
  REFIT_TRY_ASSIGN(Child child, Child::spawn(options));
  child_ = std::move(child);
  return {};
}

Result<void> ActivatedDaemon::activate() {
  constexpr int kPatienceMs = 20'000;
  if (!child_->wait(milliseconds(kPatienceMs)))
    return fail(Errc::os, "the daemon outlived SIGKILL");
  pollfd entry{listener_.get(), POLLIN, 0};
  if (::poll(&entry, 1, kPatienceMs) != 1)
    return fail(Errc::deadline, "no client came to the socket of a daemon that was killed");
  return spawn();
}

}  // namespace refit::bench
