// The commands. One thread. Know nothing of the option library.
#include "refitctl/commands.hpp"

#include <chrono>

#include "refit/observer.hpp"
#include "refitctl/ask.hpp"
#include "refitctl/check_result.hpp"
#include "refitctl/doctor/probe.hpp"
#include "refitctl/doctor/report.hpp"
#include "refitctl/drain.hpp"
#include "refitctl/format/json.hpp"
#include "refitctl/format/metrics.hpp"
#include "refitctl/format/text.hpp"
#include "refitctl/format/views.hpp"
#include "refitctl/manifest_file.hpp"
#include "refitctl/reload.hpp"
#include "refitctl/textfile.hpp"
#include "refitctl/users.hpp"

namespace refit::ctl {
namespace {

using Clock = Deadline::Clock;

std::string module_names(const DaemonStatus& status) {
  std::string text;
  for (const ModuleStatus& module : status.modules)
    text += escape(module.engine + "/" + module.module) + "\n";
  return text;
}

Outcome<Answer> show_status(const Options& options, const Style& style) {
  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  Result<DaemonStatus> status = observer->status(deadline);
  if (!status) return failed(options, std::move(status).error(), Stage::ask);

  if (options.command == Command::sessions) {
    return Answer{options.json ? sessions_json(*status)
                               : sessions_text(*status, user_label, style)};
  }
  if (options.names) return Answer{module_names(*status)};
  if (options.command == Command::modules) {
    return Answer{options.json ? modules_json(*status) : modules_text(*status, style)};
  }
  return Answer{options.json ? status_json(*status) : status_text(*status, style)};
}

Outcome<Answer> show_tensors(const Options& options, const Style& style) {
  const Target& target = *options.target;
  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  Result<std::vector<TensorSpec>> tensors =
      observer->tensors(target.engine, target.module, deadline);
  if (!tensors) return failed(options, std::move(tensors).error(), Stage::ask);

  if (options.names) {
    std::string names;
    for (const TensorSpec& tensor : *tensors) names += escape(tensor.name) + "\n";
    return Answer{std::move(names)};
  }
  return Answer{options.json ? tensors_json(target, *tensors)
                             : tensors_text(target, *tensors, style)};
}

Outcome<Answer> show_digest(const Options& options, const Style& style) {
  const Target& target = *options.target;
  DigestRequest request;
  request.engine = target.engine;
  request.module = target.module;
  request.kind = options.kind.value_or(DigestKind::sglang);
  request.selection = options.tensors;
  request.per_module = options.module;
  request.place = options.place;

  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  const Clock::time_point start = Clock::now();
  Result<DigestReport> report = observer->digest(request, deadline);
  const double elapsed_us = us_since(start);
  if (!report) return failed(options, std::move(report).error(), Stage::ask);

  const ExitCode exit = is_whole(report->state) ? ExitCode::ok : ExitCode::failure;
  if (!options.json) {
    return Answer{digest_text(target, request.kind, *report, elapsed_us, style), exit};
  }
  Result<std::string> json = digest_json(target, request.kind, *report, request.place);
  if (!json) return failed(options, std::move(json).error(), Stage::ask);
  return Answer{std::move(*json), exit};
}

// A check as it will be asked, from the manifest and the options.
struct CheckPlan {
  CheckRequest request;
  std::optional<Digest> module;
};

Result<CheckPlan> plan_check(const Options& options) {
  const std::string label = manifest_label(options.manifest_path);
  REFIT_TRY_ASSIGN(const std::string text, read_manifest_text(options.manifest_path));
  REFIT_TRY_ASSIGN(ManifestFile file, parse_manifest(text, label));

  if (file.kind && options.kind && *file.kind != *options.kind) {
    return fail(Errc::bad_argument,
                label + " holds digests of kind " + std::string(digest_kind_name(*file.kind)) +
                    ", and --kind says " + std::string(digest_kind_name(*options.kind)));
  }
  const DigestKind kind = file.kind ? *file.kind : options.kind.value_or(DigestKind::sglang);
  if (kind == DigestKind::xxh3) {
    return fail(Errc::bad_argument, label +
                                        " cannot be checked: XXH3 finds accidents and proves "
                                        "nothing; save SHA-256 with `refitctl digest --kind "
                                        "sglang`, or raw");
  }
  REFIT_TRY(check_digest_lengths(file, kind, label));

  const std::optional<Target>& target = options.target ? options.target : file.target;
  if (!target) {
    return fail(Errc::bad_argument,
                label +
                    " names no engine and module: give the target, as in `refitctl check "
                    "ENGINE/MODULE " +
                    options.manifest_path + "`");
  }
  return CheckPlan{{target->engine, target->module, kind, std::move(file.expected), options.place},
                   file.module};
}

Outcome<Answer> show_check(const Options& options, const Style& style) {
  Result<CheckPlan> plan = plan_check(options);
  if (!plan) return failed(options, std::move(plan).error(), Stage::manifest);
  const CheckRequest& request = plan->request;

  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  const Clock::time_point start = Clock::now();
  Result<CheckReport> report = observer->check(request, deadline);
  if (!report) return failed(options, std::move(report).error(), Stage::ask);

  CheckResult result;
  result.target = {request.engine, request.module};
  result.kind = request.kind;
  result.place = request.place;
  result.expected = request.expected.size();
  result.report = std::move(*report);

  if (plan->module) {
    Result<DigestReport> digests =
        observer->digest({request.engine, request.module, request.kind, {}, true}, deadline);
    if (!digests) return failed(options, std::move(digests).error(), Stage::ask);
    if (digests->version != result.report.version) {
      return failed(options,
                    Error{Errc::busy,
                          0,
                          result.target.to_string() + " was refitted while it was checked: from " +
                              std::to_string(result.report.version) + " to version " +
                              std::to_string(digests->version),
                          {}},
                    Stage::ask);
    }
    result.module_equal = digests->module == *plan->module;
    // Either answer may have met a module that is not whole.
    if (!is_whole(digests->state)) result.report.state = digests->state;
  }
  result.elapsed_us = us_since(start);

  // Says how much of the module the manifest left out; a check is complete without.
  if (Result<DaemonStatus> status = observer->status(deadline)) {
    for (const ModuleStatus& module : status->modules) {
      if (module.engine == request.engine && module.module == request.module) {
        result.tensors_live = module.tensors;
      }
    }
  }
  return Answer{options.json ? check_json(result) : check_text(result, style),
                result.ok() ? ExitCode::ok : ExitCode::failure};
}

Outcome<DaemonMetrics> ask_metrics(const Options& options) {
  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  Result<DaemonMetrics> metrics = observer->metrics(deadline);
  if (!metrics) return failed(options, std::move(metrics).error(), Stage::ask);
  return std::move(*metrics);
}

Outcome<Answer> show_metrics(const Options& options) {
  const Outcome<DaemonMetrics> metrics = ask_metrics(options);
  if (!options.textfile_path.empty()) {
    // Series of a daemon that is gone must not stay: the collector would go on telling them.
    const Result<void> written = replace_file(
        options.textfile_path,
        prometheus_text(metrics ? metric_families(*metrics) : metric_families_of_no_daemon()));
    if (!metrics) return Failed(metrics.error());
    if (!written) return failed(options, written.error(), Stage::output);
    return Answer{};
  }
  if (!metrics) return Failed(metrics.error());
  const std::vector<MetricFamily> families = metric_families(*metrics);
  return Answer{options.json ? metrics_json(families) : prometheus_text(families)};
}

Answer show_doctor(const Options& options, const Style& style) {
  const std::vector<Finding> findings = judge(probe_host(options));
  return {options.json ? doctor_json(findings) : doctor_text(findings, style),
          any_failed(findings) ? ExitCode::failure : ExitCode::ok};
}

}  // namespace

Outcome<Answer> run_command(const Options& options, const Style& style) {
  switch (options.command) {
    case Command::status:
    case Command::sessions:
    case Command::modules:
      return show_status(options, style);
    case Command::tensors:
      return show_tensors(options, style);
    case Command::digest:
      return show_digest(options, style);
    case Command::check:
      return show_check(options, style);
    case Command::metrics:
      return show_metrics(options);
    case Command::reload:
      return reload(options, style);
    case Command::doctor:
      return show_doctor(options, style);
    case Command::drain:
      return drain(options, style);
  }
  return failed(options, Error{Errc::bad_argument, 0, "no such command", {}}, Stage::arguments);
}

}  // namespace refit::ctl
