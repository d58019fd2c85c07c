#include "memory/cuda/kernels/image.hpp"

// REFIT_KERNEL_IMAGE is the file that nvcc made.
asm(".section .rodata\n"
    ".balign 16\n"
    "refit_kernel_image:\n"
    ".incbin \"" REFIT_KERNEL_IMAGE
    "\"\n"
    "refit_kernel_image_end:\n"
    ".previous\n");
extern "C" {
extern const std::byte refit_kernel_image[];
extern const std::byte refit_kernel_image_end[];
}

namespace refit::cuda {

std::span<const std::byte> kernel_image() noexcept {
  return {refit_kernel_image, refit_kernel_image_end};
}

}  // namespace refit::cuda
