// Configuration: the environment of fake_cuda.hpp, read once.
//
// Knows nothing of the driver's state. What cannot be read ends the process: a test that is set up
// wrongly must not pass.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace fakecuda {

struct DeviceSettings {
  std::uint64_t memory_bytes = std::uint64_t{16} << 30;
  std::uint64_t granularity = std::uint64_t{2} << 20;
  int compute_mode = 0;
  int capability = 90;
  bool ipc = true;
  bool vmm = true;
  bool pools = true;
  bool peers = true;
  bool read_only_register = true;
};

enum class ExporterDeath { poison, keep, fault };
enum class OnViolation { exit, abort, ignore };
enum class Schedule { lazy, eager, mixed };

struct Configuration {
  std::string directory;
  int driver_version = 13000;
  std::uint64_t seed = 0;
  std::string role;
  std::vector<Schedule> schedule{Schedule::lazy};  ///< of stream i: element i modulo their number
  std::vector<DeviceSettings> devices;
  std::vector<int> visible;  ///< physical index of each ordinal
  std::vector<bool> absent;  ///< by physical index
  std::uint64_t host_register_max = std::uint64_t{512} << 30;
  bool foreign_uid = false;
  ExporterDeath exporter_death = ExporterDeath::poison;
  bool reuse_addresses = false;
  std::string faults;
  std::string kernels;
  OnViolation on_violation = OnViolation::exit;
  bool leaks_count = true;

  static Configuration from_environment();
};

/// The same on every machine and in every process, so that fixtures can name devices.
void device_uuid(int physical, unsigned char (&uuid)[16]);

/// "a,b,c" as its parts.
std::vector<std::string> split(std::string_view text, char separator);
/// Ends the process, naming the variable.
[[noreturn]] void misconfigured(std::string_view variable, std::string_view value);

}  // namespace fakecuda
