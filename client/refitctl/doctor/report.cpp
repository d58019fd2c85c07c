// Findings as a table and as JSON. Pure; any thread. Knows nothing of how they came about.
#include "refitctl/doctor/report.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "refitctl/format/table.hpp"
#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

Paint verdict_paint(Verdict verdict) noexcept {
  return verdict == Verdict::ok     ? Paint::good
         : verdict == Verdict::warn ? Paint::warning
                                    : Paint::bad;
}

std::size_t count(const std::vector<Finding>& findings, Verdict verdict) {
  return static_cast<std::size_t>(
      std::count_if(findings.begin(), findings.end(),
                    [verdict](const Finding& finding) { return finding.verdict == verdict; }));
}

}  // namespace

bool any_failed(const std::vector<Finding>& findings) noexcept {
  return std::any_of(findings.begin(), findings.end(),
                     [](const Finding& finding) { return finding.verdict == Verdict::fail; });
}

std::string doctor_text(const std::vector<Finding>& findings, const Style& style) {
  Table table({{""}, {"CHECK"}, {"FOUND"}});
  for (const Finding& finding : findings) {
    table.add_row({{verdict_name(finding.verdict), verdict_paint(finding.verdict)},
                   finding.title,
                   finding.found});
  }
  std::string text = table.render(style);
  for (const Verdict verdict : {Verdict::fail, Verdict::warn}) {
    for (const Finding& finding : findings) {
      if (finding.verdict != verdict) continue;
      text += "\n" + style.paint(verdict_paint(verdict), verdict_name(verdict)) + "  " +
              escape(finding.title) + "\n";
      if (!finding.advice.empty()) text += "      " + escape(finding.advice) + "\n";
    }
  }
  return text + "\n" + std::to_string(count(findings, Verdict::ok)) + " ok, " +
         std::to_string(count(findings, Verdict::warn)) + " to look at, " +
         std::to_string(count(findings, Verdict::fail)) + " failed\n";
}

std::string doctor_json(const std::vector<Finding>& findings) {
  using Json = nlohmann::json;
  Json list = Json::array();
  for (const Finding& finding : findings) {
    list.push_back({{"id", finding.id},
                    {"title", finding.title},
                    {"verdict", verdict_name(finding.verdict)},
                    {"found", finding.found},
                    {"advice", finding.advice.empty() ? Json() : Json(finding.advice)}});
  }
  return Json{{"ok", !any_failed(findings)}, {"checks", list}}.dump(
             2, ' ', true, Json::error_handler_t::replace) +
         "\n";
}

}  // namespace refit::ctl
