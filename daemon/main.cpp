// refitd: wires the daemon together and runs it in the foreground.

#include <sys/resource.h>

#include <csignal>
#include <cstdio>

#include "config/command_line.hpp"
#include "config/exit_code.hpp"
#include "log.hpp"
#include "memory/sigbus_guard.hpp"
#include "server/server.hpp"
#include "test_point.hpp"

namespace {

using namespace refit;
using namespace refit::daemon;

int exit_code_of(const Error& error) {
  switch (error.code) {
    case Errc::bad_argument:
      return kExitBadArguments;
    case Errc::bad_configuration:
      return kExitBadConfiguration;
    case Errc::permission:
      return kExitPermission;
    case Errc::cuda:
      return kExitDeviceLost;
    default:
      return error.native == EACCES || error.native == EPERM ? kExitPermission : kExitFailure;
  }
}

/// Signals become events of the loop; blocked before any thread exists, so that none can take them.
void block_signals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

/// Every session needs some file descriptors; the soft limit of 1,024 is for programs that use
/// select().
void raise_file_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

Result<void> serve(const CommandLine& line) {
  REFIT_TRY(install_sigbus_handler());
  REFIT_TRY_ASSIGN(auto configuration, load(line.configuration));
  auto listener =
      line.socket_path.empty() ? Listener::from_systemd() : Listener::bind(line.socket_path);
  if (!listener) return Unexpected(listener.error());
  REFIT_TRY_ASSIGN(auto server, Server::create(std::move(configuration), line.configuration,
                                               std::move(*listener)));
  test_point("ready");
  return server->run();
}

/// --check-config and --print-config: no side effects, nothing is opened but the file.
int show_configuration(const CommandLine& line) {
  const auto configuration = load(line.configuration);
  if (!configuration) {
    std::fprintf(stderr, "refitd: %s\n", configuration.error().to_string().c_str());
    return kExitBadConfiguration;
  }
  if (line.action == CommandLine::Action::print_config) {
    std::fputs(print(*configuration).c_str(), stdout);
  } else {
    std::printf("%s: %s\n", configuration->file.c_str(),
                configuration->file_read ? "ok" : "not there; the built-in settings hold");
  }
  return kExitOk;
}

}  // namespace

int main(int argc, char** argv) {
  const CommandLine line = parse_command_line(argc, argv);
  switch (line.action) {
    case CommandLine::Action::finished:
      return line.exit_code;
    case CommandLine::Action::check_config:
    case CommandLine::Action::print_config:
      return show_configuration(line);
    case CommandLine::Action::print_reference:
      std::fputs(reference_json().c_str(), stdout);
      return kExitOk;
    case CommandLine::Action::serve:
      break;
  }
  block_signals();
  raise_file_limit();
  const Result<void> outcome = serve(line);
  if (!outcome) {
    log(LogEvent::failed, outcome.error().to_string(),
        {.errc = outcome.error().code, .native = outcome.error().native});
    return exit_code_of(outcome.error());
  }
  return kExitOk;
}
