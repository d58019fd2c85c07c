#include "support/fake_cuda/configuration.hpp"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>

#include "support/fake_cuda/draw.hpp"

namespace fakecuda {
namespace {

std::string variable(const std::string& name) {
  const char* value = std::getenv(name.c_str());
  return value == nullptr ? "" : value;
}

std::uint64_t number(const std::string& name, const std::string& text) {
  char* end = nullptr;
  std::uint64_t value = std::strtoull(text.c_str(), &end, 10);
  static const std::map<std::string_view, unsigned> kUnits{
      {"", 0}, {"K", 10}, {"M", 20}, {"G", 30}};
  const auto unit = kUnits.find(end);
  if (end == text.c_str() || unit == kUnits.end()) misconfigured(name, text);
  return value << unit->second;
}

std::uint64_t number_or(const std::string& name, std::uint64_t otherwise) {
  const std::string text = variable(name);
  return text.empty() ? otherwise : number(name, text);
}

template <typename T>
T choice(const std::string& name, const std::map<std::string, T>& choices, T otherwise) {
  const std::string text = variable(name);
  if (text.empty()) return otherwise;
  const auto found = choices.find(text);
  if (found == choices.end()) misconfigured(name, text);
  return found->second;
}

DeviceSettings device_settings(const std::string& name) {
  DeviceSettings device;
  for (const std::string& setting : split(variable(name), ',')) {
    const std::size_t equals = setting.find('=');
    if (equals == std::string::npos) misconfigured(name, setting);
    const std::string key = setting.substr(0, equals);
    const std::uint64_t value = number(name, setting.substr(equals + 1));
    static const std::map<std::string, bool DeviceSettings::*> kSwitches{
        {"ipc", &DeviceSettings::ipc},
        {"vmm", &DeviceSettings::vmm},
        {"pools", &DeviceSettings::pools},
        {"peers", &DeviceSettings::peers},
        {"read_only_register", &DeviceSettings::read_only_register}};
    if (const auto found = kSwitches.find(key); found != kSwitches.end()) {
      device.*found->second = value != 0;
    } else if (key == "memory") {
      device.memory_bytes = value;
    } else if (key == "granularity") {
      device.granularity = value;
    } else if (key == "compute_mode") {
      device.compute_mode = static_cast<int>(value);
    } else if (key == "cc") {
      device.capability = static_cast<int>(value);
    } else {
      misconfigured(name, setting);
    }
  }
  return device;
}

std::string uuid_text(int physical) {
  unsigned char uuid[16];
  device_uuid(physical, uuid);
  std::string text = "GPU-";
  for (std::size_t i = 0; i < 16; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", uuid[i]);
    text += digits;
  }
  return text;
}

/// As the real driver does it, the list ends at the first entry that names no device.
std::vector<int> visible_devices(int count) {
  std::vector<int> visible;
  if (std::getenv("CUDA_VISIBLE_DEVICES") == nullptr) {
    for (int i = 0; i < count; ++i) visible.push_back(i);
    return visible;
  }
  for (const std::string& entry : split(variable("CUDA_VISIBLE_DEVICES"), ',')) {
    int found = -1;
    for (int i = 0; i < count; ++i) {
      const bool named = entry == std::to_string(i) ||
                         (entry.rfind("GPU-", 0) == 0 && uuid_text(i).rfind(entry, 0) == 0);
      if (named) found = i;
    }
    if (found < 0) break;
    visible.push_back(found);
  }
  return visible;
}

std::vector<Schedule> schedule() {
  static const std::map<std::string, Schedule> kNames{
      {"lazy", Schedule::lazy}, {"eager", Schedule::eager}, {"mixed", Schedule::mixed}};
  std::vector<Schedule> pattern;
  for (const std::string& name : split(variable("FAKECUDA_SCHEDULE"), ',')) {
    const auto found = kNames.find(name);
    if (found == kNames.end()) misconfigured("FAKECUDA_SCHEDULE", name);
    pattern.push_back(found->second);
  }
  if (pattern.empty()) pattern.push_back(Schedule::lazy);
  return pattern;
}

}  // namespace

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(separator), text.size());
    if (end > 0) parts.emplace_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return parts;
}

void misconfigured(std::string_view variable, std::string_view value) {
  std::fprintf(stderr, "fakecuda: cannot use %.*s: \"%.*s\"\n", static_cast<int>(variable.size()),
               variable.data(), static_cast<int>(value.size()), value.data());
  std::abort();
}

void device_uuid(int physical, unsigned char (&uuid)[16]) {
  Draw draw(0, "", "device uuid", static_cast<std::uint64_t>(physical));
  const std::uint64_t halves[2] = {draw.next(), draw.next()};
  std::memcpy(uuid, halves, sizeof uuid);
}

Configuration Configuration::from_environment() {
  Configuration made;
  made.directory = variable("FAKECUDA_DIR");
  made.driver_version = static_cast<int>(number_or("FAKECUDA_DRIVER_VERSION", 13000));
  made.seed = number_or("FAKECUDA_SEED", 0);
  made.role = variable("FAKECUDA_ROLE");
  made.schedule = fakecuda::schedule();
  const auto count = static_cast<int>(number_or("FAKECUDA_DEVICES", 2));
  for (int i = 0; i < count; ++i)
    made.devices.push_back(device_settings("FAKECUDA_DEVICE_" + std::to_string(i)));
  made.absent.resize(made.devices.size());
  for (const std::string& index : split(variable("FAKECUDA_ABSENT_DEVICES"), ',')) {
    const std::uint64_t device = number("FAKECUDA_ABSENT_DEVICES", index);
    if (device >= made.absent.size()) misconfigured("FAKECUDA_ABSENT_DEVICES", index);
    made.absent[device] = true;
  }
  for (const int physical : visible_devices(count)) {
    if (!made.absent[static_cast<std::size_t>(physical)]) made.visible.push_back(physical);
  }
  made.host_register_max = number_or("FAKECUDA_HOST_REGISTER_MAX", made.host_register_max);
  made.foreign_uid = choice<bool>("FAKECUDA_FOREIGN_UID", {{"allow", true}}, false);
  made.exporter_death = choice<ExporterDeath>("FAKECUDA_EXPORTER_DEATH",
                                              {{"poison", ExporterDeath::poison},
                                               {"keep", ExporterDeath::keep},
                                               {"fault", ExporterDeath::fault}},
                                              ExporterDeath::poison);
  made.reuse_addresses = number_or("FAKECUDA_REUSE_ADDRESSES", 0) != 0;
  made.faults = variable("FAKECUDA_FAULT");
  made.kernels = variable("FAKECUDA_KERNELS");
  made.on_violation = choice<OnViolation>(
      "FAKECUDA_ON_VIOLATION",
      {{"exit", OnViolation::exit}, {"abort", OnViolation::abort}, {"ignore", OnViolation::ignore}},
      OnViolation::exit);
  made.leaks_count = choice<bool>("FAKECUDA_ON_LEAK", {{"exit", true}, {"ignore", false}}, true);
  return made;
}

}  // namespace fakecuda
