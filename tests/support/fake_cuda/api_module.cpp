// Modules, functions, launches.

#include <cstring>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"
#include "support/fake_cuda/kernels.hpp"

namespace fakecuda {

CUresult module_load_data(CUmodule* handle, const void* image) {
  Driver& driver = fakecuda::driver();
  if (handle == nullptr || image == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto module = std::make_shared<Module>();
  module->context = Driver::current();
  module->device = module->context->device;
  const CUresult fits =
      inspect_fatbin(image, driver.device(module->device).capability, module->image);
  if (fits == CUDA_SUCCESS) *handle = driver.modules.add(std::move(module));
  return fits;
}

CUresult module_get_function(CUfunction* handle, CUmodule module_handle, const char* name) {
  Driver& driver = fakecuda::driver();
  if (handle == nullptr || name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto module = driver.modules.find(module_handle);
  if (module == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  // nvcc leaves binary code uncompressed: the name of each kernel stands in it.
  if (module->image.find(name) == std::string_view::npos) return CUDA_ERROR_NOT_FOUND;
  const FakeCudaKernel* kernel = find_kernel(name);
  if (kernel == nullptr) {
    driver.violation(
        text("kernel ", name, " is in the fatbin, but no FakeCudaKernel of that name"));
    return CUDA_ERROR_NOT_FOUND;
  }
  auto function = std::make_shared<Function>();
  function->name = name;
  function->kernel = kernel;
  function->context = module->context;
  function->module = module_handle;
  *handle = driver.functions.add(std::move(function));
  return CUDA_SUCCESS;
}

CUresult module_unload(CUmodule handle) {
  Driver& driver = fakecuda::driver();
  if (driver.modules.find(handle) == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  driver.functions.remove_if(
      [handle](const Function& function) { return function.module == handle; });
  driver.modules.remove(handle);
  return CUDA_SUCCESS;
}

CUresult launch_kernel(CUfunction handle, unsigned int grid_x, unsigned int grid_y,
                       unsigned int grid_z, unsigned int block_x, unsigned int block_y,
                       unsigned int block_z, unsigned int, CUstream stream_handle,
                       void** parameters, void** extra) {
  Driver& driver = fakecuda::driver();
  constexpr unsigned int kThreadsMax = 1024;
  const auto function = driver.functions.find(handle);
  if (function == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const bool dimensions = grid_x > 0 && grid_y > 0 && grid_z > 0 && block_x > 0 && block_y > 0 &&
                          block_z > 0 && block_x * block_y * block_z <= kThreadsMax;
  if (!dimensions || extra != nullptr ||
      (parameters == nullptr && function->kernel->parameter_count > 0))
    return CUDA_ERROR_INVALID_VALUE;
  const auto stream = driver.usable_stream(stream_handle);
  if (!stream) return stream.error();
  if (function->context != (*stream)->context) return CUDA_ERROR_INVALID_HANDLE;
  auto launch = std::make_shared<Launch>();
  launch->kernel = function->kernel;
  const unsigned int grid[] = {grid_x, grid_y, grid_z};
  const unsigned int block[] = {block_x, block_y, block_z};
  std::memcpy(launch->grid, grid, sizeof grid);
  std::memcpy(launch->block, block, sizeof block);
  for (std::size_t i = 0; i < function->kernel->parameter_count; ++i) {
    const auto* value = static_cast<const std::byte*>(parameters[i]);
    launch->parameters.emplace_back(value, value + function->kernel->parameter_bytes[i]);
  }
  driver.engine.enqueue(**stream, std::shared_ptr<const Launch>(std::move(launch)));
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
