// What a run says at its end: a table of figures, a table of judged bars, and the JSON.
//
// Pure but for printing; entered by the orchestrating thread. Knows nothing of how figures were
// measured.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "refit/result.hpp"

namespace refit::bench {

/// Judges every bar that these figures can speak to and adds the verdicts as figures["bars"].
void judge(nlohmann::ordered_json& figures);
/// Both tables on stdout.
void print_tables(const nlohmann::ordered_json& figures);
[[nodiscard]] Result<void> write_json(const nlohmann::ordered_json& figures,
                                      const std::string& path);

}  // namespace refit::bench
