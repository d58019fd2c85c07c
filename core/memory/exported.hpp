// Device memory that one process made reachable for another, without a word of CUDA: what an export
// makes, what goes over the wire, and what an import takes.
//
// Plain data, any thread. On the importer's side untrusted but for Exporter.
#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "posix/unique_fd.hpp"

namespace refit {

/// Where a region's memory is, and how it is reached. The numbers travel on the wire.
enum class RegionKind : std::uint8_t {
  host = 0,
  cuda_legacy = 1,  ///< cuMemAlloc: a handle of the whole allocation, a bearer secret without
                    ///< access rights; dies with the exporter
  cuda_vmm = 2,     ///< cuMemCreate: an fd for each segment, which keeps the memory
  cuda_local = 3,   ///< an address of this very process, which may not open its own handles
};

/// As nvidia-smi -L prints it; of a MIG instance its own, not its GPU's.
struct DeviceUuid {
  std::array<std::uint8_t, 16> bytes{};

  /// "GPU-" and 32 digits in five groups.
  [[nodiscard]] std::string text() const;
  friend bool operator==(const DeviceUuid&, const DeviceUuid&) = default;
};

/// Of memory or of an event. Opaque to all but the driver: no two of one allocation need be equal.
using IpcHandle = std::array<std::uint8_t, 64>;

/// One allocation that holds a part of a region.
struct DevicePiece {
  IpcHandle handle{};       ///< legacy
  UniqueFd fd;              ///< vmm
  std::uint64_t bytes = 0;  ///< of the whole allocation or segment
  /// Of the exporter's process, never given twice in its life: other memory has another one. Over
  /// the wire only the first piece has one.
  std::uint64_t allocation_id = 0;
};

/// A region: `bytes` from `offset` in the first piece on.
struct Exported {
  DeviceUuid device;
  RegionKind kind = RegionKind::cuda_legacy;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  std::uint64_t address = 0;        ///< local: of the region's first byte
  std::vector<DevicePiece> pieces;  ///< in the order of their addresses; of vmm several, else one
};

/// Who exported, as the kernel told it; no message has a say in it.
struct Exporter {
  std::uint64_t session = 0;  ///< unique in this daemon's life
  pid_t pid = 0;
  uid_t uid = 0;
};

}  // namespace refit
