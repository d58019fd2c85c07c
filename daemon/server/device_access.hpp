// DeviceAccess: the daemon's one Devices, made when memory is first registered.
//
// Any thread; the first call takes as long as a driver takes to start, hundreds of milliseconds, so
// it is not the loop's. What is made stays; where nothing could be made the next call tries again,
// because drivers and devices may come after the daemon.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "memory/devices.hpp"

namespace refit::daemon {

class DeviceAccess {
 public:
  explicit DeviceAccess(const DeviceOptions& options = {}) : options_(options) {}

  /// For who cannot do without: Errc::unsupported names `label` and says what is missing.
  Result<Devices*> required(const std::string& label) {
    auto devices = made();
    if (!devices) devices.error().message = label + " is device memory: " + devices.error().message;
    return devices;
  }
  /// Null where there are none.
  Devices* if_there() { return made().value_or(nullptr); }
  /// Those that were made before. Waits for nothing.
  [[nodiscard]] Devices* known() const noexcept { return known_.load(std::memory_order_acquire); }

  /// A device answers nothing any more: this process can do no better. The loop thread.
  std::function<void(const Error&)> lost;
  /// Says so if `error` is of that kind. The loop thread, when who waits was told.
  void judge(const Error& error) const {
    if (lost && Devices::is_lost(error)) lost(error);
  }

 private:
  Result<Devices*> made() {
    if (Devices* const devices = known()) return devices;
    const std::lock_guard lock(mutex_);
    if (devices_ == nullptr) {
      REFIT_TRY_ASSIGN(devices_, Devices::create(options_));
      known_.store(devices_.get(), std::memory_order_release);
    }
    return devices_.get();
  }
  const DeviceOptions options_;
  std::mutex mutex_;
  std::unique_ptr<Devices> devices_;  ///< guarded by mutex_
  std::atomic<Devices*> known_{nullptr};
};

}  // namespace refit::daemon
