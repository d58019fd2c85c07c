// Trainer: the process whose weights become an engine's. Register once, then refit after every
// optimizer step.
//
// When the daemon dies, the call that notices comes back to the next one within its own deadline,
// registers everything again, waits for the engines that it knew, and goes on: a refit with the
// same transaction. ConnectOptions::reconnect = false turns that off.
//
// Threads: one call at a time per Trainer; different Trainers are independent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "refit/api.hpp"
#include "refit/checker.hpp"
#include "refit/connection.hpp"
#include "refit/module.hpp"
#include "refit/result.hpp"

namespace refit {

/// One module to write. Strings are copied into the request; nothing is kept.
struct RefitTarget {
  std::string engine;
  std::string module;
  std::string source = {};  ///< the trainer's module; empty means the same name as `module`
  std::vector<std::string> selection = {};  ///< target tensor names; empty means all
  bool allow_unmatched =
      false;  ///< source tensors without a target are left alone instead of refused
  /// SHA-256 that target tensors shall have. The daemon proves them in the background after the
  /// commit, and poisons the module if one has not.
  std::vector<NamedDigest> expected = {};
  DigestKind expected_kind = DigestKind::sglang;
};

struct RefitOptions {
  TransactionId transaction;  ///< zero: a fresh one. The same id again returns the recorded outcome
                              ///< or repairs.
  bool reset_caches = false;  ///< tells the engine to drop what it derived from the old weights
                              ///< (TeaCache and its kind)
};

/// Microseconds. `wait`: for earlier work on the engine and for pages; `gate`: until every engine
/// held still; `copy`: the bytes; `check`: verification inside the refit; `total`: from the
/// daemon's reading to its reply.
struct Phases {
  float wait_us = 0, gate_us = 0, copy_us = 0, check_us = 0, total_us = 0;
};

struct RefitReport {
  TransactionId transaction;
  std::uint64_t version = 0;  ///< the highest of the targets' new versions
  std::uint64_t bytes = 0;    ///< of the targets, whatever a cast reads
  std::uint32_t tensors = 0;
  Guarantee guarantee = Guarantee::atomic;
  Phases phases;
  bool replayed = false;           ///< this id was committed before; nothing was copied now
  std::uint64_t device_bytes = 0;  ///< written to device places of resident layers, besides `bytes`
};

class REFIT_API Trainer {
 public:
  /// Connects and says who it is. Errors: Errc::os (no daemon there: the message names the socket),
  /// protocol_version, permission, quota, not_enough_cores, shutting_down, deadline.
  [[nodiscard]] static Result<Trainer> connect(const std::string& name,
                                               const ConnectOptions& options, Deadline deadline);
  ~Trainer();
  Trainer(Trainer&&) noexcept;
  Trainer& operator=(Trainer&&) noexcept;

  /// Registers `module` (again: replaces it). Returns once its pages are mapped and populated in
  /// the daemon, so that the first refit costs what the second does. Errors: bad_manifest and
  /// bad_region with the complete list, quota, deadline.
  [[nodiscard]] Result<void> register_module(const ModuleSpec& module, Deadline deadline);
  [[nodiscard]] Result<void> unregister_module(const std::string& module, Deadline deadline);

  /// Makes every selected tensor of the target hold this trainer's values, all or nothing. Where it
  /// is of another dtype they are cast, among float32, bfloat16 and float16 in host memory only.
  /// @return The new version and the phases; Errc::manifest_mismatch with the complete list of what
  /// does not fit,
  ///         no_such_engine, no_such_module, permission, engine_not_ready, poisoned, quota,
  ///         shutting_down (in all of these nothing was changed); engine_gone, memory_fault;
  ///         deadline or daemon_gone if the outcome is unknown: send the same transaction id again.
  ///         daemon_gone says what it waited for; an engine that is not back yet after a daemon's
  ///         end is waited for until `deadline`, one that was never there is no_such_engine at
  ///         once.
  /// Blocks: until committed, refused or `deadline`. Pumps the gates of engines bound to the
  /// calling thread, so that trainer and engine may share it. Allocates: no, in the steady state.
  /// Ownership: the source tensors must not be written until it returns; after Errc::deadline not
  /// until the same transaction id was answered, because a copy that had begun is finished.
  [[nodiscard]] Result<RefitReport> refit(const RefitTarget& target, Deadline deadline,
                                          const RefitOptions& options = {});
  /// The same for several modules, of one engine or of several: all are gated, written and
  /// committed together.
  [[nodiscard]] Result<RefitReport> refit_all(const std::vector<RefitTarget>& targets,
                                              Deadline deadline, const RefitOptions& options = {});

  /// Compares live bytes of the engine with expected digests.
  [[nodiscard]] Result<CheckReport> check(const CheckRequest& request, Deadline deadline);
  /// Reads digests of live bytes.
  [[nodiscard]] Result<DigestReport> digest(const DigestRequest& request, Deadline deadline);
  /// One empty round trip on the ring.
  [[nodiscard]] Result<void> ping(Deadline deadline);

 private:
  class REFIT_LOCAL Impl;
  explicit Trainer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refit
