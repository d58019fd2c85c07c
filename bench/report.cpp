// Tables and verdicts. See report.hpp.
//
// Entered by the orchestrating thread. A figure that is missing is `skipped`, and a skipped bar is
// not a passed one.
#include "report.hpp"

#include <cstdio>
#include <fstream>
#include <functional>
#include <optional>
#include <set>
#include <vector>

namespace refit::bench {
namespace {

using nlohmann::ordered_json;

struct Bar {
  const char* what;
  const char* path;  ///< JSON pointer into the figures
  bool at_most;
  double bar;
  std::optional<double> aim;
  /// Empty if the bar speaks to these figures, else what it is stated for.
  std::function<std::string(const ordered_json&)> elsewhere;
};

std::string anywhere(const ordered_json&) { return ""; }

std::string at_full_scale(const ordered_json& figures) {
  return figures.at("scale") == 1.0 ? "" : "stated for --scale 1";
}

std::string wan_or_klein(const ordered_json& figures) {
  const bool stated =
      figures.at("model") == "wan2.1-t2v-1.3b" || figures.at("model") == "flux2-klein-4b";
  return stated ? at_full_scale(figures) : "stated for wan2.1-t2v-1.3b and flux2-klein-4b";
}

std::string klein(const ordered_json& figures) {
  return figures.at("model") == "flux2-klein-4b" ? at_full_scale(figures)
                                                 : "stated for flux2-klein-4b";
}

bool has_sha_ni(const ordered_json& figures) { return figures.at("machine").at("sha_ni") == true; }

std::string with_sha_ni(const ordered_json& figures) {
  return has_sha_ni(figures) ? at_full_scale(figures) : "stated for CPUs with SHA-NI";
}

std::string without_sha_ni(const ordered_json& figures) {
  return has_sha_ni(figures) ? "stated for CPUs without SHA-NI" : at_full_scale(figures);
}

std::string with_825_tensors(const ordered_json& figures) {
  return figures.at("tensors") == 825 ? "" : "stated for 825 tensors (wan2.1-t2v-1.3b)";
}

std::string with_1693_tensors(const ordered_json& figures) {
  return figures.at("tensors") == 1693 ? "" : "stated for 1,693 tensors (qwen-image)";
}

/// What must hold where devices copy: counts, which any driver shows.
std::vector<Bar> device_bars(const ordered_json& figures) {
  const double pairs = figures.at("memory") == "offload" ? 2 : 1;
  return {
      {"driver calls that open or allocate, full size", "/driver_opens_per_refit/full", true, 0,
       std::nullopt, anywhere},
      {"driver calls that open or allocate, 64-byte tensors", "/driver_opens_per_refit/small", true,
       0, std::nullopt, anywhere},
      {"driver calls that copy, one for each pair of places, full size",
       "/driver_copies_per_refit/full", true, pairs, std::nullopt, anywhere},
      {"driver calls that copy, one for each pair of places, 64-byte tensors",
       "/driver_copies_per_refit/small", true, pairs, std::nullopt, anywhere},
  };
}

const std::vector<Bar>& host_bars() {
  static const std::vector<Bar> all{
      {"refit over memcpy", "/refit_over_memcpy", true, 1.05, 1.00, wan_or_klein},
      {"growth of a refit by its proof", "/proof/growth", true, 0.05, 0.02, at_full_scale},
      {"first refit over memcpy", "/first_refit_over_memcpy", true, 1.3, 1.1, at_full_scale},
      {"fixed overhead, adaptive, p50, us", "/fixed_overhead_us/adaptive/p50", true, 100, 30,
       with_825_tensors},
      {"fixed overhead, adaptive, p99, us", "/fixed_overhead_us/adaptive/p99", true, 1500, 300,
       with_825_tensors},
      {"fixed overhead, engine busy in 200 us steps, p50, us", "/fixed_overhead_busy_us/p50", true,
       250, 230, with_825_tensors},
      {"adaptive over off, p50", "/adaptive_over_off/p50", true, 1.0, std::nullopt, anywhere},
      {"ring round trip, always, p50, ns", "/ring_rtt_ns/always/p50", true, 600, 350, anywhere},
      {"check over cores x one OpenSSL stream", "/check_over_floor", false, 1.5, 1.75, with_sha_ni},
      {"the same without SHA-NI", "/check_over_floor", false, 0.95, 1.0, without_sha_ni},
      {"XXH3-128 of all tensors over reading them", "/check_xxh3_over_read", false, 0.8, 0.95,
       at_full_scale},
      {"allocations per refit, full size", "/allocations_per_refit/full", true, 0, std::nullopt,
       anywhere},
      {"allocations per refit, 64-byte tensors", "/allocations_per_refit/small", true, 0,
       std::nullopt, anywhere},
      {"opens per refit, full size", "/opens_per_refit/full", true, 0, std::nullopt, anywhere},
      {"opens per refit, 64-byte tensors", "/opens_per_refit/small", true, 0, std::nullopt,
       anywhere},
      {"page faults per refit, full size", "/page_faults_per_refit/full", true, 0, std::nullopt,
       anywhere},
      {"page faults per refit, 64-byte tensors", "/page_faults_per_refit/small", true, 0,
       std::nullopt, anywhere},
      {"system calls per refit, full size", "/syscalls_per_refit/full", true, 12, 8, anywhere},
      {"system calls per refit, 64-byte tensors", "/syscalls_per_refit/small", true, 6, 4,
       anywhere},
      {"kill -9 to the next good refit, max, ms", "/reconnect_ms/full/max", true, 300, std::nullopt,
       with_825_tensors},
      {"the same with 64-byte tensors", "/reconnect_ms/small/max", true, 300, std::nullopt,
       anywhere},
      {"registration, ms", "/register_ms", true, 30, 5, with_1693_tensors},
      {"populate over one MADV_POPULATE", "/populate_over_madvise", true, 1.2, std::nullopt,
       at_full_scale},
      {"populate over one MADV_POPULATE, 4 KiB pages", "/populate_4k_over_madvise", true, 1.2,
       std::nullopt, at_full_scale},
      {"daemon's private memory, MiB", "/daemon_private_MiB", true, 64, 32, klein},
  };
  return all;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, value >= 1000 ? "%.0f" : value >= 100 ? "%.1f" : "%.4g", value);
  return text;
}

std::string text_of(const ordered_json& value) {
  if (value.is_null()) return "-";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_number_integer()) return value.dump();
  if (value.is_number()) return number(value.get<double>());
  std::string text;
  for (const auto& [key, part] : value.items())
    text += (text.empty() ? "" : "   ") + key + " " + text_of(part);
  return text;
}

