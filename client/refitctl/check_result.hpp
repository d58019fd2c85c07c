// What `check` found out, before it is shown.
//
// Plain values; any thread. Knows nothing of how it is shown.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "refit/checker.hpp"
#include "refitctl/target.hpp"

namespace refit::ctl {

/// False while bytes may be a mix: nothing that was read from them is an answer.
[[nodiscard]] constexpr bool is_whole(ModuleState state) noexcept {
  return state == ModuleState::initial || state == ModuleState::committed;
}

struct CheckResult {
  Target target;
  DigestKind kind = DigestKind::sglang;
  Place place = Place::host;
  std::size_t expected = 0;
  CheckReport report;
  std::optional<bool> module_equal;  ///< nothing if the manifest has no digest of the module
  std::optional<std::uint32_t> tensors_live;  ///< of the module; nothing if it is gone since
  double elapsed_us = 0;

  /// Everything expected is there and equal, and the module is whole.
  [[nodiscard]] bool ok() const noexcept {
    // On the device what is not resident cannot be wrong; but something must have been looked at.
    const std::size_t away = place == Place::device ? report.absent.size() : 0;
    return report.ok() && is_whole(report.state) && report.verified + away == expected &&
           report.verified > 0 && module_equal.value_or(true);
  }
};

}  // namespace refit::ctl
