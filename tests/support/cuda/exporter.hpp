// CudaExporter: a process that shares some device memory by a legacy handle and can die at any
// moment.
//
// It is this very program, started anew: a driver does not survive a fork. main.cpp calls
// export_until_told() in it. One thread.
#pragma once

#include "memory/exported.hpp"
#include "support/started_anew.hpp"

namespace refit::test {

class CudaExporter {
 public:
  CudaExporter();

  /// As the process exported it.
  [[nodiscard]] const Exported& exported() const noexcept { return exported_; }
  /// Behind work on it that is queued, and not begun unless somebody waits for it.
  [[nodiscard]] const IpcHandle& event() const noexcept { return event_; }
  /// Stops the process: what is queued is never done.
  void stop_now() const { process_.stop_now(); }
  void kill_now() { process_.kill_now(); }

 private:
  StartedAnew process_;
  Exported exported_;
  IpcHandle event_{};
};

/// True in such a process; see export_until_told().
bool is_exporter();
/// Its whole life.
[[noreturn]] void export_until_told();

}  // namespace refit::test
