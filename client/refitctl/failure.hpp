// What refitctl says and with which status it ends when something did not work.
//
// Pure; any thread. The only place that maps outcome codes to exit codes and to advice. Knows
// nothing of options and commands.
#pragma once

#include <string>
#include <tl/expected.hpp>

#include "refit/result.hpp"
#include "refitctl/format/style.hpp"

namespace refit::ctl {

/// Documented in `refitctl --help`; scripts depend on them.
enum class ExitCode : int {
  ok = 0,
  failure = 1,
  bad_arguments = 2,
  permission = 4,
  missing_library = 5,
  bad_configuration = 6,
};

/// Where it went wrong: the same errno means another thing in each place.
enum class Stage { arguments, manifest, configuration, connect, ask, output };

struct Failure {
  ExitCode exit = ExitCode::failure;
  Error error;
  std::string advice;  ///< what to do; empty if nothing helps; may have several lines
};

struct FailureContext {
  std::string socket_path;
  double timeout_s = 0;
  bool socket_given = true;  ///< by --socket, and not by the environment
};

[[nodiscard]] ExitCode exit_code_for(const Error& error, Stage stage) noexcept;

/// Adds the exit code and the advice.
[[nodiscard]] Failure explain(Error error, Stage stage, const FailureContext& context = {});

/// For stderr, each line ended; every part that others chose is escaped.
[[nodiscard]] std::string failure_text(const Failure& failure, const Style& style);

/// One JSON object in one line: {"error": {code, native, exit, message, details, advice}}.
[[nodiscard]] std::string failure_json(const Failure& failure);

template <typename T>
using Outcome = tl::expected<T, Failure>;

using Failed = tl::unexpected<Failure>;

}  // namespace refit::ctl
