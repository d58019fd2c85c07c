// refitd: wires the daemon together and runs it in the foreground.

#include <sys/resource.h>

#include <csignal>

#include "log.hpp"
#include "memory/sigbus_guard.hpp"
#include "options.hpp"
#include "server/server.hpp"
#include "test_point.hpp"

namespace {

using namespace refit;
using namespace refit::daemon;

int exit_code_of(const Error& error) {
  switch (error.code) {
    case Errc::bad_argument:
      return kExitBadArguments;
    case Errc::permission:
      return kExitPermission;
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
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGHUP, SIG_IGN);
}

/// Every session needs some file descriptors; the soft limit of 1,024 is for programs that use
/// select().
void raise_file_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

Result<void> serve(const Options& options) {
  REFIT_TRY(install_sigbus_handler());
  auto listener =
      options.socket_path.empty() ? Listener::from_systemd() : Listener::bind(options.socket_path);
  if (!listener) return Unexpected(listener.error());
  REFIT_TRY_ASSIGN(auto server, Server::create(options, std::move(*listener)));
  test_point("ready");
  return server->run();
}

}  // namespace

int main(int argc, char** argv) {
  const ParsedOptions parsed = parse_options(argc, argv);
  if (parsed.exit_code >= 0) return parsed.exit_code;
  block_signals();
  raise_file_limit();
  const Result<void> outcome = serve(parsed.options);
  if (!outcome) {
    log(LogEvent::failed, outcome.error().to_string(),
        {.errc = outcome.error().code, .native = outcome.error().native});
    return exit_code_of(outcome.error());
  }
  return kExitOk;
}
