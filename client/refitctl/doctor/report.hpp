// What doctor shows: findings as a table for people and as JSON for programs.
//
// Pure; any thread. Knows nothing of how findings came about.
#pragma once

#include <string>
#include <vector>

#include "refitctl/doctor/judge.hpp"
#include "refitctl/format/style.hpp"

namespace refit::ctl {

[[nodiscard]] bool any_failed(const std::vector<Finding>& findings) noexcept;
[[nodiscard]] std::string doctor_text(const std::vector<Finding>& findings, const Style& style);
[[nodiscard]] std::string doctor_json(const std::vector<Finding>& findings);

}  // namespace refit::ctl
