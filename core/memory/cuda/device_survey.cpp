#include "memory/device_survey.hpp"

#include "memory/cuda/device.hpp"

namespace refit {

DeviceSurvey survey_devices() {
  DeviceSurvey survey;
  const auto devices = cuda::VisibleDevices::open();
  if (!devices) {
    survey.why_not = devices.error().message;
    return survey;
  }
  survey.driver_there = true;
  survey.driver_version = (*devices)->driver().version();
  for (const cuda::Device& device : (*devices)->all()) {
    const bool shared = device.compute_mode == CU_COMPUTEMODE_DEFAULT;
    survey.devices.push_back({device.label(), device.memory_bytes, !shared,
                              device.ipc_events && device.unified_addressing,
                              device.vmm && device.posix_fd_handles});
  }
  return survey;
}

}  // namespace refit
