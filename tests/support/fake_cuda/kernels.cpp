#include "support/fake_cuda/kernels.hpp"

#include <dlfcn.h>

#include <cstring>

#include "support/fake_cuda/driver.hpp"

namespace fakecuda {
namespace {

/// Measured from what nvcc 13.0 writes.
constexpr std::uint32_t kFatbinMagic = 0xba55ed50;
constexpr std::uint32_t kWrapperMagic = 0x466243b1;
constexpr std::uint16_t kPtx = 1;
constexpr std::uint16_t kElf = 2;
struct FatbinHeader {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t header_bytes;
  std::uint64_t bytes;
};
struct FatbinEntry {
  std::uint16_t kind;
  std::uint16_t version;
  std::uint32_t header_bytes;
  std::uint64_t bytes;
  std::uint32_t other[3];
  std::uint32_t capability;
};

std::vector<const FakeCudaKernel*>& table() {
  static auto* kernels = new std::vector<const FakeCudaKernel*>;
  return *kernels;
}

/// The context that the running kernel is in; kernels run one at a time, under the lock.
const Context* running_in = nullptr;

void* bytes_for_kernel(std::uint64_t address, std::size_t bytes, int write) {
  Driver& driver = fakecuda::driver();
  const Range* range = driver.ranges.find(address);
  // A copy finds its way between any two devices; a kernel reads the other's memory itself.
  const bool needs_peer = range != nullptr && range->device != running_in->device &&
                          (range->kind == RangeKind::allocation || range->kind == RangeKind::pool);
  if (needs_peer && !running_in->peers[static_cast<std::size_t>(range->device)]) {
    const std::string complaint =
        text("a kernel touched ", Hex{address}, " of a device to which it has no peer access");
    driver.violation(complaint);
    driver.fail_device(CUDA_ERROR_ILLEGAL_ADDRESS, complaint);
    return nullptr;
  }
  return driver.touch(address, bytes, write != 0, running_in->device);
}

}  // namespace

CUresult inspect_fatbin(const void* image, int capability, std::string_view& whole) {
  const auto* bytes = static_cast<const char*>(image);
  FatbinHeader header{};
  std::memcpy(&header.magic, bytes, sizeof header.magic);
  if (header.magic == kWrapperMagic) {
    std::memcpy(&bytes, bytes + 8, sizeof bytes);
    std::memcpy(&header.magic, bytes, sizeof header.magic);
  }
  if (header.magic != kFatbinMagic) return CUDA_ERROR_INVALID_IMAGE;
  std::memcpy(&header, bytes, sizeof header);
  whole = {bytes, header.header_bytes + header.bytes};
  for (std::size_t at = header.header_bytes; at + sizeof(FatbinEntry) <= whole.size();) {
    FatbinEntry entry{};
    std::memcpy(&entry, bytes + at, sizeof entry);
    if (entry.header_bytes < sizeof entry) return CUDA_ERROR_INVALID_IMAGE;
    const auto arch = static_cast<int>(entry.capability);
    // Binary code runs on the same major capability, PTX on every later one.
    if (entry.kind == kElf && arch / 10 == capability / 10 && arch <= capability)
      return CUDA_SUCCESS;
    if (entry.kind == kPtx && arch <= capability) return CUDA_SUCCESS;
    at += entry.header_bytes + entry.bytes;
  }
  return CUDA_ERROR_NO_BINARY_FOR_GPU;
}

void register_kernel(const FakeCudaKernel* kernel) { table().push_back(kernel); }

const FakeCudaKernel* find_kernel(std::string_view name) {
  for (const FakeCudaKernel* kernel : table()) {
    if (kernel->name == name) return kernel;
  }
  return nullptr;
}

bool load_kernels(const std::string& path) {
  // Never closed: its kernels are in the table.
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return false;
  const auto first =
      reinterpret_cast<const FakeCudaKernel* (*)()>(::dlsym(library, "fakecuda_kernels"));
  if (first == nullptr) return false;
  for (const FakeCudaKernel* kernel = first(); kernel != nullptr; kernel = kernel->next)
    register_kernel(kernel);
  return true;
}

void Launch::run(const Context& context) const {
  std::vector<void*> pointers;
  for (const auto& parameter : parameters)
    pointers.push_back(const_cast<std::byte*>(parameter.data()));
  FakeCudaLaunch launch{};
  std::memcpy(launch.grid, grid, sizeof grid);
  std::memcpy(launch.block, block, sizeof block);
  launch.parameters = pointers.data();
  launch.bytes = &bytes_for_kernel;
  running_in = &context;
  kernel->run(&launch);
  running_in = nullptr;
}

}  // namespace fakecuda

extern "C" {

__attribute__((visibility("default"))) void fakecuda_register_kernel(const FakeCudaKernel* kernel) {
  const std::lock_guard lock(fakecuda::driver().mutex);
  fakecuda::register_kernel(kernel);
}

}  // extern "C"
