#include "support/fake_cuda/faults.hpp"

#include <charconv>
#include <utility>

#include "support/fake_cuda/configuration.hpp"

namespace fakecuda {
namespace {

template <typename Number>
bool parse_number(std::string_view text, Number& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

/// Takes what follows the last `mark` off `text`.
std::optional<std::string_view> take_after(std::string_view& text, char mark) {
  const std::size_t at = text.rfind(mark);
  if (at == std::string_view::npos) return std::nullopt;
  const std::string_view rest = text.substr(at + 1);
  text = text.substr(0, at);
  return rest;
}

}  // namespace

std::optional<Faults::Rule> Faults::parse(std::string_view text) {
  Rule rule{"", std::nullopt, {CUDA_SUCCESS, FaultKind::refuse}};
  if (const auto kind = take_after(text, ':')) {
    if (*kind == "after") {
      rule.fault.kind = FaultKind::after;
    } else if (*kind == "later") {
      rule.fault.kind = FaultKind::later;
    } else if (*kind != "refuse") {
      return std::nullopt;
    }
  }
  const auto code = take_after(text, '=');
  int number = 0;
  if (!code || !parse_number(*code, number) || number <= 0) return std::nullopt;
  rule.fault.code = static_cast<CUresult>(number);
  if (const auto k = take_after(text, '#')) {
    std::uint64_t calls = 0;
    if (!parse_number(*k, calls) || calls == 0) return std::nullopt;
    rule.calls_to_come = calls;
  } else if (text.empty()) {
    return std::nullopt;
  }
  rule.name = text;
  return rule;
}

bool Faults::set(std::string_view text) {
  std::vector<Rule> rules;
  for (const std::string& part : split(text, ';')) {
    auto rule = parse(part);
    if (!rule) return false;
    rules.push_back(std::move(*rule));
  }
  rules_ = std::move(rules);
  return true;
}

std::optional<Fault> Faults::strike(std::string_view name, std::string_view symbol) {
  std::optional<Fault> struck;
  for (auto rule = rules_.begin(); rule != rules_.end();) {
    const bool matches = rule->name.empty() || rule->name == name || rule->name == symbol;
    if (!matches || (rule->calls_to_come && --*rule->calls_to_come > 0)) {
      ++rule;
      continue;
    }
    struck = rule->fault;
    rule = rule->calls_to_come ? rules_.erase(rule) : std::next(rule);
  }
  return struck;
}

}  // namespace fakecuda
