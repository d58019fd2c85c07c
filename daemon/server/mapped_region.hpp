// MappedRegion: memory of a client as this daemon reaches it: mapped host memory, or imported
// device memory.
#pragma once

#include <memory>
#include <string>

#include "ipc/segment.hpp"
#include "memory/devices.hpp"

namespace refit::daemon {

struct MappedRegion {
  std::uint64_t bytes = 0;
  RegionKind kind = RegionKind::host;
  Mapping host;                          ///< of host memory only
  std::shared_ptr<PinnedMemory> pinned;  ///< host memory that devices may copy; where there are any
  std::string why_not_pinned = "no device was there when it was registered; register it again";
  std::shared_ptr<DeviceRange> device;  ///< of device memory, once it is imported

  /// Where it begins. Of device memory no CPU may follow it, and it is null until imported.
  [[nodiscard]] std::byte* data() const noexcept {
    return kind == RegionKind::host ? host.data() : device == nullptr ? nullptr : device->address();
  }
  /// The number of its device, or kHostMemory.
  [[nodiscard]] int place() const noexcept {
    return device == nullptr ? kHostMemory : device->device();
  }
};

}  // namespace refit::daemon
