// Observer: asks the daemon what an operator wants to know. refitctl stands on it.
//
// Threads: one call at a time per Observer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "refit/checker.hpp"
#include "refit/connection.hpp"
#include "refit/result.hpp"
#include "refit/trainer.hpp"

namespace refit {

struct SessionStatus {
  std::uint64_t id = 0;
  Role role = Role::observer;
  std::string name;
  std::uint32_t uid = 0, pid = 0, modules = 0;
  bool asleep = false;  ///< an engine that gave its memory up until it wakes
};

struct ModuleStatus {
  std::string engine, module;
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0;
  std::string source;         ///< "trainer/module" of the last refit; empty before the first
  TransactionId transaction;  ///< of the last refit
  std::uint32_t tensors = 0;
  std::uint64_t bytes = 0, refits = 0, last_bytes = 0;
  Phases last;
  bool populated = false;
  bool asleep = false;  ///< its memory was given up and not registered again
};

struct DaemonStatus {
  std::string version, copy_kernel, socket;
  std::uint32_t pid = 0, copy_threads = 0;
  std::uint64_t uptime_us = 0, refits = 0;
  Waiting waiting = Waiting::adaptive;
  bool draining = false;
  std::vector<SessionStatus> sessions;
  std::vector<ModuleStatus> modules;
};

class Observer {
 public:
  [[nodiscard]] static Result<Observer> connect(const std::string& name,
                                                const ConnectOptions& options, Deadline deadline);
  ~Observer();
  Observer(Observer&&) noexcept;
  Observer& operator=(Observer&&) noexcept;

  [[nodiscard]] Result<DaemonStatus> status(Deadline deadline);
  /// The tensors of a registered engine module, in registration order.
  [[nodiscard]] Result<std::vector<TensorSpec>> tensors(const std::string& engine,
                                                        const std::string& module,
                                                        Deadline deadline);
  [[nodiscard]] Result<CheckReport> check(const CheckRequest& request, Deadline deadline);
  [[nodiscard]] Result<DigestReport> digest(const DigestRequest& request, Deadline deadline);

 private:
  class Impl;
  explicit Observer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refit
