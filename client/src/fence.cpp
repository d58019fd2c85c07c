#include "fence.hpp"

#include <algorithm>

#include "memory/device_sharing.hpp"

namespace refit {
namespace {

const DeviceMemory* on_device(const std::shared_ptr<Memory>& memory) {
  return dynamic_cast<const DeviceMemory*>(memory.get());
}

}  // namespace

Result<void> mark_end_of_work(const ModuleSpec& module) {
  if (module.fence() == nullptr) return {};
  SharedDeviceEvent& event = module.fence()->event();
  REFIT_TRY(event.record());
  const auto& regions = module.regions();
  const bool any_on_host = std::any_of(regions.begin(), regions.end(), [](const auto& memory) {
    return on_device(memory) == nullptr;
  });
  return any_on_host ? event.synchronize() : Result<void>();
}

void settle_devices(const ModuleSpec& module) noexcept {
  for (const auto& memory : module.regions()) {
    // A device that answers nothing any more writes nothing either.
    if (const DeviceMemory* device = on_device(memory))
      static_cast<void>(device->shared().synchronize());
  }
}

}  // namespace refit
