// What the facts about a host mean for refits, and what to change.
//
// Pure; any thread. Knows nothing of how facts are found out and of how findings are shown.
#pragma once

#include <string>
#include <vector>

#include "refitctl/doctor/facts.hpp"

namespace refit::ctl {

enum class Verdict { ok, warn, fail };

struct Finding {
  std::string id;     ///< stable, for programs
  std::string title;  ///< for people
  Verdict verdict = Verdict::ok;
  std::string found;   ///< what was found
  std::string advice;  ///< what it means and what to change; empty if nothing
};

[[nodiscard]] constexpr const char* verdict_name(Verdict verdict) noexcept {
  return verdict == Verdict::ok ? "ok" : verdict == Verdict::warn ? "warn" : "fail";
}

/// In the order in which they are shown. `fail` is what a refit cannot do without, `warn` what
/// makes it slower, smaller or harder to run.
[[nodiscard]] std::vector<Finding> judge(const HostFacts& facts);

}  // namespace refit::ctl
