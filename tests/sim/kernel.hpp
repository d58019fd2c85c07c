// The simulation's machine: processes made of fibers, one clock, one source of chance.
//
// One thread. At every access to a shared word, and at every wait, the running fiber may lose the
// turn to another that the seed picks, so the real code of both sides is interleaved as finely as
// its atomics are. A process that dies is a fiber that runs on without effect until it ends: its
// stores are dropped, its waits return at once. Knows nothing of refits.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "posix/unique_fd.hpp"

namespace refit::sim {

using Time = std::chrono::steady_clock::time_point;
using std::chrono::microseconds;
using std::chrono::milliseconds;
using std::chrono::seconds;

inline constexpr Time kNever = Time::max();

/// splitmix64: the whole run follows from its seed.
class Chance {
 public:
  explicit Chance(std::uint64_t seed) noexcept : state_(seed) {}
  std::uint64_t next() noexcept {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  /// One of 0 .. count - 1.
  std::uint64_t below(std::uint64_t count) noexcept { return next() % count; }
  bool one_in(std::uint64_t count) noexcept { return below(count) == 0; }
  microseconds us(std::uint64_t from, std::uint64_t to) noexcept {
    return microseconds(from + below(to - from + 1));
  }

 private:
  std::uint64_t state_;
};

/// A process. Its death is seen at its socket first and by its pidfd a little later, as the kernel
/// does it.
struct Process {
  std::string name;
  bool dying = false;
  Time socket_closes = kNever;
  Time dies = kNever;
  Time frozen_until{};
  UniqueFd pidfd;  ///< an eventfd; readable once the process is dead
  [[nodiscard]] bool socket_closed() const noexcept;
  [[nodiscard]] bool dead() const noexcept;
};

/// What the model, or anybody, found wrong. Thrown to the caller of Kernel::run.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Kernel {
 public:
  Kernel(std::uint64_t seed, bool trace);
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  std::shared_ptr<Process> start(std::string name);
  void spawn(const std::shared_ptr<Process>& process, std::function<void()> body);
  /// The process whose fiber has the turn; what it spawns is its own.
  [[nodiscard]] const std::shared_ptr<Process>& self() const;
  void kill(const std::shared_ptr<Process>& process);
  [[nodiscard]] bool has_fibers(const Process& process) const noexcept;
  /// Everybody dies, and no fiber keeps anything on its stack.
  void stop();
  void freeze(const std::shared_ptr<Process>& process, microseconds how_long);

  /// Gives turns until `done`, or until no fiber can ever run again (false).
  bool run(const std::function<bool()>& done, std::uint64_t turns_max);

  // -- for the fiber that has the turn

  void turn() noexcept;
  void give_way() noexcept;
  /// Until `ready` or `until`; true if ready. Ends at once in a dying process.
  bool wait(const std::function<bool()>& ready, Time until = kNever);
  void sleep(microseconds how_long) {
    wait([] { return false; }, now() + how_long);
  }
  [[nodiscard]] bool dying() const noexcept;
  [[nodiscard]] Time now() const noexcept { return now_; }

  // -- chance and record

  Chance chance;
  /// Mixed into the run's hash, and printed if this run is traced.
  void note(std::string_view text);
  /// Printed only.
  void tell(std::string_view text) const;
  [[nodiscard]] bool tracing() const noexcept { return trace_; }
  /// Ends the run; the first one counts.
  void violate(const std::string& what) noexcept;
  [[nodiscard]] std::uint64_t hash() const noexcept { return hash_; }
  [[nodiscard]] std::uint64_t turns() const noexcept { return turns_; }
  [[nodiscard]] std::uint64_t switches() const noexcept { return switches_; }

  /// Runs at every turn, whoever has it; looks and takes no part.
  std::function<void()> on_turn;
  /// Runs between two fibers' turns: deaths and delays are its. Returns when it has something to do
  /// even if nobody else has.
  std::function<Time()> between_turns;
  /// While set, no access gives way and nothing is stored: for taking dead things apart.
  bool mute = false;
  std::string bug;  ///< the planted bug's name, or none

 private:
  struct Fiber;
  void resume(Fiber& fiber);
  void suspend() noexcept;
  void mix(std::uint64_t value) noexcept { hash_ = (hash_ ^ value) * 0x100000001b3; }
  static void enter(unsigned low, unsigned high);

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<std::shared_ptr<Process>> processes_;
  std::vector<std::unique_ptr<std::byte[]>> stacks_;
  Fiber* running_ = nullptr;
  bool looking_ = false;
  bool trace_ = false;
  Time now_{seconds(1)};
  std::uint64_t hash_ = 0xcbf29ce484222325;
  std::uint64_t turns_ = 0;
  std::uint64_t turns_max_ = 0;
  std::uint64_t switches_ = 0;
  std::string violation_;
};

// -- what the twins of the product's headers call; nothing outside of a run

Kernel& kernel() noexcept;
void turn() noexcept;
void give_way() noexcept;
[[nodiscard]] bool dying() noexcept;
[[nodiscard]] Time now() noexcept;
[[nodiscard]] bool planted(std::string_view bug) noexcept;

}  // namespace refit::sim
