// The kernels: each is copy_strided() with one thread's place in the grid. Their names are those
// that core/memory/cuda/kernels.cpp asks for.
#include "memory/cast.hpp"
#include "memory/cuda/kernels/strided_copy.hpp"

namespace {

struct Pointers {
  __device__ static const void* to_read(std::uint64_t address, std::size_t) {
    return reinterpret_cast<const void*>(address);
  }
  __device__ static void* to_write(std::uint64_t address, std::size_t) {
    return reinterpret_cast<void*>(address);
  }
};

template <typename Unit>
__device__ void run(const refit::cuda::StridedCopyTable& table) {
  refit::cuda::copy_strided<Unit>(
      table, std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x,
      std::uint64_t{gridDim.x} * blockDim.x, Pointers{});
}

}  // namespace

extern "C" __global__ void __launch_bounds__(refit::cuda::kLanes)
    refit_none(const refit::cuda::StridedCopyTable table) {
  run<refit::cuda::PlainUnit>(table);
}

#define REFIT_X(from, to)                                           \
  extern "C" __global__ void __launch_bounds__(refit::cuda::kLanes) \
      refit_##from##_to_##to(const refit::cuda::StridedCopyTable table) { \
    run<refit::cuda::CastUnit<&refit::cast::from##_to_##to>>(table); \
  }
REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
