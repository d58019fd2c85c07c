// Checker: digests of what is really in an engine's memory, on request.
//
// The loop thread decides, the background pool hashes (hashing.hpp). A check shares its engine with
// other checks and keeps refits out while it reads, so that what it reports is one version. It does
// not keep layers from moving: a device place counts if the engine's word for it is the same before
// and after it was hashed; what moves all the time is absent.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/background_pool.hpp"
#include "server/device_access.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"
#include "server/scheduler.hpp"
#include "server/statistics.hpp"

namespace refit::daemon {

class Checker {
 public:
  Checker(Registry& registry, Scheduler& scheduler, Replies& replies, BackgroundPool& background,
          DeviceAccess& devices, Statistics& statistics);
  ~Checker();

  void begin_check(Session& asker, std::uint64_t request_id, const wire::Check& message,
                   Clock::time_point now);
  void begin_digest(Session& asker, std::uint64_t request_id, const wire::DigestQuery& message,
                    Clock::time_point now);

  void on_session_end(Session& session);
  /// A module's registration goes away: checks that wait for it are refused, one that runs finishes
  /// on the old memory.
  void on_registration_end(Module& module);
  /// An engine gives its memory up: what waits for it is refused, what runs stops at its next
  /// tensor.
  void on_engine_sleep(Session& engine);
  Clock::time_point on_time(Clock::time_point now);
  [[nodiscard]] Clock::time_point next_deadline() const;
  [[nodiscard]] bool idle() const noexcept { return operations_.empty(); }
  /// Refuses what waits and stops what runs at its next tensor.
  void cancel(const Error& reason);

 private:
  class CheckOperation;

  Result<std::unique_ptr<CheckOperation>> prepare(Session& asker, std::uint64_t request_id,
                                                  std::string_view engine, std::string_view module,
                                                  std::uint8_t kind, std::uint8_t place,
                                                  std::uint64_t deadline_us, Clock::time_point now);
  void admit(std::unique_ptr<CheckOperation> operation);
  void hash(CheckOperation& operation);
  void finish(CheckOperation& operation, const std::optional<Error>& error);
  void fail_waiting(CheckOperation& operation, const Error& error);
  template <typename Predicate>
  CheckOperation* find_waiting(Predicate&& matches);
  void remove(CheckOperation& operation);
  static void note_absent(CheckOperation& operation);
  void note_check(const CheckOperation& operation, std::size_t verified, std::size_t wrong);
  void reply_check(Session& asker, const CheckOperation& operation);
  void reply_digest(Session& asker, const CheckOperation& operation);

  Registry& registry_;
  Scheduler& scheduler_;
  Replies& replies_;
  BackgroundPool& background_;
  DeviceAccess& devices_;
  Statistics& statistics_;
  std::vector<std::unique_ptr<CheckOperation>> operations_;
};

}  // namespace refit::daemon
