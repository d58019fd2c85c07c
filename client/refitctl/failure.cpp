// Exit codes, advice and the text of failures. Pure; any thread. Knows nothing of options and
// commands.
#include "refitctl/failure.hpp"

#include <array>
#include <cerrno>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <string_view>

#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

bool is_denial(const Error& error) noexcept {
  return error.code == Errc::permission ||
         (error.code == Errc::os && (error.native == EACCES || error.native == EPERM));
}

// A path as one word of a shell command.
std::string shell_word(const std::string& path) {
  constexpr std::string_view kPlain =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./-+=:,@%";
  if (!path.empty() && path.find_first_not_of(kPlain) == std::string::npos) return path;
  std::string quoted = "'";
  for (const char c : path) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

std::string connect_advice(const Error& error, const FailureContext& context) {
  constexpr const char* kOtherSocket =
      "a daemon elsewhere is named with --socket PATH or REFIT_SOCKET";
  if (is_denial(error)) {
    return "`ls -l " + shell_word(context.socket_path) +
           "` shows who may use it: run as its owner or as a member of its group";
  }
  // The client library says how to start a daemon.
  if (error.code == Errc::os || error.code == Errc::bad_argument) return kOtherSocket;
  return {};
}

std::string general_advice(const Error& error, const FailureContext& context) {
  switch (error.code) {
    case Errc::deadline: {
      std::array<char, 64> seconds{};
      std::snprintf(seconds.data(), seconds.size(), "%g", context.timeout_s);
      return "no answer within " + std::string(seconds.data()) +
             " s: the daemon is stopped or busy; allow more with --timeout SECONDS";
    }
    case Errc::daemon_gone:
      return "the daemon ended while it was asked: read its log, and start it again";
    case Errc::protocol_version:
    case Errc::protocol:
      return "refitctl and refitd are of different releases: install both from one, and restart "
             "refitd";
    case Errc::permission:
      return "ask as the user who runs the engine";
    case Errc::no_such_engine:
    case Errc::no_such_module:
      return "`refitctl modules` lists what is registered";
    case Errc::manifest_mismatch:
      return "`refitctl tensors ENGINE/MODULE` lists what a module has";
    case Errc::shutting_down:
      return "the daemon is draining: try again when it is back";
    case Errc::poisoned:
      return "refit the whole module to make it whole again";
    case Errc::bad_configuration:
      return "the old configuration holds; `refitd --check-config FILE` looks at one without a "
             "daemon";
    case Errc::busy:
      return "try again";
    default:
      return {};
  }
}

}  // namespace

ExitCode exit_code_for(const Error& error, Stage stage) noexcept {
  if (stage == Stage::configuration) return ExitCode::bad_configuration;
  if (is_denial(error)) return ExitCode::permission;
  switch (error.code) {
    case Errc::ok:
      return ExitCode::ok;
    case Errc::bad_argument:
      return ExitCode::bad_arguments;
    case Errc::unsupported:
      return ExitCode::missing_library;
    case Errc::not_enough_cores:
    case Errc::bad_configuration:
      return ExitCode::bad_configuration;
    default:
      return ExitCode::failure;
  }
}

Failure explain(Error error, Stage stage, const FailureContext& context) {
  Failure failure;
  const bool is_default_path = stage == Stage::connect && !context.socket_given;
  failure.exit = exit_code_for(
      error, is_default_path && error.code == Errc::bad_argument ? Stage::configuration : stage);
  if (stage == Stage::connect) failure.advice = connect_advice(error, context);
  if (failure.advice.empty() && (stage == Stage::connect || stage == Stage::ask)) {
    failure.advice = general_advice(error, context);
  }
  if (stage == Stage::arguments) failure.advice = "`refitctl --help` shows how, with examples";
  failure.error = std::move(error);
  return failure;
}

std::string failure_text(const Failure& failure, const Style& style) {
  std::string text = "refitctl: " + style.paint(Paint::bad, "error:") + " " +
                     escape(failure.error.message) + " [" +
                     std::string(errc_name(failure.error.code)) + "]\n";
  for (const std::string& line : failure.error.details) text += "  " + escape(line) + "\n";
  if (!failure.advice.empty()) text += "  " + escape(failure.advice) + "\n";
  return text;
}

std::string failure_json(const Failure& failure) {
  const nlohmann::json json = {{"error",
                                {{"code", errc_name(failure.error.code)},
                                 {"native", failure.error.native},
                                 {"exit", static_cast<int>(failure.exit)},
                                 {"message", failure.error.message},
                                 {"details", failure.error.details},
                                 {"advice", failure.advice}}}};
  return json.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace) + "\n";
}

}  // namespace refit::ctl
