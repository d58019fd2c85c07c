// Processes that the bench starts, and only those: each is known by its pidfd, dies with the bench,
// and is reaped.
//
// Entered by the bench's one orchestrating thread. Knows nothing of what the processes do.
#pragma once

#include <signal.h>
#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "channel.hpp"
#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit::bench {

struct SpawnOptions {
  std::vector<std::string> arguments;                            ///< [0] is the path of the program
  std::vector<std::pair<std::string, std::string>> environment;  ///< added to the bench's own
  std::string output_path;  ///< stdout and stderr go there; empty: the bench's own
  int inherited_fd = -1;    ///< appears in the child as kInheritedFd
  bool activated = false;   ///< inherited_fd is a listening socket, passed as systemd passes one
};

inline constexpr int kInheritedFd = 3;

/// One child process. The destructor kills and reaps it.
class Child {
 public:
  static Result<Child> spawn(const SpawnOptions& options);
  ~Child();
  Child(Child&& other) noexcept;
  Child& operator=(Child&& other) noexcept;

  [[nodiscard]] pid_t pid() const noexcept { return pid_; }
  [[nodiscard]] bool alive() const;
  void signal(int number) const;
  /// True until it was waited for, or moved from.
  [[nodiscard]] bool owned() const noexcept { return static_cast<bool>(pidfd_); }
  /// Waits for the end and reaps; false if it still runs after `timeout`.
  bool wait(std::chrono::milliseconds timeout);
  /// Sends `number`, waits up to `timeout`, then kills. True if it ended by itself with status 0.
  bool stop(int number, std::chrono::milliseconds timeout);
  /// It has ended, by itself and with status 0.
  [[nodiscard]] bool succeeded() const noexcept;
  /// How it ended, for a message.
  [[nodiscard]] std::string ending() const;

 private:
  Child(pid_t pid, UniqueFd pidfd) : pid_(pid), pidfd_(std::move(pidfd)) {}
  pid_t pid_ = -1;
  UniqueFd pidfd_;
  int status_ = 0;
};

/// A directory of the bench's own, removed with everything in it by the destructor.
class TemporaryDirectory {
 public:
  static Result<TemporaryDirectory> make();
  ~TemporaryDirectory();
  TemporaryDirectory(TemporaryDirectory&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  TemporaryDirectory& operator=(TemporaryDirectory&&) = delete;
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  explicit TemporaryDirectory(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

/// A trainer or an engine process of the bench and the channel to it.
class Peer {
 public:
  /// Starts this very program as `role`.
  static Result<Peer> start(const std::string& role);

  /// Sends a command and waits for its answer. Errors: what the role reported; engine_gone if it
  /// died; deadline; shutting_down if the bench was interrupted.
  [[nodiscard]] Result<Message> call(const nlohmann::json& command, int fd = -1);
  /// The two halves of call().
  [[nodiscard]] Result<void> tell(const nlohmann::json& command, int fd = -1);
  [[nodiscard]] Result<Message> hear();
  /// Tells it to end and waits. Errors: os if it did not end with status 0.
  [[nodiscard]] Result<void> end();
  [[nodiscard]] pid_t pid() const noexcept { return child_.pid(); }

 private:
  Peer(std::string role, Child child, Channel channel)
      : role_(std::move(role)), child_(std::move(child)), channel_(std::move(channel)) {}
  std::string role_;
  std::string told_;  ///< the last command's name, for messages
  Child child_;
  Channel channel_;
};

struct DaemonOptions {
  std::string program;
  std::string waiting = "adaptive";
  std::vector<std::pair<std::string, std::string>> environment = {};  ///< beside the bench's own
  std::vector<std::string> arguments = {};                            ///< beside the bench's own
};

/// A daemon of the bench's own on a socket in `directory`.
class Daemon {
 public:
  /// Returns once the socket answers. Errors: what the daemon wrote to stderr if it ended instead.
  static Result<Daemon> start(const DaemonOptions& options, const TemporaryDirectory& directory);
  /// Ends it; if it had already ended by itself, says so on stderr with what it wrote.
  ~Daemon();
  Daemon(Daemon&&) noexcept = default;
  Daemon& operator=(Daemon&&) noexcept = default;

  [[nodiscard]] const std::string& socket() const noexcept { return socket_; }
  [[nodiscard]] pid_t pid() const noexcept { return child_.pid(); }
  /// SIGTERM; the daemon must drain and exit 0. Errors: os with what it wrote to stderr.
  [[nodiscard]] Result<void> stop();

 private:
  Daemon(Child child, std::string socket, std::string log)
      : child_(std::move(child)), socket_(std::move(socket)), log_(std::move(log)) {}
  Child child_;
  std::string socket_;
  std::string log_;
};

/// Daemons on one socket that the bench holds open, as systemd holds a socket unit's: while none
/// runs, connections queue up, and the first of them starts the next one.
class ActivatedDaemon {
 public:
  /// Listens and starts the first daemon.
  static Result<ActivatedDaemon> start(const std::string& program,
                                       const TemporaryDirectory& directory);

  [[nodiscard]] const std::string& socket() const noexcept { return socket_; }
  /// SIGKILL, and nothing else.
  void kill() const { child_->signal(SIGKILL); }
  /// Waits for the daemon's end, then for a connection, then starts the next daemon.
  [[nodiscard]] Result<void> activate();

 private:
  ActivatedDaemon(std::string program, std::string base, UniqueFd listener)
      : program_(std::move(program)),
        socket_(base + ".sock"),
        log_(base + ".log"),
        listener_(std::move(listener)) {}
  Result<void> spawn();
  std::string program_, socket_, log_;
  UniqueFd listener_;
  std::optional<Child> child_;
};

/// The path of this program.
[[nodiscard]] std::string own_path();

/// Makes SIGINT and SIGTERM end waits instead of the process, so that destructors run.
void catch_interrupts();
[[nodiscard]] bool interrupted() noexcept;

}  // namespace refit::bench
