// A trainer's name map: compiled rewrite rules from its own names to the target's.
//
// Pure, one thread at a time, lives only while a manifest is validated: the manifest keeps the
// rewritten names, so the programs of a client's patterns never stay in memory. Knows no tensors.
// Patterns come from clients: RE2 matches in linear time, its programs are bounded by
// kProgramBytesMax each, and work() lets the caller bound the whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refit/types.hpp"

namespace re2 {
class RE2;
}

namespace refit::daemon {

class NameMap {
 public:
  /// RE2's budget for one pattern: program and cache. Real rules need a few KiB.
  static constexpr std::int64_t kProgramBytesMax = std::int64_t{128} * 1024;

  /// Where a name goes.
  struct Mapped {
    std::string name;
    std::uint32_t rule = 0;  ///< index of the rule that matched
  };

  /// Compiles all rules. What is wrong with them is appended to `problems`, one line for each; a
  /// rule with a problem never matches.
  static NameMap compile(const std::vector<NameRule>& rules, std::size_t pattern_bytes_max,
                         std::vector<std::string>& problems);

  NameMap(NameMap&&) noexcept;
  NameMap& operator=(NameMap&&) noexcept;
  NameMap(const NameMap&) = delete;
  NameMap& operator=(const NameMap&) = delete;
  ~NameMap();

  /// Rewrites a name by the first rule that matches all of it; nullopt if none does. A result
  /// longer than `bytes_max` is cut one byte after it, so that a rule of many `\0` costs no memory
  /// and the caller still sees that it is too long.
  [[nodiscard]] std::optional<Mapped> apply(std::string_view name, std::size_t bytes_max) const;

  /// Instructions of all programs: the most that one byte of a name can cost.
  [[nodiscard]] std::uint64_t work_per_byte() const noexcept;

 private:
  struct Rule {
    std::unique_ptr<re2::RE2> pattern;  ///< null for a rule with a problem
    std::string target;
    int groups = 0;  ///< that the rewrite needs, the whole match included
  };
  NameMap();
  std::vector<Rule> rules_;
};

}  // namespace refit::daemon