void print_row(const std::vector<std::string>& cells, const std::vector<std::size_t>& widths) {
  std::string line;
  for (std::size_t i = 0; i < cells.size(); ++i) {
    line += cells[i];
    if (i + 1 < cells.size()) line += std::string(widths[i] - cells[i].size() + 2, ' ');
  }
  std::printf("%s\n", line.c_str());
}

void print_table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths(rows.front().size(), 0);
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (std::size_t i = 0; i < rows.size(); ++i) {
    print_row(rows[i], widths);
    if (i != 0) continue;
    std::vector<std::string> rule;
    for (const std::size_t width : widths) rule.emplace_back(width, '-');
    print_row(rule, widths);
  }
}

/// Figures that take a line for each of their parts.
const std::set<std::string> kLists{"memcpy_methods_s", "syscalls_by_name", "driver_calls_by_name",
                                   "driver", "machine"};

/// A time, or a ratio or a rate of times.
bool is_time(const std::string& key) {
  for (const std::string part : {"_s", "_ms", "_us", "_ns", "_GBps", "_per_GB", "_over_"}) {
    const auto at = key.rfind(part);
    if (at == std::string::npos) continue;
    if (part.back() == '_' || at + part.size() == key.size()) return true;
  }
  return false;
}

bool is_of_fake_driver(const ordered_json& figures) {
  return figures.at("driver").is_object() && figures.at("driver").at("kind") == "fake";
}

