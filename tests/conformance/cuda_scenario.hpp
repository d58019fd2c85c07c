// One trainer, one engine and what they do together in a life, on device memory, as one function of
// a seed: for tests that run it over many seeds, and for those that leave one of the waits out and
// want to see it fail.
//
// Every refit has work before it that ends late: the trainer's upload, and the engine's step that
// scribbles over the target while the gate is answered. Only the fences order the copy behind them.
#pragma once

#include <string>

#include "conformance/memory_kinds.hpp"

namespace refit::test {

struct ScenarioOutcome {
  int refits = 0;
  int wrong_bytes = 0;    ///< refits after which the target held something else
  int wrong_digests = 0;  ///< refits after which the checker said something else
  std::string error;      ///< of a call that should have succeeded; the rest was left out then
  [[nodiscard]] bool ok() const { return wrong_bytes == 0 && wrong_digests == 0 && error.empty(); }
  [[nodiscard]] std::string text() const {
    return std::to_string(wrong_bytes) + " with wrong bytes, " + std::to_string(wrong_digests) +
           " with wrong digests of " + std::to_string(refits) + " refits" +
           (error.empty() ? "" : "; " + error);
  }
};

ScenarioOutcome run_scenario(const std::string& socket, MemoryKind kind, std::uint64_t seed);

/// The fake driver of this process from now on; the daemon's is chosen by its environment.
void choose_schedule(std::uint64_t seed, const std::string& schedule);

}  // namespace refit::test
