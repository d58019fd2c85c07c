// A shared object for FAKECUDA_KERNELS with one kernel: fake_add, here for no parameters.

#include "support/fake_cuda/fake_cuda.hpp"

extern "C" __attribute__((visibility("default"))) const FakeCudaKernel* fakecuda_kernels() {
  static const FakeCudaKernel kAdd{"fake_add", nullptr, 0, [](const FakeCudaLaunch*) {}, nullptr};
  return &kAdd;
}