std::string reason_for(const ordered_json& figures, const std::string& path) {
  for (const ordered_json& entry : figures.at("skipped")) {
    std::string key("/");
    key += entry.at("key").get<std::string>();
    for (char& letter : key) letter = letter == '.' ? '/' : letter;
    if (path.rfind(key, 0) == 0) return entry.at("reason").get<std::string>();
  }
  return "not part of this run";
}

}  // namespace

void judge(ordered_json& figures) {
  if (is_of_fake_driver(figures)) {
    figures["not_of_hardware"] = ordered_json::array();
    for (const auto& [key, value] : figures.items()) {
      if (is_time(key) && !value.is_null()) figures["not_of_hardware"].push_back(key);
    }
  }
  figures["bars"] = ordered_json::array();
  const bool on_host = figures.at("memory") == "host";
  for (const Bar& bar : on_host ? host_bars() : device_bars(figures)) {
    ordered_json row{
        {"what", bar.what}, {"value", nullptr}, {"bar", bar.bar}, {"at_most", bar.at_most}};
    row["aim"] = bar.aim ? ordered_json(*bar.aim) : ordered_json(nullptr);
    const ordered_json::json_pointer path(bar.path);
    const ordered_json value = figures.contains(path) ? figures.at(path) : ordered_json(nullptr);
    const std::string elsewhere = bar.elsewhere(figures);
    row["value"] = value;
    if (value.is_null()) {
      row["verdict"] = "skipped";
      row["note"] = reason_for(figures, bar.path);
    } else if (figures.at("quick") == true) {
      row["verdict"] = "not judged";
      row["note"] = "--quick measures nothing";
    } else if (!elsewhere.empty()) {
      row["verdict"] = "not judged";
      row["note"] = elsewhere;
    } else {
      const double measured = value.get<double>();
      const auto reaches = [&](double limit) {
        return bar.at_most ? measured <= limit : measured >= limit;
      };
      row["verdict"] = reaches(bar.bar) ? "pass" : "miss";
      row["note"] = bar.aim && reaches(*bar.aim) ? "aim reached" : "";
    }
    figures["bars"].push_back(row);
  }
}

void print_tables(const ordered_json& figures) {
  const bool fake = is_of_fake_driver(figures);
  std::vector<std::vector<std::string>> rows{{"figure", "value"}};
  if (fake) rows.front() = {"figure", "says nothing of hardware", "value"};
  for (const auto& [key, value] : figures.items()) {
    if (key == "bars" || key == "skipped" || key == "not_of_hardware" || value.is_null()) continue;
    const bool marked = is_time(key);
    const auto add = [&rows, fake, marked](const std::string& name, const ordered_json& of) {
      rows.push_back({name, text_of(of)});
      if (fake) rows.back().insert(rows.back().end() - 1, marked ? "fake driver" : "");
    };
    if (kLists.count(key) == 0 || !value.is_object()) {
      add(key, value);
      continue;
    }
    for (const auto& [name, part] : value.items()) add(key + ": " + name, part);
  }
  print_table(rows);
  std::printf("\n");
  rows = {{"what must hold", "value", "bar", "aim", "verdict", "note"}};
  for (const ordered_json& bar : figures.at("bars")) {
    const std::string sign = bar.at("at_most").get<bool>() ? "<= " : ">= ";
    rows.push_back({bar.at("what").get<std::string>(), text_of(bar.at("value")),
                    sign + number(bar.at("bar").get<double>()), text_of(bar.at("aim")),
                    bar.at("verdict").get<std::string>(), bar.at("note").get<std::string>()});
  }
  print_table(rows);
  std::printf("\n");
  for (const ordered_json& entry : figures.at("skipped")) {
    std::printf("skipped %s: %s\n", entry.at("key").get<std::string>().c_str(),
                entry.at("reason").get<std::string>().c_str());
  }
  std::printf("Skipped is not passed.\n");
}

Result<void> write_json(const ordered_json& figures, const std::string& path) {
  std::ofstream stream(path);
  stream << figures.dump(2) << "\n";
  stream.flush();
  if (!stream) return fail(Errc::os, "cannot write '" + path + "'");
  return {};
}

}  // namespace refit::bench
