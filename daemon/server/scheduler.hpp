// Scheduler: which operation may touch which engine now.
//
// A refit needs its engines alone, checks share one. Operations start in the order of arrival as
// soon as nobody earlier wants one of their engines; disjoint engines run in parallel. The loop
// thread alone; no clock, no syscall.
#pragma once

#include <memory>
#include <vector>

#include "server/session.hpp"

namespace refit::daemon {

/// Something that needs engines for itself or shared. The scheduler borrows it between enqueue and
/// leave.
class Operation {
 public:
  virtual ~Operation() = default;
  [[nodiscard]] virtual bool exclusive() const noexcept = 0;
  /// True once everything else that it waits for is there (pages populated).
  [[nodiscard]] virtual bool runnable() const = 0;
  /// The engines are its own now.
  virtual void start() = 0;

  std::vector<std::shared_ptr<Session>> engines;
};

class Scheduler {
 public:
  Scheduler() { pending_.reserve(64); }

  void enqueue(Operation& operation);
  /// A started operation is through with its engines.
  void leave(Operation& operation);
  /// A waiting operation gives up.
  void withdraw(Operation& operation);
  /// Something that a waiting operation may wait for has changed.
  void advance();

 private:
  [[nodiscard]] static bool available(const Operation& operation) noexcept;
  std::vector<Operation*> pending_;
  bool advancing_ = false;
  bool again_ = false;
};

}  // namespace refit::daemon
