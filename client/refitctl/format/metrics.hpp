// The daemon's counters as metric families, and those as Prometheus text or JSON.
//
// Pure; any thread. Names, labels and units are an interface: only ever added to. Knows nothing of
// options, files and the socket.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "refit/observer.hpp"

namespace refit::ctl {

struct MetricSample {
  std::string suffix;  ///< what a histogram adds to the family's name
  std::vector<std::pair<std::string, std::string>> labels;
  double value = 0;
};

struct MetricFamily {
  std::string name;
  std::string type;  ///< counter, gauge or histogram
  std::string help;
  std::vector<MetricSample> samples;
};

[[nodiscard]] std::vector<MetricFamily> metric_families(const DaemonMetrics& metrics);

/// What is there to say of a daemon that does not answer: refit_up 0.
[[nodiscard]] std::vector<MetricFamily> metric_families_of_no_daemon();

/// The text exposition format, version 0.0.4. Families without a sample are left out.
[[nodiscard]] std::string prometheus_text(const std::vector<MetricFamily>& families);

/// The same with stable keys; an infinite value is null.
[[nodiscard]] std::string metrics_json(const std::vector<MetricFamily>& families);

}  // namespace refit::ctl
