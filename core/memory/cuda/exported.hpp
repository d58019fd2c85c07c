// Device memory that one process made reachable for another: what export_memory() makes, what goes
// over the wire, and what Importer takes. Plain data; on the importer's side untrusted.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "memory/cuda/device.hpp"
#include "posix/unique_fd.hpp"

namespace refit::cuda {

/// How memory is reached. The numbers travel.
enum class HandleKind : std::uint8_t {
  legacy = 1,  ///< cuMemAlloc: a handle of the whole allocation, a bearer secret without access
               ///< rights; dies with the exporter
  vmm = 2,     ///< cuMemCreate: an fd for each segment, which keeps the memory
  local = 3,   ///< an address, within one process
};

/// Opaque to all but the driver: no two of one allocation need be equal.
using IpcHandle = std::array<std::byte, CU_IPC_HANDLE_SIZE>;

/// One allocation that holds a part of a region.
struct Piece {
  IpcHandle handle{};       ///< legacy
  UniqueFd fd;              ///< vmm
  std::uint64_t bytes = 0;  ///< of the whole allocation or segment
  /// Of the exporter's process, never given twice in its life: other memory has another one.
  std::uint64_t allocation_id = 0;
};

/// A region: `bytes` from `offset` in the first piece on.
struct Exported {
  DeviceUuid device;
  HandleKind kind = HandleKind::legacy;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  CUdeviceptr address = 0;    ///< local: of the region's first byte
  std::vector<Piece> pieces;  ///< in the order of their addresses; of vmm several, else one
};

}  // namespace refit::cuda
