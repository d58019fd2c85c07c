// Kernels: modules whose fatbin was looked at, and functions of them that run on the CPU.
//
// A fatbin's code cannot run here. What is checked is what would make the real driver refuse it:
// its magic, an image for the device, the kernel's name. What runs is the FakeCudaKernel of that
// name. Used under the driver's lock.
#pragma once

#include <cuda.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "support/fake_cuda/fake_cuda.hpp"

namespace fakecuda {

struct Context;

struct Module {
  std::string_view image;  ///< of the caller, who must keep it while the module is loaded
  int device = 0;          ///< physical index
  Context* context = nullptr;
};

struct Function {
  std::string name;
  const FakeCudaKernel* kernel = nullptr;
  Context* context = nullptr;
  CUmodule module = nullptr;
};

/// A launch, with copies of the parameters: the caller's may change before it runs.
struct Launch {
  const FakeCudaKernel* kernel;
  unsigned int grid[3];
  unsigned int block[3];
  std::vector<std::vector<std::byte>> parameters;

  void run(const Context& context) const;
};

/// The image as a whole, or what loading it onto a device of this capability returns.
CUresult inspect_fatbin(const void* image, int capability, std::string_view& whole);

void register_kernel(const FakeCudaKernel* kernel);
const FakeCudaKernel* find_kernel(std::string_view name);
/// FAKECUDA_KERNELS.
bool load_kernels(const std::string& path);

}  // namespace fakecuda
