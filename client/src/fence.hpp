// What is done with a module's fence before each refit, on either side.
#pragma once

#include "refit/module.hpp"
#include "refit/result.hpp"

namespace refit {

/// Marks where this process's work on the module ends now. Where host memory is among it, waits
/// too: CPUs copy that, and do not know of streams. Nothing without a fence.
[[nodiscard]] Result<void> mark_end_of_work(const ModuleSpec& module);

/// After a daemon died: waits for what it may have queued for the module's device memory.
void settle_devices(const ModuleSpec& module) noexcept;

}  // namespace refit
