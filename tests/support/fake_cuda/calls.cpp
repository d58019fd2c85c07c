#include "support/fake_cuda/calls.hpp"

#include <unistd.h>

#include <cstring>
#include <string_view>

#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

/// Whether a call makes something that must be given back, or gives it back. If an injected failure
/// strikes such a call, its caller may be left with something that it cannot name or lose.
bool is_about_ownership(std::string_view name) {
  for (const std::string_view word :
       {"Alloc", "Free", "Create", "Destroy", "Open", "Close", "Import", "Map", "Unmap", "Reserve",
        "Retain", "Release", "Register", "Unregister", "Load", "Unload", "Reset"}) {
    if (name.find(word) != std::string_view::npos) return true;
  }
  return false;
}

std::atomic<std::uint64_t>& counter(Entry entry) {
  return driver().process.page().calls[static_cast<std::size_t>(entry)].count;
}

}  // namespace

Call::Call(Entry entry) : entry_(entry) {
  const std::int64_t initialised = driver().initialised_pid;
  if (initialised != 0 && initialised != ::getpid()) {
    // Not even the lock can be taken: a thread that does not exist here may have held it.
    if (entry_point(entry).needs != Needs::nothing || entry == Entry::cuInit) {
      driver().process.violation_after_fork();
      refusal_ = CUDA_ERROR_NOT_INITIALIZED;
    }
    return;
  }
  lock_ = std::unique_lock(driver().mutex);
  if (initialised != 0) counter(entry).fetch_add(1);
  const EntryPoint& point = entry_point(entry);
  if (entry == Entry::cuInit) driver().load_faults();
  fault_ = driver().faults.strike(point.name, point.symbol);
  if (fault_ && initialised != 0) driver().process.add(Tally::faults);
  refusal_ = check();
  if (fault_ && fault_->kind != FaultKind::later && is_about_ownership(point.name) &&
      !(fault_->kind == FaultKind::after && refusal_))
    driver().leaks_excused = true;
  if (!refusal_ && fault_ && fault_->kind == FaultKind::refuse) refusal_ = fault_->code;
}

std::optional<CUresult> Call::check() const {
  Driver& driver = fakecuda::driver();
  const EntryPoint& point = entry_point(entry_);
  if (point.needs == Needs::nothing) return std::nullopt;
  if (driver.initialised_pid == 0) return CUDA_ERROR_NOT_INITIALIZED;
  if (point.version > driver.configuration.driver_version) {
    driver.violation(text(point.symbol, " was called, which this driver does not have"));
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (point.needs == Needs::init) return std::nullopt;
  if (driver.sticky != CUDA_SUCCESS) return driver.sticky;
  if (point.needs != Needs::context) return std::nullopt;
  if (Driver::current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (Driver::current()->retained == 0)
    return driver.one_of({CUDA_ERROR_CONTEXT_IS_DESTROYED, CUDA_ERROR_INVALID_CONTEXT});
  return std::nullopt;
}

CUresult Call::end(CUresult result) {
  if (!lock_.owns_lock() || driver().initialised_pid == 0) return result;
  driver().publish_gauges();
  if (!fault_ || result != CUDA_SUCCESS) return result;
  if (fault_->kind == FaultKind::after) return fault_->code;
  if (driver().sticky_later == CUDA_SUCCESS) driver().sticky_later = fault_->code;
  return result;
}

CUresult call_obsolete() {
  driver().violation(
      "an entry with 32-bit addresses was called: resolve by cuGetProcAddress, not by dlsym");
  return CUDA_ERROR_INVALID_VALUE;
}

void name_calls(ProcessPage& page) {
  static_assert(static_cast<std::size_t>(Entry::count) < kEntriesMax);
  for (std::size_t i = 0; i < static_cast<std::size_t>(Entry::count); ++i) {
    const EntryPoint& point = entry_point(static_cast<Entry>(i));
    std::strncpy(page.calls[i].name, point.name, sizeof page.calls[i].name - 1);
    std::strncpy(page.calls[i].symbol, point.symbol, sizeof page.calls[i].symbol - 1);
  }
}

}  // namespace fakecuda
