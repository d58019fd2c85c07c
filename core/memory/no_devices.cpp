// What stands behind devices.hpp, device_sharing.hpp and device_survey.hpp where CUDA's headers
// were not found: a word that says so.
#include "memory/device_sharing.hpp"
#include "memory/device_survey.hpp"
#include "memory/devices.hpp"

namespace refit {
namespace {

Unexpected not_built() {
  return fail(Errc::unsupported,
              "this build is for host memory only: it was configured without CUDA's headers");
}

}  // namespace

Result<std::unique_ptr<Devices>> Devices::create(const DeviceOptions&) { return not_built(); }

bool Devices::is_lost(const Error&) noexcept { return false; }

Result<std::shared_ptr<SharedDeviceMemory>> share_device_memory(const void*, std::uint64_t,
                                                                const std::string&) {
  return not_built();
}

Result<std::shared_ptr<SharedDeviceEvent>> share_device_event(const void*, void*,
                                                              const std::string&) {
  return not_built();
}

DeviceSurvey survey_devices() {
  DeviceSurvey survey;
  survey.why_not = not_built().value().message;
  return survey;
}

}  // namespace refit
