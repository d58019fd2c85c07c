// The one table of options: key, flag, type, default, bounds, whether a reload takes it, and a
// sentence.
//
// Flags, file, --help, --print-config, man pages and docs/ are all made from it. Pure, any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "config/settings.hpp"

namespace refit::daemon {

enum class OptionType { boolean, integer, bytes, waiting };

struct Option {
  std::string_view key;   ///< as in the file, with its section: "limits.sessions_per_uid"
  std::string_view flag;  ///< as CLI11 takes it; empty: in the file only
  OptionType type;
  std::uint64_t fallback;
  std::uint64_t min;
  std::uint64_t max;
  bool live;  ///< a reload changes it; otherwise it needs a restart
  std::string_view help;
  std::uint64_t (*get)(const Settings&);
  void (*set)(Settings&, std::uint64_t);
};

[[nodiscard]] std::span<const Option> options() noexcept;
[[nodiscard]] const Option* find_option(std::string_view key) noexcept;

/// A value as the file has it: `true`, `64`, `"adaptive"`, `"4 TiB"`.
[[nodiscard]] std::string value_text(const Option& option, std::uint64_t value);
/// What the option takes, for messages and documents: "an integer from 0 to 256".
[[nodiscard]] std::string allowed_text(const Option& option);
/// A value from text without quotes; nothing if the option does not take it.
[[nodiscard]] std::optional<std::uint64_t> parse_value(const Option& option, std::string_view text);

/// A key of an [[engine]] rule.
struct RuleKey {
  std::string_view key;
  std::string_view allowed;
  std::string_view help;
};
[[nodiscard]] std::span<const RuleKey> rule_keys() noexcept;

/// The candidate that `word` was probably meant to be, or nothing.
[[nodiscard]] std::optional<std::string_view> nearest(std::string_view word,
                                                      std::span<const std::string_view> candidates);

}  // namespace refit::daemon
