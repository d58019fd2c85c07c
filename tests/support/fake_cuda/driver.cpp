#include "support/fake_cuda/driver.hpp"

#include <stdlib.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <utility>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/kernels.hpp"

namespace fakecuda {
namespace {

void at_exit(int code, void*) {
  Driver& driver = fakecuda::driver();
  // A child that was forked and not exec'd shares the page, but none of this is its own.
  if (driver.initialised_pid != ::getpid()) return;
  driver.stop();
  const std::string leaks = driver.leaks();
  bool bad = driver.process.page().tally(Tally::violations) > 0 &&
             driver.configuration.on_violation != OnViolation::ignore;
  if (!leaks.empty()) {
    std::fprintf(stderr, "fakecuda: left behind at exit%s:\n%s",
                 driver.leaks_excused ? " (excused by an injected failure)" : "", leaks.c_str());
    if (!driver.leaks_excused) driver.process.add(Tally::leaks);
    bad = bad || (driver.configuration.leaks_count && !driver.leaks_excused);
  }
  if (!bad || code != 0) return;
  std::fflush(nullptr);
  ::_exit(kBadExit);
}

}  // namespace

Driver& driver() {
  static auto* instance = new Driver;
  return *instance;
}

Driver::Driver() {
  for (std::size_t i = 0; i < contexts.size(); ++i) contexts[i].device = static_cast<int>(i);
}

CUresult Driver::start() {
  configuration = Configuration::from_environment();
  if (configuration.devices.size() > kDevicesMax)
    misconfigured("FAKECUDA_DEVICES", std::to_string(configuration.devices.size()));
  if (configuration.directory.empty() || !process.open(configuration) ||
      !doorbell.open(configuration.directory) || !arena.open()) {
    std::fprintf(stderr, "fakecuda: FAKECUDA_DIR must name a directory on tmpfs, not \"%s\"\n",
                 configuration.directory.c_str());
    return CUDA_ERROR_OPERATING_SYSTEM;
  }
  name_calls(process.page());
  if (!configuration.kernels.empty() && !load_kernels(configuration.kernels))
    misconfigured("FAKECUDA_KERNELS", configuration.kernels);
  if (configuration.visible.empty()) return CUDA_ERROR_NO_DEVICE;
  initialised_pid = ::getpid();
  worker = std::thread([this] { work(); });
  // Not by a destructor: the worker would still run while other static objects die. on_exit,
  // because atexit does not tell whether the process ends badly already.
  ::on_exit(at_exit, nullptr);
  return CUDA_SUCCESS;
}

void Driver::load_faults() {
  if (std::exchange(faults_loaded_, true)) return;
  const std::string wanted = Configuration::from_environment().faults;
  if (!faults.set(wanted)) misconfigured("FAKECUDA_FAULT", wanted);
}

void Driver::work() {
  std::unique_lock lock(mutex);
  while (!stopping) {
    const std::uint32_t observed = doorbell.observe();
    const bool done = engine.serve_others();
    publish_gauges();
    wait(observed, /*may_die=*/!done);
  }
}

void Driver::stop() {
  {
    const std::lock_guard lock(mutex);
    stopping = true;
  }
  doorbell.ring();
  worker.join();
  const std::lock_guard lock(mutex);
  if (engine.pending() > 0 && sticky == CUDA_SUCCESS && !leaks_excused)
    violation(text(engine.pending(), " operations that nobody waited for are lost at exit"));
  publish_gauges();
}

void Driver::wait(std::uint32_t observed, bool may_die) {
  mutex.unlock();
  doorbell.wait(observed, may_die);
  mutex.lock();
}

Context* Driver::find_context(CUcontext handle) {
  for (Context& context : contexts) {
    if (context.handle() == handle && context.retained > 0) return &context;
  }
  return nullptr;
}

std::optional<int> Driver::physical_of(CUdevice ordinal) const {
  if (ordinal < 0 || static_cast<std::size_t>(ordinal) >= configuration.visible.size())
    return std::nullopt;
  return configuration.visible[static_cast<std::size_t>(ordinal)];
}

CUdevice Driver::ordinal_of(int physical) const {
  for (std::size_t i = 0; i < configuration.visible.size(); ++i) {
    if (configuration.visible[i] == physical) return static_cast<CUdevice>(i);
  }
  return CU_DEVICE_INVALID;
}

CUresult Driver::one_of(std::initializer_list<CUresult> codes) {
  return codes.begin()[draw("code", ++last_choice).below(codes.size())];
}

void Driver::fail_device(CUresult code, const std::string& description) {
  if (sticky != CUDA_SUCCESS) return;
  std::fprintf(stderr, "fakecuda: device lost with error %d: %s\n", code, description.c_str());
  sticky = code;
  // Nothing can be given back to a lost device.
  leaks_excused = true;
  engine.drop_everything();
}

CUresult Driver::surface() {
  if (sticky_later != CUDA_SUCCESS) fail_device(sticky_later, "injected");
  return sticky;
}

void Driver::look_at_exporter(Range& range) {
  MemoryPage& page = range.backing->page();
  if (page.freed.load() != 0) {
    violation(text("use of ", Hex{range.base}, ", which pid ", page.exporter_pid,
                   " exported and has freed"));
    return;
  }
  if (configuration.exporter_death == ExporterDeath::keep || process.is_alive(page.exporter()))
    return;
  if (configuration.exporter_death == ExporterDeath::fault) {
    fail_device(CUDA_ERROR_ILLEGAL_ADDRESS, "an access to legacy memory of a dead process");
  } else if (page.poisoned.exchange(1) == 0) {
    range.backing->fill(kGone);
  }
}

std::byte* Driver::touch(std::uint64_t address, std::uint64_t bytes, bool write, int on_device) {
  if (sticky != CUDA_SUCCESS) return nullptr;
  if (const auto complaint = ranges.complaint(address, bytes, write, on_device)) {
    violation("while it ran: " + *complaint);
    fail_device(CUDA_ERROR_ILLEGAL_ADDRESS, *complaint);
    return nullptr;
  }
  Range* range = ranges.find(address);
  if (range == nullptr) return nullptr;
  // Once for each operation: it asks the kernel.
  if (range->kind == RangeKind::import &&
      std::exchange(range->exporter_seen_at, last_access) != last_access)
    look_at_exporter(*range);
  return sticky == CUDA_SUCCESS ? range->cpu + (address - range->base) : nullptr;
}

void Driver::release_range(std::uint64_t base) {
  const Range* range = ranges.find(base);
  if (range == nullptr) return;
  const std::uint64_t bytes = range->bytes;
  if (range->kind == RangeKind::allocation || range->kind == RangeKind::pool)
    account_back(range->device, bytes);
  ranges.erase(base);
  if (arena.contains(base)) arena.give_back(base, bytes, configuration.reuse_addresses);
}

void Driver::publish_gauges() {
  const auto held = [this](RangeKind kind) { return ranges.count(kind); };
  process.set(Gauge::allocations,
              held(RangeKind::allocation) + held(RangeKind::pool) + held(RangeKind::managed));
  process.set(Gauge::imports, held(RangeKind::import));
  process.set(Gauge::mappings, held(RangeKind::vmm));
  process.set(Gauge::pinned_ranges,
              held(RangeKind::host_allocation) + held(RangeKind::host_registration));
  process.set(Gauge::pinned_bytes, ranges.bytes(RangeKind::host_allocation) +
                                       ranges.bytes(RangeKind::host_registration));
  process.set(Gauge::reservations, reservations.size());
  process.set(Gauge::streams, streams.size());
  process.set(Gauge::events, events.size());
  process.set(Gauge::modules, modules.size());
  process.set(Gauge::pending_operations, engine.pending());
  std::uint64_t handles = 0;
  for (const auto& [handle, memory] : memories) handles += memory.references;
  process.set(Gauge::allocation_handles, handles);
  std::uint64_t active = 0;
  for (const Context& context : contexts) {
    const std::uint64_t is_active = context.retained > 0 ? 1 : 0;
    process.page().contexts[static_cast<std::size_t>(context.device)].store(is_active);
    active += is_active;
  }
  process.set(Gauge::contexts, active);
  std::uint64_t bytes = 0;
  for (std::size_t i = 0; i < kDevicesMax; ++i) bytes += process.page().device_bytes[i].load();
  process.set(Gauge::device_bytes, bytes);
}

std::string Driver::leaks() {
  const std::lock_guard lock(mutex);
  std::string lines;
  for (std::size_t i = 0; i < static_cast<std::size_t>(Gauge::count); ++i) {
    const std::uint64_t held = process.page().gauges[i].load();
    const bool is_thing = static_cast<Gauge>(i) != Gauge::pending_operations;
    if (held > 0 && is_thing) lines += text("  ", kGaugeNames[i], ": ", held, '\n');
  }
  return lines;
}

}  // namespace fakecuda
