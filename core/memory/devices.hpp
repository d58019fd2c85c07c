// Devices: all that the daemon does with GPU memory, without a word of CUDA: import what clients
// export, pin host memory, copy, and read back.
//
// Behind it stands core/memory/cuda, or nothing where that was not built or the host has no driver;
// then create() says so and everything else goes on. import(), pin(), open_event(), prepare()
// and readings block in the driver and are for background threads; jobs are submitted by the loop.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "ipc/segment.hpp"
#include "memory/copy_pool.hpp"
#include "memory/exported.hpp"
#include "posix/heartbeat.hpp"
#include "refit/result.hpp"

namespace refit {

/// Device memory that this process can address, for as long as somebody holds it.
class DeviceRange {
 public:
  virtual ~DeviceRange() = default;
  /// For copies on the device; a CPU that follows it dies.
  [[nodiscard]] std::byte* address() const noexcept { return address_; }
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// Its device's number in this process.
  [[nodiscard]] int device() const noexcept { return device_; }

 protected:
  DeviceRange(std::byte* address, std::uint64_t bytes, int device) noexcept
      : address_(address), bytes_(bytes), device_(device) {}

 private:
  std::byte* address_;
  std::uint64_t bytes_;
  int device_;
};

/// Host memory that devices copy from and to, for as long as somebody holds it.
class PinnedMemory {
 public:
  virtual ~PinnedMemory() = default;
};

/// Another process's event, for as long as somebody holds it.
class DeviceEvent {
 public:
  virtual ~DeviceEvent() = default;
  /// Whether all that was recorded before the call is done. Asks the driver and does not wait; any
  /// thread. Errors: Errc::cuda.
  [[nodiscard]] virtual Result<bool> passed() const = 0;
};

inline constexpr int kHostMemory = -1;

/// As CopyOp; each end is on a device, or in pinned host memory (kHostMemory), not both there.
struct DeviceOp {
  CopyOp copy;
  int source_device = kHostMemory;
  int target_device = kHostMemory;
  /// The moving buffer that the target is in, if any: it then counts from that buffer's start, and
  /// DeviceJob::place() says where that is.
  std::optional<std::uint32_t> part{};
};

/// How a device job ended.
struct DeviceOutcome {
  int code = 0;           ///< CUresult; 0 is success
  const char* call = "";  ///< the driver's function
  /// No later job will do better: only another process can.
  bool sticky = false;
  /// It failed before any of its copies was asked for: every target is as it was.
  bool untouched = false;
};

/// Copies that are prepared once and run many times; see CopyJob for what holds of it.
class DeviceJob {
 public:
  using Done = void (*)(void* context, DeviceOutcome outcome);
  virtual ~DeviceJob() = default;
  /// Where each part begins, from the next run on; one that is null is left out, and so are all
  /// before the first call. Not while it runs. Allocates nothing.
  virtual void place(std::span<std::byte* const> bases) noexcept = 0;
  /// There is nothing to copy with the parts where they are: it need not be submitted.
  [[nodiscard]] virtual bool idle() const noexcept = 0;
  /// For its next run: what it comes after, null for nothing, and who is told of its end, on a
  /// thread of the devices.
  virtual void arm(const DeviceEvent* source, const DeviceEvent* engine, Done done,
                   void* context) noexcept = 0;
};

/// Bytes of device memory on their way to a CPU, for one thread at a time. It may be destroyed
/// before all of them came.
class DeviceReading {
 public:
  virtual ~DeviceReading() = default;
  /// The next ones, in order, in a span that lives until the next call; none behind the last.
  /// Errors: Errc::cuda, and then no call more.
  [[nodiscard]] virtual Result<std::span<const std::byte>> next() = 0;
};

struct DeviceOptions {
  bool legacy_across_uids = false;  ///< take legacy handles of other users' processes
};

class Devices {
 public:
  /// Errors: Errc::unsupported where this build or this host has no CUDA; the message says which.
  static Result<std::unique_ptr<Devices>> create(const DeviceOptions& options);
  /// The error is one after which a device answers nothing any more in this process.
  [[nodiscard]] static bool is_lost(const Error& error) noexcept;
  virtual ~Devices() = default;

  /// Opens, or finds open, what a client exported. The fds stay the caller's and may be closed when
  /// this returns. Errors: Errc::bad_region names the region and what is wrong with it,
  /// Errc::permission for a legacy handle of another uid, Errc::cuda.
  virtual Result<std::shared_ptr<DeviceRange>> import(const Exporter& exporter,
                                                      const Exported& exported, Access access,
                                                      const std::string& label) = 0;
  virtual Result<std::shared_ptr<PinnedMemory>> pin(const Mapping& mapping, Access access,
                                                    const std::string& label) = 0;
  virtual Result<std::shared_ptr<DeviceEvent>> open_event(const DeviceUuid& device,
                                                          const IpcHandle& handle,
                                                          const std::string& label) = 0;
  /// Errors: Errc::unsupported for copies that no driver call does; Errc::cuda.
  virtual Result<std::unique_ptr<DeviceJob>> prepare(std::span<const DeviceOp> ops) = 0;
  /// Starts jobs that are armed: the devices have all of them before one is waited for. One thread
  /// at a time. Allocates nothing that a call with as many jobs did not before.
  virtual void submit(std::span<DeviceJob* const> jobs) noexcept = 0;
  /// Begins to read [begin, begin + bytes) of `range`; what is next is copied while the reader is
  /// at what it has. Any thread.
  [[nodiscard]] virtual Result<std::unique_ptr<DeviceReading>> read(const DeviceRange& range,
                                                                    std::uint64_t begin,
                                                                    std::uint64_t bytes) = 0;
  /// How far the thread is that asks the devices for copies, for whoever watches that it gets on.
  /// Waiting for a device is not hanging.
  [[nodiscard]] virtual WorkerReading read_worker() noexcept = 0;
};

}  // namespace refit
