#include <gtest/gtest.h>

#include "conformance/memory_kinds.hpp"
#include "memory/cuda/kernels/image.hpp"
#include "support/cuda/device_storage.hpp"

namespace refit::test {

std::vector<MemoryKind> memory_kinds() { return {MemoryKind::cuda_legacy, MemoryKind::cuda_vmm}; }

std::shared_ptr<ModelStorage> make_storage(MemoryKind kind, const std::vector<std::uint64_t>& bytes,
                                           int device) {
  if (kind == MemoryKind::host) return std::make_shared<HostStorage>(bytes);
  const auto device_kind = kind == MemoryKind::cuda_legacy ? DeviceKind::legacy : DeviceKind::vmm;
  return std::make_shared<DeviceStorage>(device_kind, device, bytes);
}

bool can_cast(MemoryKind kind) {
  return kind == MemoryKind::host || !refit::cuda::kernel_image().empty();
}

void end_of_test() {
  DeviceStorage::free_retired();
  if (!cuda::Driver::fake()) return;
  char text[4096] = {};
  EXPECT_EQ(cuda::Driver::fake()->take_violations(text, sizeof text), 0U) << text;
}

}  // namespace refit::test
