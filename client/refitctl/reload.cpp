// `refitctl reload`. One thread. Knows nothing of the option library.
#include "refitctl/reload.hpp"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "refitctl/ask.hpp"
#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

/// Without --wait: long enough for a file of some kilobytes and for a refusal,
/// and no longer.
constexpr std::chrono::milliseconds kMoment{500};

std::string list(const std::string& title, const std::vector<std::string>& keys) {
  if (keys.empty()) return {};
  std::string text = title + "\n";
  for (const std::string& key : keys) text += "  " + escape(key) + "\n";
  return text;
}

std::string reload_text(const ReloadReport& report, const Style& style) {
  std::string text = style.paint(Paint::good, "reloaded") + " " + escape(report.file) + "\n";
  text += report.changed.empty() ? "nothing changed\n" : list("in force now:", report.changed);
  return text +
         list(style.paint(Paint::warning, "needs a restart of refitd:"), report.needs_restart);
}

std::string reload_json(const ReloadReport* report) {
  nlohmann::json json = {{"done", report != nullptr},
                         {"file", nullptr},
                         {"changed", nullptr},
                         {"needs_restart", nullptr}};
  if (report != nullptr) {
    json["file"] = report->file;
    json["changed"] = report->changed;
    json["needs_restart"] = report->needs_restart;
  }
  return json.dump(2, ' ', true, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace

Outcome<Answer> reload(const Options& options, const Style& style) {
  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  Result<ReloadReport> report = observer->reload(
      options.wait ? deadline
                   : Deadline::at(std::min(Deadline::in(kMoment).point(), deadline.point())));
  if (report) return Answer{options.json ? reload_json(&*report) : reload_text(*report, style)};
  if (!options.wait && report.error().code == Errc::deadline) {
    return Answer{options.json ? reload_json(nullptr)
                               : "refitd has been asked and reads on; its log "
                                 "tells the outcome, --wait waits "
                                 "for it\n"};
  }
  return failed_as_operator(options, std::move(report).error(), "reload");
}

}  // namespace refit::ctl
