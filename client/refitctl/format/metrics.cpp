// The daemon's counters as Prometheus text or JSON. Pure; any thread. Knows nothing of options,
// files and the socket.
#include "refitctl/format/metrics.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>

#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

using Json = nlohmann::json;
using Labels = std::vector<std::pair<std::string, std::string>>;

constexpr double kMicrosecond = 1e-6;

double number(std::uint64_t value) { return static_cast<double>(value); }

std::string number_text(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "+Inf" : "-Inf";
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value);
  return {buffer.data(), end.ptr};
}

MetricFamily up(bool answers) {
  return {
      "refit_up", "gauge", "1 if the daemon answered, 0 if not.", {{"", {}, answers ? 1.0 : 0.0}}};
}

/// A bound in seconds as a short decimal: 25 microseconds are 2.5e-05 and not 2.4999999e-05.
std::string bound_text(float bound_us) {
  std::array<char, 64> buffer{};
  std::snprintf(buffer.data(), buffer.size(), "%.6g", static_cast<double>(bound_us) * kMicrosecond);
  return buffer.data();
}

void add_phase(MetricFamily& family, const std::string& phase, const PhaseHistogram& histogram,
               const std::vector<float>& bounds_us) {
  std::uint64_t below = 0;
  for (std::size_t i = 0; i < histogram.counts.size(); ++i) {
    below += histogram.counts[i];
    const std::string bound = i < bounds_us.size() ? bound_text(bounds_us[i]) : "+Inf";
    family.samples.push_back({"_bucket", {{"phase", phase}, {"le", bound}}, number(below)});
  }
  family.samples.push_back({"_sum", {{"phase", phase}}, histogram.sum_us * kMicrosecond});
  family.samples.push_back({"_count", {{"phase", phase}}, number(below)});
}

MetricFamily failures(const DaemonMetrics& metrics) {
  MetricFamily family{"refit_refits_failed_total",
                      "counter",
                      "Refits that ended without a commit, by the name of the error.",
                      {}};
  // Every reason from the start: a counter that appears with its first failure hides that one from
  // rate().
  std::map<std::string, std::uint64_t> by_reason;
#define REFIT_X(name, code) by_reason[#name] = 0;
  REFIT_ERRC_TABLE(REFIT_X)
#undef REFIT_X
  by_reason.erase("ok");
  for (const auto& [code, count] : metrics.failures) {
    const std::string_view name = errc_name(code);
    by_reason[name == "unknown" ? "code_" + std::to_string(static_cast<unsigned>(code))
                                : std::string(name)] += count;
  }
  for (const auto& [reason, count] : by_reason)
    family.samples.push_back({"", {{"reason", reason}}, number(count)});
  return family;
}

void add_modules(std::vector<MetricFamily>& families, const std::vector<ModuleMetrics>& modules) {
  MetricFamily version{
      "refit_module_version", "gauge", "Version of the weights that it holds.", {}};
  MetricFamily state{
      "refit_module_state",
      "gauge",
      "1 for the state that the module is in, 0 for the others; no step may run on a poisoned one.",
      {}};
  MetricFamily refits{
      "refit_module_refits_total", "counter", "Refits of the module since it was registered.", {}};
  MetricFamily bytes{"refit_module_bytes", "gauge", "Bytes of the module's tensors.", {}};
  MetricFamily lag{"refit_module_proof_lag_versions",
                   "gauge",
                   "Versions since the last one that a check of all tensors, or the proof in the "
                   "background, found equal; all of them if there is none.",
                   {}};
  MetricFamily age{"refit_module_proof_age_seconds",
                   "gauge",
                   "Time since all tensors were found equal; +Inf if they never were.",
                   {}};
  for (const ModuleMetrics& module : modules) {
    const Labels labels{
        {"uid", std::to_string(module.uid)}, {"engine", module.engine}, {"module", module.module}};
    version.samples.push_back({"", labels, number(module.version)});
    for (const ModuleState one : {ModuleState::initial, ModuleState::writing,
                                  ModuleState::committed, ModuleState::poisoned}) {
      Labels with_state = labels;
      with_state.emplace_back("state", module_state_name(one));
      state.samples.push_back({"", std::move(with_state), module.state == one ? 1.0 : 0.0});
    }
    refits.samples.push_back({"", labels, number(module.refits)});
    bytes.samples.push_back({"", labels, number(module.bytes)});
    const std::uint64_t proven = module.proof ? std::min(module.proof->version, module.version) : 0;
    lag.samples.push_back({"", labels, number(module.version - proven)});
    age.samples.push_back({"", labels,
                           module.proof ? number(module.proof->age_us) * kMicrosecond
                                        : std::numeric_limits<double>::infinity()});
  }
  for (MetricFamily* family : {&version, &state, &refits, &bytes, &lag, &age})
    families.push_back(std::move(*family));
}

void add_quotas(std::vector<MetricFamily>& families, const std::vector<QuotaUse>& quotas) {
  MetricFamily used{"refit_quota_used", "gauge", "What a uid uses of what is limited per uid.", {}};
  MetricFamily limit{"refit_quota_limit", "gauge", "The limit, where there is one.", {}};
  for (const QuotaUse& quota : quotas) {
    const Labels labels{{"uid", std::to_string(quota.uid)}, {"quota", quota.quota}};
    used.samples.push_back({"", labels, number(quota.used)});
    if (quota.limit != 0) limit.samples.push_back({"", labels, number(quota.limit)});
  }
  families.push_back(std::move(used));
  families.push_back(std::move(limit));
}

