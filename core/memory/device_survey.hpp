// What GPUs this process sees and what they can do for refits, for a person to read.
//
// Starts the driver, which may take hundreds of milliseconds; makes no context. Any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace refit {

struct SurveyedDevice {
  std::string label;  ///< UUID and name
  std::uint64_t memory_bytes = 0;
  bool one_process_only = false;  ///< its compute mode lets no second process in
  bool legacy_ipc = false;        ///< events and handles between processes
  bool vmm_fds = false;
};

struct DeviceSurvey {
  bool driver_there = false;
  int driver_version = 0;  ///< 13000 is CUDA 13.0
  std::string why_not;     ///< if it is not there, or could not be asked
  std::vector<SurveyedDevice> devices;
};

[[nodiscard]] DeviceSurvey survey_devices();

}  // namespace refit
