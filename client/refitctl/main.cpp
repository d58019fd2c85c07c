// refitctl: wires options, the command and the output. One thread. Decides nothing but where text
// goes.
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <exception>
#include <string>
#include <string_view>
#include <variant>

#include "refitctl/commands.hpp"
#include "refitctl/options.hpp"
#include "refitctl/output.hpp"
#include "refitctl/watch.hpp"

namespace {

using refit::ctl::ExitCode;
using refit::ctl::Failure;
using refit::ctl::Information;
using refit::ctl::Options;

// If standard error cannot be written, the exit status is all that is left to say.
ExitCode report(const Failure& failure, bool json) {
  (void)refit::ctl::write_all(
      STDERR_FILENO,
      json ? failure_json(failure) : failure_text(failure, refit::ctl::style_of(STDERR_FILENO)));
  return failure.exit;
}

ExitCode print(const std::string& text, ExitCode exit, bool json) {
  auto written = refit::ctl::write_all(STDOUT_FILENO, text);
  if (written) return exit;
  return report(refit::ctl::explain(std::move(written).error(), refit::ctl::Stage::output), json);
}

// For arguments that were not understood as a whole: a program still wants its kind of answer.
bool asks_for_json(int argc, const char* const* argv) {
  return std::find(argv, argv + argc, std::string_view("--json")) != argv + argc;
}

ExitCode run(int argc, const char* const* argv) {
  auto parsed = refit::ctl::parse_options(argc, argv);
  if (!parsed) return report(parsed.error(), asks_for_json(argc, argv));
  if (const auto* information = std::get_if<Information>(&*parsed)) {
    return print(information->text, ExitCode::ok, false);
  }
  const Options& options = std::get<Options>(*parsed);
  if (options.watch_interval_s) {
    const auto ended = refit::ctl::watch_status(options);
    return ended ? *ended : report(ended.error(), options.json);
  }
  const auto answer = refit::ctl::run_command(options, refit::ctl::style_of(STDOUT_FILENO));
  if (!answer) return report(answer.error(), options.json);
  return print(answer->text, answer->exit, options.json);
}

}  // namespace

int main(int argc, char** argv) {
  // A reader that went away is told by write(), which takes it as the end and not as a failure.
  std::signal(SIGPIPE, SIG_IGN);
  try {
    return static_cast<int>(run(argc, argv));
  } catch (const std::exception& error) {
    // Out of memory, in practice: everything else is a Result.
    const std::string text = std::string("refitctl: error: ") + error.what() + "\n";
    (void)refit::ctl::write_all(STDERR_FILENO, text);
    return static_cast<int>(ExitCode::failure);
  }
}
