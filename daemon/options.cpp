#include "options.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "ipc/handshake.hpp"
#include "version.hpp"

namespace refit::daemon {
namespace {

std::string version_text() {
  char text[256];
  std::snprintf(text, sizeof text, "refitd %s\nprotocol %u, layout %016llx, CUDA off%s", kVersion,
                static_cast<unsigned>(kProtocolVersion),
                static_cast<unsigned long long>(kLayoutHash),
#ifdef REFIT_TEST_POINTS
                ", test points on"
#else
                ""
#endif
  );
  return text;
}

}  // namespace

ParsedOptions parse_options(int argc, char** argv) {
  ParsedOptions parsed;
  Options& options = parsed.options;
  CLI::App app{
      "refitd moves a trainer's weights into a live engine on the same host.\n\n"
      "Trainers and engines connect through the socket and register shared memory once; a refit is "
      "then one small message.\n"
      "Needs no configuration. Under systemd the socket comes by activation; elsewhere name "
      "one:\n\n"
      "  refitd --socket $XDG_RUNTIME_DIR/refit/refitd.sock\n",
      "refitd"};
  app.add_option(
         "--socket", options.socket_path,
         "listen on this path (directory must exist); without it, the socket that systemd passes")
      ->type_name("PATH");
  const std::map<std::string, Waiting> modes{
      {"off", Waiting::off}, {"adaptive", Waiting::adaptive}, {"always", Waiting::always}};
  app.add_option(
         "--waiting", options.waiting,
         "how to wait for peers: off (block at once), adaptive (read for microseconds first), "
         "always (never block; needs a core of its own)")
      ->transform(CLI::CheckedTransformer(modes, CLI::ignore_case))
      ->default_str("adaptive");
  app.add_option("--copy-threads", options.copy_threads, "threads that copy; 0: one for each CPU")
      ->check(CLI::Range(0, 256))
      ->capture_default_str();
  app.add_option("--check-threads", options.check_threads,
                 "threads that hash and populate; 0: one for each CPU")
      ->check(CLI::Range(0, 256))
      ->capture_default_str();
  app.add_option("--drain-timeout-ms", options.drain_timeout_ms,
                 "on SIGTERM: how long waiting refits may still take")
      ->check(CLI::Range(0, 600'000))
      ->capture_default_str();
  app.add_flag("-v,--verbose", options.verbose, "log sessions and registrations, not only trouble");
  app.set_version_flag("--version", version_text());
  app.footer(
      "Signals: SIGTERM and SIGINT drain and exit 0. Exit codes: 0 ok, 1 runtime failure, 2 bad "
      "arguments, 4 permission.");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    parsed.exit_code = app.exit(error) == 0 ? kExitOk : kExitBadArguments;
  }
  return parsed;
}

}  // namespace refit::daemon
