// The kinds of memory that the conformance suite is instantiated for: each program that is built
// of it links host_kinds.cpp or cuda_kinds.cpp.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "support/model.hpp"

namespace refit::test {

enum class MemoryKind { host, cuda_legacy, cuda_vmm };

inline std::string name_of(MemoryKind kind) {
  switch (kind) {
    case MemoryKind::host:
      return "Host";
    case MemoryKind::cuda_legacy:
      return "CudaLegacy";
    case MemoryKind::cuda_vmm:
      return "CudaVmm";
  }
  return "None";
}

/// Of this program.
std::vector<MemoryKind> memory_kinds();

std::shared_ptr<ModelStorage> make_storage(MemoryKind kind,
                                           const std::vector<std::uint64_t>& tensor_bytes,
                                           int device = 0);

/// Whether a tensor in memory of the kind is cast: always, but for device memory in a build without
/// nvcc.
bool can_cast(MemoryKind kind);

/// Called when a test's clients and its daemon have ended: gives back what they may have shared,
/// and fails the test if anybody misused the driver.
void end_of_test();

}  // namespace refit::test
