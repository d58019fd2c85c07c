// A shared object for FAKECUDA_KERNELS: the kernels of core/memory/cuda/kernels/strided_copy.cu as
// the fake driver runs them, of the same source, with device memory where the fake has it.

#include <array>

#include "memory/cast.hpp"
#include "memory/cuda/kernels/strided_copy.hpp"
#include "support/fake_cuda/fake_cuda.hpp"

namespace {

using refit::cuda::StridedCopyTable;

/// What must not be touched is the fake's to report; the kernel goes on elsewhere.
struct FakeMemory {
  const FakeCudaLaunch* launch;

  [[nodiscard]] const void* to_read(std::uint64_t address, std::size_t bytes) const {
    return find(address, bytes, 0);
  }
  [[nodiscard]] void* to_write(std::uint64_t address, std::size_t bytes) const {
    return find(address, bytes, 1);
  }

 private:
  [[nodiscard]] void* find(std::uint64_t address, std::size_t bytes, int write) const {
    alignas(8) static std::byte nowhere[sizeof(refit::cuda::StridedCopy)];
    void* const found = launch->bytes(address, bytes, write);
    return found != nullptr ? found : nowhere;
  }
};

template <typename Unit>
void run(const FakeCudaLaunch* launch) {
  const auto& table = *static_cast<const StridedCopyTable*>(launch->parameters[0]);
  const std::uint64_t threads = std::uint64_t{launch->grid[0]} * launch->block[0];
  for (std::uint64_t i = 0; i < threads; ++i)
    refit::cuda::copy_strided<Unit>(table, i, threads, FakeMemory{launch});
}

constexpr std::size_t kParameterBytes[] = {sizeof(StridedCopyTable)};

}  // namespace

extern "C" __attribute__((visibility("default"))) const FakeCudaKernel* fakecuda_kernels() {
  static std::array<FakeCudaKernel, refit::kCastCount> kernels{
      FakeCudaKernel{"refit_none", kParameterBytes, 1, &run<refit::cuda::PlainUnit>, nullptr},
#define REFIT_X(from, to)                                       \
  FakeCudaKernel{"refit_" #from "_to_" #to, kParameterBytes, 1, \
                 &run<refit::cuda::CastUnit<&refit::cast::from##_to_##to>>, nullptr},
      REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  };
  for (std::size_t i = 0; i + 1 < kernels.size(); ++i) kernels[i].next = &kernels[i + 1];
  return kernels.data();
}
