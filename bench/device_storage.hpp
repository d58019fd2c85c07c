// Device memory behind storage.hpp: `cuda`, `cuda-vmm` and `offload`.
//
// One thread. In a build without CUDA's headers no_device_storage.cpp says that there is none.
#pragma once

#include "storage.hpp"

namespace refit::bench {

/// Errors: as make_memory_kind().
[[nodiscard]] Result<std::unique_ptr<MemoryKind>> make_device_kind(const std::string& name);

}  // namespace refit::bench
