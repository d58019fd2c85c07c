// The kernels as nvcc compiled them, for all devices that they were compiled for.
#pragma once

#include <cstddef>
#include <span>

namespace refit::cuda {

/// A fatbin, in this program for as long as it runs; empty where it was built without nvcc.
[[nodiscard]] std::span<const std::byte> kernel_image() noexcept;

}  // namespace refit::cuda
