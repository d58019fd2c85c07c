// DeviceAccess: the daemon's one Devices, made when memory is first registered.
//
// Any thread; the first call takes as long as a driver takes to start, hundreds of milliseconds, so
// it is not the loop's. What is made stays.
#pragma once

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
    const Result<std::unique_ptr<Devices>>& devices = made();
    if (devices) return devices->get();
    Error error = devices.error();
    error.message = label + " is device memory: " + error.message;
    return Unexpected(std::move(error));
  }
  /// Null where there are none.
  Devices* if_there() {
    const Result<std::unique_ptr<Devices>>& devices = made();
    return devices ? devices->get() : nullptr;
  }

  /// A device answers nothing any more: this process can do no better. The loop thread.
  std::function<void(const Error&)> lost;
  /// Says so if `error` is of that kind. The loop thread, when who waits was told.
  void judge(const Error& error) const {
    if (lost && Devices::is_lost(error)) lost(error);
  }

 private:
  const Result<std::unique_ptr<Devices>>& made() {
    std::call_once(once_, [this] { devices_ = Devices::create(options_); });
    return devices_;
  }
  const DeviceOptions options_;
  std::once_flag once_;
  Result<std::unique_ptr<Devices>> devices_;
};

}  // namespace refit::daemon
