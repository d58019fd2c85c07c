// Rewrite rules on RE2; see name_map.hpp. Pure, knows no tensors. RE2 would write errors to stderr
// by itself: that is switched off, since patterns are a client's.
#include "plan/name_map.hpp"

#include <re2/re2.h>

#include <algorithm>
#include <array>

#include "plan/text.hpp"

namespace refit::daemon {
namespace {

constexpr std::size_t kGroupsMax = 10;  // \0 to \9

RE2::Options pattern_options() {
  RE2::Options options;
  options.set_max_mem(NameMap::kProgramBytesMax);
  options.set_log_errors(false);
  return options;
}

}  // namespace

NameMap::NameMap() = default;
NameMap::NameMap(NameMap&&) noexcept = default;
NameMap& NameMap::operator=(NameMap&&) noexcept = default;
NameMap::~NameMap() = default;

NameMap NameMap::compile(const std::vector<NameRule>& rules, std::size_t pattern_bytes_max,
                         std::vector<std::string>& problems) {
  NameMap map;
  map.rules_.resize(rules.size());
  const RE2::Options options = pattern_options();
  for (std::size_t i = 0; i < rules.size(); ++i) {
    const NameRule& rule = rules[i];
    bool usable = true;
    const auto report = [&](const std::string& what) {
      problems.push_back("name rule " + std::to_string(i) + " " + in_quotes(rule.pattern) + " -> " +
                         in_quotes(rule.target) + ": " + what);
      usable = false;
    };
    if (rule.parts == 0 || rule.part >= rule.parts) {
      report("part " + std::to_string(rule.part) + " of " + std::to_string(rule.parts) +
             " does not exist");
    }
    if (rule.target.empty()) report("the target is empty");
    if (rule.target.size() > pattern_bytes_max) {
      report("the target has " + std::to_string(rule.target.size()) + " bytes, the limit is " +
             std::to_string(pattern_bytes_max));
    }
    if (rule.pattern.size() > pattern_bytes_max) {
      report("the pattern has " + std::to_string(rule.pattern.size()) + " bytes, the limit is " +
             std::to_string(pattern_bytes_max));
      continue;
    }
    auto pattern = std::make_unique<RE2>(rule.pattern, options);
    if (!pattern->ok()) {
      report("the pattern does not compile: " + in_quotes(pattern->error()));
      continue;
    }
    if (rule.target.size() <= pattern_bytes_max) {
      std::string why;
      if (!pattern->CheckRewriteString(rule.target, &why)) {
        report("the target does not fit the pattern: " + in_quotes(why));
      }
    }
    if (!usable) continue;
    map.rules_[i].pattern = std::move(pattern);
    map.rules_[i].target = rule.target;
    map.rules_[i].groups = 1 + RE2::MaxSubmatch(rule.target);
  }
  return map;
}

std::optional<NameMap::Mapped> NameMap::apply(std::string_view name, std::size_t bytes_max) const {
  std::array<re2::StringPiece, kGroupsMax> groups;
  const re2::StringPiece text(name.data(), name.size());
  for (std::size_t i = 0; i < rules_.size(); ++i) {
    const Rule& rule = rules_[i];
    if (!rule.pattern) continue;
    if (!rule.pattern->Match(text, 0, text.size(), RE2::ANCHOR_BOTH, groups.data(), rule.groups)) {
      continue;
    }
    // RE2::Rewrite would build a result of any length first.
    Mapped mapped;
    mapped.rule = static_cast<std::uint32_t>(i);
    const std::string& target = rule.target;
    for (std::size_t k = 0; k < target.size() && mapped.name.size() <= bytes_max; ++k) {
      if (target[k] != '\\') {
        mapped.name += target[k];
        continue;
      }
      ++k;  // CheckRewriteString proved that a digit or a backslash follows.
      if (target[k] == '\\') {
        mapped.name += '\\';
      } else {
        const re2::StringPiece& group = groups[static_cast<std::size_t>(target[k] - '0')];
        mapped.name.append(group.data() == nullptr ? "" : group.data(), group.size());
      }
    }
    if (mapped.name.size() > bytes_max) mapped.name.resize(bytes_max + 1);
    return mapped;
  }
  return std::nullopt;
}

std::uint64_t NameMap::work_per_byte() const noexcept {
  std::uint64_t instructions = 0;
  for (const Rule& rule : rules_) {
    if (rule.pattern) {
      instructions += static_cast<std::uint64_t>(std::max(0, rule.pattern->ProgramSize()));
    }
  }
  return instructions;
}

}  // namespace refit::daemon
