// Observer: asks the daemon what an operator wants to know. refitctl stands on it.
//
// Threads: one call at a time per Observer. It holds nothing that a daemon would have to learn
// again, so it does not come back by itself: after Errc::daemon_gone, connect another one.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "refit/api.hpp"
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
  std::uint32_t regions = 0;
  std::uint64_t registered_bytes = 0;
  std::uint32_t in_flight = 0;  ///< requests that the daemon took and has not answered
  std::uint64_t age_us = 0;
  bool restricted = false;  ///< another uid's: only name, role and uid are told
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
  bool asleep = false;      ///< its memory was given up and not registered again
  std::uint32_t uid = 0;    ///< the engine's
  bool restricted = false;  ///< another uid's: only names, state and version are told
  std::optional<std::uint64_t> proven_version;  ///< as ModuleMetrics::proof
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

/// One phase of all committed refits: how many lie within each of DaemonMetrics::bounds_us and not
/// within the one before; the last count is of what is above all bounds.
struct PhaseHistogram {
  std::vector<std::uint64_t> counts;
  double sum_us = 0;
};

/// What a uid uses of something that is limited per uid.
struct QuotaUse {
  std::uint32_t uid = 0;
  std::string quota;
  std::uint64_t used = 0;
  std::uint64_t limit = 0;  ///< 0: none
};

/// That a check, or the daemon's proof in the background, found every tensor of a module equal.
struct ModuleProof {
  std::uint64_t version = 0;
  std::uint64_t age_us = 0;
};

struct ModuleMetrics {
  std::string engine, module;
  std::uint32_t uid = 0;
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0, refits = 0, bytes = 0;
  std::optional<ModuleProof> proof;  ///< the last one; nothing if there was none
};

/// What the daemon's proofs in the background found. Where source and target differ, the trainer
/// may have changed its tensors since: that proves nothing.
struct ProofCounts {
  std::uint64_t equal = 0, different = 0;
  std::uint64_t overtaken = 0;   ///< by the next refit, or the memory was given up
  std::uint64_t unreadable = 0;  ///< memory that faulted, or a device that did not answer
  std::uint64_t refuted = 0;     ///< the bytes have not the digests that came with the refit
};

/// Counters of the daemon's life and what it holds now.
struct DaemonMetrics {
  std::string version, copy_kernel;
  std::uint32_t protocol = 0;
  std::uint64_t layout = 0;
  Waiting waiting = Waiting::adaptive;
  bool draining = false;
  std::uint64_t uptime_us = 0;
  std::uint64_t committed = 0, moved_bytes = 0;
  std::map<Errc, std::uint64_t> failures;  ///< refits by why they failed; only what happened
  std::vector<float> bounds_us;
  PhaseHistogram wait, gate, copy, total;
  std::uint64_t checks = 0, tensors_verified = 0, tensors_mismatched = 0, tensors_missing = 0;
  ProofCounts proofs;
  std::vector<QuotaUse> quotas;
  std::vector<ModuleMetrics> modules;
};

/// What a reload of the daemon's configuration did, by key ("engine" for the permission rules).
struct ReloadReport {
  std::string file;
  std::vector<std::string> changed;
  std::vector<std::string> needs_restart;  ///< differ from what runs and were left alone
};

class REFIT_API Observer {
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
  [[nodiscard]] Result<DaemonMetrics> metrics(Deadline deadline);

  /// Asks the daemon to end: it takes no new work, finishes what runs, and exits. Only root and the
  /// daemon's own user may. Returns when it has begun.
  [[nodiscard]] Result<void> drain(Deadline deadline);
  /// Waits for the end of the daemon's process; Errc::deadline while it lives.
  [[nodiscard]] Result<void> wait_gone(Deadline deadline);

  /// Lets the daemon read its configuration again; returns when it is in force. Errors:
  /// Errc::permission unless root or the daemon's own uid asks; Errc::bad_configuration, whose
  /// details are all that is wrong with the file: the old one holds.
  [[nodiscard]] Result<ReloadReport> reload(Deadline deadline);

 private:
  class REFIT_LOCAL Impl;
  explicit Observer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refit
