#include "config/option.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <numeric>
#include <vector>

#include "ipc/handshake.hpp"
#include "ipc/shared_layout.hpp"
#include "plan/manifest.hpp"

namespace refit::daemon {
namespace {

constexpr std::uint64_t kTiB = std::uint64_t{1} << 40;

// Where a value stands in Settings: the two functions of a table line.
#define REFIT_AT(member)                                                        \
  [](const Settings& from) { return static_cast<std::uint64_t>(from.member); }, \
      [](Settings& to, std::uint64_t value) {                                   \
        to.member = static_cast<decltype(to.member)>(value);                    \
      }

// Defaults are such that one host's job (8 engines of several modules, as many trainers, hundreds
// of GB) never meets a limit; they stop a loop that leaks, and a uid that means harm.
constexpr std::array kOptions{
    Option{"waiting", "--waiting", OptionType::waiting, 1, 0, 2, false,
           "How to wait for peers: off (block at once), adaptive (read for microseconds first), "
           "always (never block; "
           "needs a core of its own).",
           REFIT_AT(waiting)},
    Option{"copy_threads", "--copy-threads", OptionType::integer, 0, 0, 256, false,
           "Threads that copy; 0: one for each CPU.", REFIT_AT(copy_threads)},
    Option{"check_threads", "--check-threads", OptionType::integer, 0, 0, 256, false,
           "Threads that hash and populate; 0: one for each CPU.", REFIT_AT(check_threads)},
    Option{
        "proof_threads", "--proof-threads", OptionType::integer, 1, 0, 256, false,
        "Threads that compare, on cores that are idle, what each refit wrote with what the engine "
        "holds; 0: none.",
        REFIT_AT(proof_threads)},
    Option{"drain_timeout_ms", "--drain-timeout-ms", OptionType::integer, 10'000, 0, 600'000, true,
           "On SIGTERM: how long waiting refits may still take.", REFIT_AT(drain_timeout_ms)},
    Option{"hello_timeout_ms", "", OptionType::integer, 5'000, 100, 600'000, true,
           "How long a connection may take to say who it is.", REFIT_AT(hello_timeout_ms)},
    Option{"fd_timeout_ms", "", OptionType::integer, 5'000, 100, 600'000, true,
           "How long an fd that a client sent may wait for the request that names it.",
           REFIT_AT(fd_timeout_ms)},
    Option{"verbose", "-v,--verbose", OptionType::boolean, 0, 0, 1, true,
           "Log sessions and registrations, not only trouble.", REFIT_AT(verbose)},
    Option{"cuda.legacy_across_uids", "", OptionType::boolean, 0, 0, 1, false,
           "Take legacy CUDA IPC handles of other users. Whoever knows such a handle has the "
           "memory, and nobody can take it back; many drivers refuse them anyway.",
           REFIT_AT(cuda.legacy_across_uids)},
    Option{"limits.sessions_per_uid", "", OptionType::integer, 64, 1, 4'096, true,
           "Trainers, engines and tools that may be connected.", REFIT_AT(limits.sessions_per_uid)},
    Option{"limits.requests_per_uid", "", OptionType::integer, 4'096, 1, 65'536, true,
           "Requests that may wait for their answers.", REFIT_AT(limits.requests_per_uid)},
    Option{"limits.regions_per_uid", "", OptionType::integer, 4'096, 1, 60'000, true,
           "Regions of memory that may be registered; the kernel gives the whole daemon some "
           "65,000 mappings.",
           REFIT_AT(limits.regions_per_uid)},
    Option{"limits.registered_bytes_per_uid", "", OptionType::bytes, 4 * kTiB, 4'096, 1'024 * kTiB,
           true,
           "Bytes of all registered regions; memory that several clients register counts for each.",
           REFIT_AT(limits.registered_bytes_per_uid)},
    Option{"limits.unclaimed_fds_per_uid", "", OptionType::integer, 1'024, 1, 65'536, true,
           "Fds that clients sent and no request has named yet.",
           REFIT_AT(limits.unclaimed_fds_per_uid)},
    Option{"limits.tensors_per_uid", "", OptionType::integer, 1'048'576, 1, 16'777'216, true,
           "Tensors in all registered modules.", REFIT_AT(limits.tensors_per_uid)},
    Option{"limits.tensors_per_module", "", OptionType::integer, ManifestLimits{}.tensors_max, 1,
           ManifestLimits{}.tensors_max, true, "Tensors in one module.",
           REFIT_AT(limits.tensors_per_module)},
};

#undef REFIT_AT

constexpr std::array kRuleKeys{
    RuleKey{"name", "text", "Which engines, by a glob such as \"flux*\". Required."},
    RuleKey{"owner", "a uid or a user's name", "Only engines of this user; without it, of any."},
    RuleKey{"allow_uids", "a list of uids", "Who may use them, by number."},
    RuleKey{"allow_users", "a list of user names",
            "Who may use them, by name, looked up when the file is read."},
    RuleKey{"allow_gids", "a list of gids", "Whose members may use them, by number."},
    RuleKey{
        "allow_groups", "a list of group names",
        "Whose members may use them; a client's groups are those of its process when it connects."},
};

struct Unit {
  std::string_view name;
  unsigned shift;
};
constexpr std::array kUnits{Unit{"TiB", 40}, Unit{"GiB", 30}, Unit{"MiB", 20}, Unit{"KiB", 10}};

std::optional<std::uint64_t> parse_number(std::string_view text) {
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<std::uint64_t> parse_bytes(std::string_view text) {
  for (const Unit& unit : kUnits) {
    if (!text.ends_with(unit.name)) continue;
    text.remove_suffix(unit.name.size());
    while (text.ends_with(' ')) text.remove_suffix(1);
    const auto value = parse_number(text);
    if (!value || *value > (UINT64_MAX >> unit.shift)) return std::nullopt;
    return *value << unit.shift;
  }
  return parse_number(text);
}

std::string bytes_text(std::uint64_t value) {
  for (const Unit& unit : kUnits) {
    if (value != 0 && value % (std::uint64_t{1} << unit.shift) == 0)
      return std::to_string(value >> unit.shift) + " " + std::string(unit.name);
  }
  return std::to_string(value);
}

/// Letters to insert, remove or replace to make one word the other.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0];
    row[0] = i + 1;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

}  // namespace

Settings::Settings() {
  for (const Option& option : kOptions) option.set(*this, option.fallback);
}

std::span<const Option> options() noexcept { return kOptions; }

const Option* find_option(std::string_view key) noexcept {
  const auto found = std::find_if(kOptions.begin(), kOptions.end(),
                                  [key](const Option& one) { return one.key == key; });
  return found == kOptions.end() ? nullptr : &*found;
}

std::span<const RuleKey> rule_keys() noexcept { return kRuleKeys; }

std::string value_text(const Option& option, std::uint64_t value) {
  switch (option.type) {
    case OptionType::boolean:
      return value != 0 ? "true" : "false";
    case OptionType::integer:
      return std::to_string(value);
    case OptionType::bytes:
      return "\"" + bytes_text(value) + "\"";
    case OptionType::waiting:
      return "\"" + std::string(waiting_name(static_cast<Waiting>(value))) + "\"";
  }
  return {};
}

std::string allowed_text(const Option& option) {
  switch (option.type) {
    case OptionType::boolean:
      return "true or false";
    case OptionType::integer:
      return "an integer from " + std::to_string(option.min) + " to " + std::to_string(option.max);
    case OptionType::bytes:
      return "bytes from " + bytes_text(option.min) + " to " + bytes_text(option.max) +
             ", as an integer or as text such as \"512 GiB\"";
    case OptionType::waiting:
      return "\"off\", \"adaptive\" or \"always\"";
  }
  return {};
}

std::optional<std::uint64_t> parse_value(const Option& option, std::string_view text) {
  std::optional<std::uint64_t> value;
  switch (option.type) {
    case OptionType::boolean:
      if (text == "true") value = 1;
      if (text == "false") value = 0;
      break;
    case OptionType::integer:
      value = parse_number(text);
      break;
    case OptionType::bytes:
      value = parse_bytes(text);
      break;
    case OptionType::waiting:
      for (const Waiting waiting : {Waiting::off, Waiting::adaptive, Waiting::always}) {
        if (text == waiting_name(waiting)) value = static_cast<std::uint64_t>(waiting);
      }
      break;
  }
  if (!value || *value < option.min || *value > option.max) return std::nullopt;
  return value;
}

std::optional<std::string_view> nearest(std::string_view word,
                                        std::span<const std::string_view> candidates) {
  constexpr std::size_t kWordBytesMax = 256;  // of a hostile file: the work grows with the length
  std::optional<std::string_view> best;
  std::size_t least = 1 + word.size() / 3;
  if (word.size() > kWordBytesMax) return best;
  for (const std::string_view candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    if (distance > least || (best && distance == least)) continue;
    best = candidate;
    least = distance;
  }
  return best;
}

}  // namespace refit::daemon
