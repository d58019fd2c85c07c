#include "memory/cuda/kernels/image.hpp"

namespace refit::cuda {

std::span<const std::byte> kernel_image() noexcept { return {}; }

}  // namespace refit::cuda
