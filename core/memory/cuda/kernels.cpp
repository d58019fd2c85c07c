#include "memory/cuda/kernels.hpp"

#include <algorithm>

#include "memory/cuda/kernels/image.hpp"

namespace refit::cuda {
namespace {

/// More than any device has room for at once; blocks take one tile after the other.
constexpr std::uint64_t kBlocksMax = 4096;

constexpr std::array<const char*, kCastCount> kNames{"refit_none"
#define REFIT_X(from, to) , "refit_" #from "_to_" #to
                                                     REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
};

}  // namespace

Result<std::unique_ptr<Kernels>> Kernels::load(const std::shared_ptr<const Context>& context) {
  const Driver& driver = context->driver();
  const Device& device = context->device();
  if (kernel_image().empty()) {
    return fail(Errc::unsupported,
                "this build has no kernels: it was configured without nvcc (docs/gpu.md)");
  }
  if (driver.module_load_data == nullptr || driver.module_get_function == nullptr ||
      driver.module_unload == nullptr || driver.launch_kernel == nullptr ||
      driver.mem_alloc == nullptr || driver.mem_free == nullptr)
    return fail(Errc::unsupported, "this CUDA driver has no calls for kernels: update it");
  if (!device.host_pointers)
    return fail(Errc::unsupported, "device " + device.label() +
                                       " does not reach pinned host memory by its own addresses");
  const std::string what = "loading the kernels onto device " + device.label();
  REFIT_TRY_ASSIGN(const auto current, Current::enter(*context));
  std::unique_ptr<Kernels> kernels(new Kernels(context));
  // Unloaded also where the driver loaded it and says that it did not.
  REFIT_TRY_CUDA(driver, module_load_data(&kernels->module_, kernel_image().data()),
                 what + " (cuModuleLoadData)");
  for (std::size_t i = 0; i < kNames.size(); ++i) {
    REFIT_TRY_CUDA(driver,
                   module_get_function(&kernels->functions_[i], kernels->module_, kNames[i]),
                   what + ": " + kNames[i] + " (cuModuleGetFunction)");
  }
  return kernels;
}

Kernels::~Kernels() {
  const auto current = Current::enter(*context_);
  if (current && module_ != nullptr) context_->driver().module_unload(module_);
}

CUresult Kernels::launch(const Driver& driver, CUfunction kernel, StridedCopyTable table,
                         CUstream stream) noexcept {
  const std::uint64_t tiles = (table.units + kTileUnits - 1) / kTileUnits;
  const auto blocks = static_cast<unsigned int>(std::min(tiles, kBlocksMax));
  void* parameters[] = {&table};
  return driver.launch_kernel(kernel, blocks, 1, 1, kLanes, 1, 1, 0, stream, parameters, nullptr);
}

}  // namespace refit::cuda
