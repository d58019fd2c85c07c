// What all kinds of memory have in common, and the choice among them. See storage.hpp.
//
// One thread. Must not know how any kind allocates.
#include "storage.hpp"

#include "device_storage.hpp"
#include "host_storage.hpp"

namespace refit::bench {

Storage::~Storage() = default;

void Storage::lie_at(std::byte* address, std::byte* view) {
  address_ = address;
  view_ = {view, side_.layout};
}

void Storage::register_in(std::shared_ptr<Memory> region, std::shared_ptr<DeviceFence> fence) {
  region_ = std::move(region);
  fence_ = std::move(fence);
}

Result<ModuleSpec> Storage::module(const std::string& name) const {
  REFIT_ASSERT(region_ != nullptr);
  ModuleSpec module(name);
  module.set_fence(fence_);
  REFIT_TRY(begin(module));
  for (std::size_t i = 0; i < side_.tensors.size(); ++i) {
    const ModelTensor& tensor = side_.tensors[i];
    REFIT_TRY(module.add(tensor.name, side_.dtype, tensor.shape, region_,
                         address_ + side_.layout.offsets[i]));
  }
  REFIT_TRY(complete(module));
  return module;
}

Result<std::pair<double, std::uint64_t>> Storage::populate_fresh(int) const {
  return fail(Errc::unsupported, "a device's memory has no pages to populate");
}

Result<std::unique_ptr<MemoryKind>> make_memory_kind(const std::string& name) {
  if (name == kHostMemory) return make_host_kind();
  return make_device_kind(name);
}

}  // namespace refit::bench
