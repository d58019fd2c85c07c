// The fakecuda_* functions that tests call; fake_cuda.hpp says what they do.

#include <algorithm>
#include <cstring>
#include <string_view>

#include "support/fake_cuda/driver.hpp"

#define CONTROL __attribute__((visibility("default")))

extern "C" {

CONTROL int fakecuda_set_faults(const char* faults) {
  fakecuda::Driver& driver = fakecuda::driver();
  const std::lock_guard lock(driver.mutex);
  return driver.faults.set(faults) ? 0 : -1;
}

CONTROL std::uint64_t fakecuda_calls(const char* name) {
  return fakecuda::driver().process.page().calls_of(name == nullptr ? "" : name);
}

CONTROL std::uint64_t fakecuda_gauge(const char* name) {
  fakecuda::Driver& driver = fakecuda::driver();
  const std::lock_guard lock(driver.mutex);
  driver.publish_gauges();
  const fakecuda::ProcessPage& page = driver.process.page();
  for (std::size_t i = 0; i < std::size(fakecuda::kGaugeNames); ++i) {
    if (std::string_view(fakecuda::kGaugeNames[i]) == name) return page.gauges[i].load();
  }
  for (std::size_t i = 0; i < std::size(fakecuda::kTallyNames); ++i) {
    if (std::string_view(fakecuda::kTallyNames[i]) == name) return page.tallies[i].load();
  }
  return ~std::uint64_t{0};
}

CONTROL std::uint64_t fakecuda_take_violations(char* text, std::size_t text_bytes) {
  fakecuda::Driver& driver = fakecuda::driver();
  const std::lock_guard lock(driver.mutex);
  const std::string all = driver.process.page().violations();
  if (text_bytes > 0) {
    const std::size_t copied = std::min(text_bytes - 1, all.size());
    std::memcpy(text, all.data(), copied);
    text[copied] = '\0';
  }
  const std::uint64_t count = driver.process.page().tally(fakecuda::Tally::violations);
  driver.process.forget_violations();
  return count;
}

CONTROL void fakecuda_recover(void) {
  fakecuda::Driver& driver = fakecuda::driver();
  const std::lock_guard lock(driver.mutex);
  driver.engine.drop_everything();
  driver.sticky = CUDA_SUCCESS;
  driver.sticky_later = CUDA_SUCCESS;
  driver.leaks_excused = false;
}

CONTROL void fakecuda_reload(void) {
  fakecuda::Driver& driver = fakecuda::driver();
  const std::lock_guard lock(driver.mutex);
  fakecuda::Configuration fresh = fakecuda::Configuration::from_environment();
  fresh.directory = driver.configuration.directory;
  fresh.driver_version = driver.configuration.driver_version;
  fresh.devices = driver.configuration.devices;
  fresh.visible = driver.configuration.visible;
  fresh.absent = driver.configuration.absent;
  if (!driver.faults.set(fresh.faults)) fakecuda::misconfigured("FAKECUDA_FAULT", fresh.faults);
  driver.configuration = std::move(fresh);
  driver.engine.restart_numbering();
  driver.last_choice = 0;
}

}  // extern "C"