std::string escape_label(std::string_view value) {
  std::string escaped;
  for (const char c : value) {
    if (c == '\\') {
      escaped += "\\\\";
    } else if (c == '"') {
      escaped += "\\\"";
    } else if (c == '\n') {
      escaped += "\\n";
    } else {
      escaped += c;
    }
  }
  return escaped;
}

// The format is UTF-8, and a scrape with one bad byte is refused as a whole.
std::string label_value(const std::string& value) {
  return escape_label(is_utf8(value) ? value : escape(value));
}

std::string label_list(const Labels& labels) {
  std::string text;
  for (const auto& [name, value] : labels)
    text += (text.empty() ? "{" : ",") + name + "=\"" + label_value(value) + "\"";
  return text.empty() ? text : text + "}";
}

}  // namespace

std::vector<MetricFamily> metric_families(const DaemonMetrics& metrics) {
  std::array<char, 32> layout{};
  std::snprintf(layout.data(), layout.size(), "%016llx",
                static_cast<unsigned long long>(metrics.layout));
  const auto single = [](const char* name, const char* type, const char* help, double value) {
    return MetricFamily{name, type, help, {{"", {}, value}}};
  };

  std::vector<MetricFamily> families;
  families.push_back(up(true));
  families.push_back({"refit_build_info",
                      "gauge",
                      "1, with the daemon's version, protocol and layout of shared memory.",
                      {{"",
                        {{"version", metrics.version},
                         {"protocol", std::to_string(metrics.protocol)},
                         {"layout", layout.data()},
                         {"copy_kernel", metrics.copy_kernel},
                         {"waiting", std::string(waiting_name(metrics.waiting))}},
                        1}}});
  families.push_back(single("refit_uptime_seconds", "gauge", "Time since the daemon started.",
                            number(metrics.uptime_us) * kMicrosecond));
  families.push_back(single("refit_draining", "gauge", "1 if the daemon takes no new work.",
                            metrics.draining ? 1 : 0));
  families.push_back(single("refit_refits_committed_total", "counter", "Refits that committed.",
                            number(metrics.committed)));
  families.push_back(failures(metrics));
  families.push_back(single("refit_moved_bytes_total", "counter",
                            "Bytes that committed refits copied.", number(metrics.moved_bytes)));
  MetricFamily phases{"refit_phase_seconds",
                      "histogram",
                      "Phases of committed refits: wait for earlier work, gate until the engine "
                      "held still, copy of the bytes, total from request to reply.",
                      {}};
  add_phase(phases, "wait", metrics.wait, metrics.bounds_us);
  add_phase(phases, "gate", metrics.gate, metrics.bounds_us);
  add_phase(phases, "copy", metrics.copy, metrics.bounds_us);
  add_phase(phases, "total", metrics.total, metrics.bounds_us);
  families.push_back(std::move(phases));
  families.push_back(single("refit_checks_total", "counter", "Checks that read live bytes.",
                            number(metrics.checks)));
  families.push_back({"refit_checked_tensors_total",
                      "counter",
                      "Tensors of those checks: equal, different, or not in the module.",
                      {{"", {{"result", "verified"}}, number(metrics.tensors_verified)},
                       {"", {{"result", "mismatched"}}, number(metrics.tensors_mismatched)},
                       {"", {{"result", "missing"}}, number(metrics.tensors_missing)}}});
  families.push_back(
      {"refit_proofs_total",
       "counter",
       "Proofs in the background: source and target equal; different, which a trainer "
       "that has gone on explains; overtaken by the next refit; not readable; refuted by the "
       "digests "
       "that came with the refit, which poisons the module.",
       {{"", {{"result", "equal"}}, number(metrics.proofs.equal)},
        {"", {{"result", "different"}}, number(metrics.proofs.different)},
        {"", {{"result", "overtaken"}}, number(metrics.proofs.overtaken)},
        {"", {{"result", "unreadable"}}, number(metrics.proofs.unreadable)},
        {"", {{"result", "refuted"}}, number(metrics.proofs.refuted)}}});
  add_quotas(families, metrics.quotas);
  add_modules(families, metrics.modules);
  return families;
}

std::vector<MetricFamily> metric_families_of_no_daemon() { return {up(false)}; }

std::string prometheus_text(const std::vector<MetricFamily>& families) {
  std::string text;
  for (const MetricFamily& family : families) {
    if (family.samples.empty()) continue;
    text += "# HELP " + family.name + " " + family.help + "\n";
    text += "# TYPE " + family.name + " " + family.type + "\n";
    for (const MetricSample& sample : family.samples) {
      text += family.name + sample.suffix + label_list(sample.labels) + " " +
              number_text(sample.value) + "\n";
    }
  }
  return text;
}

std::string metrics_json(const std::vector<MetricFamily>& families) {
  Json list = Json::array();
  for (const MetricFamily& family : families) {
    Json samples = Json::array();
    for (const MetricSample& sample : family.samples) {
      Json labels = Json::object();
      for (const auto& [name, value] : sample.labels) labels[name] = value;
      samples.push_back({{"name", family.name + sample.suffix},
                         {"labels", labels},
                         {"value", std::isfinite(sample.value) ? Json(sample.value) : Json()}});
    }
    list.push_back({{"name", family.name},
                    {"type", family.type},
                    {"help", family.help},
                    {"samples", samples}});
  }
  return Json{{"metrics", list}}.dump(2, ' ', true, Json::error_handler_t::replace) + "\n";
}

}  // namespace refit::ctl
