// The engines whose gates the calling thread pumps while it waits for a refit.
//
// Per thread by design: a trainer and an engine that share a thread cannot wait for each other in
// any other way. Engines enter by Engine::bind_to_this_thread and leave when they are destroyed on
// that thread.
#pragma once

#include <vector>

#include "session.hpp"

namespace refit {

/// What a bound engine lets a waiting trainer do on its behalf.
class BoundEngine : public Pump {
 public:
  /// Notices the daemon's end and goes on coming back from it. True if the engine is back by this
  /// call.
  virtual bool recover() = 0;
  /// What recover() waits for.
  virtual void append_recovery_fds(std::vector<pollfd>& fds) const = 0;
  [[nodiscard]] virtual Deadline::Clock::time_point next_recovery() const = 0;
};

/// The calling thread's engines.
std::vector<BoundEngine*>& bound_engines();

/// All of them as one pump.
class BoundEnginesPump final : public Pump {
 public:
  bool pump() override;
  [[nodiscard]] bool due() const override;
  void append_fds(std::vector<pollfd>& fds) const override;
};

}  // namespace refit
