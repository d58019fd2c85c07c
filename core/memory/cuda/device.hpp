// The devices that this process sees, named by UUID, and their primary contexts.
//
// Any thread. Ordinals differ between processes (CUDA_VISIBLE_DEVICES), so that only UUIDs leave
// one.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "memory/cuda/driver.hpp"
#include "memory/exported.hpp"

namespace refit::cuda {

struct Device {
  DeviceUuid uuid;
  CUdevice ordinal = 0;  ///< of this process
  std::string name;
  std::uint64_t memory_bytes = 0;
  CUcomputemode compute_mode = CU_COMPUTEMODE_DEFAULT;
  bool vmm = false;
  bool posix_fd_handles = false;
  bool ipc_events = false;
  bool unified_addressing = false;
  bool read_only_host_register = false;
  bool host_pointers = false;   ///< kernels reach registered host memory by its own addresses
  std::vector<CUdevice> peers;  ///< that can reach its memory

  [[nodiscard]] std::string label() const { return uuid.text() + " (" + name + ")"; }
};

/// The primary context of a device, retained for as long as this lives. Whatever was made in it
/// holds it.
class Context {
 public:
  /// Takes over one retain of `device`.
  Context(const Driver& driver, const Device& device, CUcontext handle)
      : driver_(driver), device_(device), handle_(handle) {}
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  [[nodiscard]] const Driver& driver() const noexcept { return driver_; }
  [[nodiscard]] const Device& device() const noexcept { return device_; }
  [[nodiscard]] CUcontext handle() const noexcept { return handle_; }

 private:
  const Driver& driver_;
  Device device_;
  CUcontext handle_;
};

/// Makes a context the calling thread's current one, and the one before it again when it ends.
/// On one thread they end in the reverse order of their beginnings.
class Current {
 public:
  /// Errors: Errc::cuda.
  [[nodiscard]] static Result<Current> enter(const Context& context);
  Current(Current&& other) noexcept : driver_(std::exchange(other.driver_, nullptr)) {}
  Current& operator=(Current&&) = delete;
  ~Current();

 private:
  explicit Current(const Driver& driver) noexcept : driver_(&driver) {}
  const Driver* driver_;
};

/// One per process, made by whoever wires it.
class VisibleDevices {
 public:
  /// Reads what the driver tells; retains nothing. Errors: those of Driver::get(), Errc::cuda.
  [[nodiscard]] static Result<std::shared_ptr<VisibleDevices>> open();

  [[nodiscard]] const Driver& driver() const noexcept { return driver_; }
  [[nodiscard]] const std::vector<Device>& all() const noexcept { return devices_; }
  /// Null if this process does not see it.
  [[nodiscard]] const Device* find(const DeviceUuid& uuid) const noexcept;
  /// Null for a number that is none.
  [[nodiscard]] const Device* find(CUdevice ordinal) const noexcept;

  /// The context of one of all(). The first call for a device retains it, which may take hundreds
  /// of milliseconds; it goes when this object and all that was made in it are gone. Errors:
  /// Errc::cuda, also where the device's compute mode is exclusive and another process has it.
  [[nodiscard]] Result<std::shared_ptr<const Context>> context(const Device& device);

 private:
  explicit VisibleDevices(const Driver& driver) noexcept : driver_(driver) {}
  [[nodiscard]] Result<void> read();

  const Driver& driver_;
  std::vector<Device> devices_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Context>> contexts_;  ///< beside devices_; guarded by mutex_
};

}  // namespace refit::cuda
