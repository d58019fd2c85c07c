// Engine: the process that owns the live parameters. Registers its modules, and holds still between
// two steps when the daemon asks, through poll(), fd() or serve().
//
// When the daemon dies, whole weights may be stepped on, and poll(), wait(), serve() and the owner
// of fd() bring the engine back to the next daemon with everything that it registered.
//
// Threads: one call at a time per Engine, but step_allowed(), state(), version() and connected(),
// which any thread may call.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "refit/api.hpp"
#include "refit/connection.hpp"
#include "refit/module.hpp"
#include "refit/result.hpp"

namespace refit {

/// What a gate brought: the modules that hold new weights now.
struct GateEvent {
  struct Module {
    std::string name;
    std::uint64_t version = 0;
    TransactionId transaction;
  };
  std::vector<Module> modules;
  bool reset_caches = false;
};

/// For serve(): called on Engine's own thread.
struct GateHandler {
  std::function<bool(Deadline)> hold;  ///< returns true once the engine's loop stands still
  std::function<void(const GateEvent*)>
      release;  ///< the loop may go on, if step_allowed(); null if nothing was committed
};

class REFIT_API Engine {
 public:
  /// Connects under `name`, which is unique per uid. Errors as Trainer::connect, and name_taken
  /// with the holder's pid.
  [[nodiscard]] static Result<Engine> connect(const std::string& name,
                                              const ConnectOptions& options, Deadline deadline);
  ~Engine();
  Engine(Engine&&) noexcept;
  Engine& operator=(Engine&&) noexcept;

  /// Registers a module whose tensors are written by refits from now on (again: replaces it,
  /// keeping its version).
  [[nodiscard]] Result<void> register_module(const ModuleSpec& module, Deadline deadline);
  [[nodiscard]] Result<void> unregister_module(const std::string& module, Deadline deadline);

  /// The gate between two steps of the engine's loop. Costs one atomic load and a look at the
  /// coarse clock while nothing is asked. If a refit asks, holds here until it is committed or
  /// stepped back, at most until `deadline`.
  ///
  /// If the daemon died, each call goes on coming back, which takes at most 5 ms and a manifest's
  /// encoding of it; there is no event meanwhile, and modules that were being written are poisoned.
  /// @return what was committed, or nothing; Errc::deadline if bytes are being written at the
  /// deadline: no step may run,
  ///         call poll() again; an error that no waiting mends if the engine cannot come back
  ///         (permission, protocol_version, name_taken, ...): again each time, until reconnect().
  ///         Without ConnectOptions::reconnect, Errc::daemon_gone if the daemon died.
  [[nodiscard]] Result<std::optional<GateEvent>> poll(Deadline deadline);
  /// Blocks until a refit asked and was let through, or `deadline` (no event). Comes back meanwhile
  /// as poll() does.
  [[nodiscard]] Result<std::optional<GateEvent>> wait(Deadline deadline);
  /// Readable when poll() has something to do: for the event loop of an idle engine. Owned by this
  /// object; the same for its life, whatever happens to daemons.
  [[nodiscard]] int fd() const noexcept;
  /// Answers gates on a thread of its own until stop_serving() or destruction.
  [[nodiscard]] Result<void> serve(GateHandler handler);
  void stop_serving() noexcept;

  /// Makes Trainer::refit on the calling thread pump this engine's gate, so that both may share the
  /// thread.
  void bind_to_this_thread();

  /// Gives the memory of every module up: when it returns, neither the daemon nor this object holds
  /// any of it. Names, versions and states stay; refits, checks and digests are refused with
  /// Errc::engine_asleep, and step_allowed() is false until wake(). Errors: Errc::busy while a
  /// refit writes (poll() first); after Errc::deadline it may still fall asleep: call it again.
  [[nodiscard]] Result<void> sleep(Deadline deadline);
  /// Refits may come again. Every module must have been registered again, with the memory that it
  /// lies in now, or unregistered: Errc::engine_asleep lists those that were not.
  [[nodiscard]] Result<void> wake(Deadline deadline);

  /// False while the engine sleeps, while a refit writes, and after one that did not finish, until
  /// another commits.
  [[nodiscard]] bool step_allowed() const noexcept;
  [[nodiscard]] ModuleState state(const std::string& module) const;
  [[nodiscard]] std::uint64_t version(const std::string& module) const;

  /// False from when the daemon's end was noticed until every module is registered with the next
  /// one. Any thread.
  [[nodiscard]] bool connected() const noexcept;

  /// Connects again now, within `deadline`, and registers every module from what this object holds,
  /// poisoned ones as poisoned. For owners with ConnectOptions::reconnect off, and after an error
  /// that ended coming back. Errors: busy while a daemon that lives is writing.
  [[nodiscard]] Result<void> reconnect(Deadline deadline);

 private:
  class REFIT_LOCAL Impl;
  explicit Engine(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refit
