// Importer: device memory of other processes, opened once and mapped for as long as anybody uses
// it.
//
// Any number of threads, each call up to milliseconds: not for a thread that serves others. Of an
// Exported everything was written by a peer: it is checked before the driver sees it, and again
// against what the driver says of the memory. Knows nothing of sessions but a number.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "ipc/segment.hpp"
#include "memory/cuda/device.hpp"
#include "memory/exported.hpp"

namespace refit::cuda {

/// A region of device memory, mapped here. Copies of the shared pointer keep it mapped; the last
/// one must go when no copy on a stream uses it any more, and may block in the driver.
struct DeviceMemory {
  std::shared_ptr<const Context> context;  ///< of the memory's device
  CUdeviceptr address = 0;                 ///< of the region's first byte
  std::uint64_t bytes = 0;
  RegionKind kind = RegionKind::cuda_legacy;
  std::uint64_t allocation_id = 0;  ///< of its first piece, in the exporter's numbers
  /// What it was opened for. The device enforces it of vmm only: other kinds have no rights.
  Access access = Access::read_only;
  std::shared_ptr<const void> mapping;  ///< shared by all regions of one legacy allocation
};

class Importer {
 public:
  /// @param legacy_across_uids  take legacy handles of other users: cuda.legacy_across_uids.
  Importer(std::shared_ptr<VisibleDevices> devices, bool legacy_across_uids) noexcept
      : devices_(std::move(devices)), legacy_across_uids_(legacy_across_uids) {}
  Importer(const Importer&) = delete;
  Importer& operator=(const Importer&) = delete;

  /// Opens and maps a region. The fds stay the caller's and may be closed when this returns.
  ///
  /// Errors: Errc::bad_region for everything that the exporter can be wrong about (sizes and
  /// offsets, a device that this process does not see, a handle or an fd that is none, is of
  /// another device, or whose process is gone); Errc::permission for a legacy handle of another
  /// user; Errc::cuda for the rest. Nothing is left open then. `label` names the region.
  [[nodiscard]] Result<std::shared_ptr<const DeviceMemory>> open(const Exporter& exporter,
                                                                 const Exported& exported,
                                                                 Access access,
                                                                 const std::string& label);

  /// Legacy allocations that are open now; regions of one allocation count once.
  [[nodiscard]] std::size_t open_allocations();

 private:
  struct Allocation;
  using Key = std::pair<std::uint64_t, std::uint64_t>;  ///< session, allocation id

  Result<void> open_legacy(const Exporter& exporter, const Exported& exported,
                           const std::string& label, DeviceMemory& memory);
  Result<std::shared_ptr<const Allocation>> allocation_of(
      const Key& key, const std::shared_ptr<const Context>& context, const IpcHandle& handle,
      const std::string& label);
  Result<void> open_local(const Exporter& exporter, const Exported& exported,
                          const std::string& label, DeviceMemory& memory);

  const std::shared_ptr<VisibleDevices> devices_;
  const bool legacy_across_uids_;
  /// Also held while a handle is opened, so that no two threads open one; the driver would let
  /// them wait for each other anyway.
  std::mutex mutex_;
  std::map<Key, std::weak_ptr<const Allocation>> allocations_;
};

}  // namespace refit::cuda
