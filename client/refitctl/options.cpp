// Parsing of the command line. One thread. The only place that knows the option library; knows
// nothing of the daemon.
#include "refitctl/options.hpp"

#include <sys/un.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <sstream>

#include "refit/connection.hpp"
#include "refitctl/completion.hpp"
#include "refitctl/manifest_file.hpp"

namespace refit::ctl {
namespace {

constexpr double kShortTimeoutS = 10;
constexpr double kHashingTimeoutS = 600;
constexpr double kDrainTimeoutS = 600;
constexpr double kTimeoutMaxS = 1e6;
constexpr double kWatchS = 1;
constexpr double kWatchMinS = 0.1;
constexpr double kWatchMaxS = 86'400;
constexpr std::size_t kSocketPathBytesMax = sizeof(sockaddr_un::sun_path) - 1;

constexpr const char* kVersionText = "refitctl " REFITCTL_VERSION;

constexpr const char* kFooter = R"(Examples:
  refitctl status                                 the daemon, its modules, their last refits
  refitctl tensors engine0/transformer            what one module consists of
  refitctl digest engine0/transformer --json > step7.json
  refitctl check step7.json                       does the engine still hold these weights?
  refitctl check engine1/transformer step7.json   does another engine hold the same?
  refitctl status --json | jq '.modules[] | {engine, version, us: .last_refit.total_us}'
  refitctl metrics --textfile /var/lib/node_exporter/textfile/refit.prom
  refitctl doctor                                 what works on this host, and what to change
  refitctl reload --wait                          take a changed refitd.toml over
  refitctl drain --wait                           finish what runs, then end
`refitctl COMMAND --help` explains a command and the keys of its JSON.

Environment:
  REFIT_SOCKET   the daemon's socket, unless --socket is given; if it is unset,
                 $XDG_RUNTIME_DIR/refit/refitd.sock if it is there, else /run/refitd/refitd.sock
  NO_COLOR       if it is set, no colours even on a terminal

Exit status:
  0  done; of check: all that is expected is there and equal, and the module is whole
  1  failed; of doctor: refits cannot work like this; of check: something differs or is missing; of check and digest: the module is
     poisoned or being written
  2  bad arguments, or a manifest that is none
  4  no permission
  5  something that this build or this machine lacks; the message names it
  6  bad configuration: the environment names a socket that cannot be one; of reload: the file is
     wrong
With --json a failure is one JSON object in one line on standard error:
  {"error": {"code", "native", "exit", "message", "details", "advice"}})";

constexpr const char* kStatusFooter = R"(Phases of each module's last refit, in microseconds:
  wait   for earlier work on the engine and for pages
  gate   until the engine held still
  copy   the bytes
  check  verification inside the refit
  total  from the request's arrival to the reply

JSON:
  daemon    {version, pid, uptime_us, socket, waiting, copy_kernel, copy_threads, draining,
            refits}
  sessions  as `refitctl sessions --json`
  modules   as `refitctl modules --json`

--watch redraws on a terminal until Ctrl-C. Into a pipe it appends lines, with --json one object a
turn, with "time", and "note" where something happened to the daemon. A daemon that is restarted
meanwhile is waited for; without an answer a turn has "error" instead of the keys above.

Examples:
  refitctl status
  refitctl status --watch
  refitctl status --watch 0.5 --json | jq -c '[.time, .daemon.refits]'
  refitctl --socket /tmp/refitd.sock status)";

constexpr const char* kSessionsFooter =
    R"(One line for each trainer, engine and tool that is connected. SIZE is what a session's regions
have mapped, IN FLIGHT how many of its requests the daemon has not answered.

JSON:
  sessions  [{id, role, name, uid, pid, modules, asleep, regions, registered_bytes, in_flight,
            age_us}]

Examples:
  refitctl sessions
  refitctl sessions --json | jq -r '.sessions[] | select(.role == "engine") | .pid')";

constexpr const char* kModulesFooter = R"(JSON:
  modules  [{engine, module, state, version, source, transaction, tensors, bytes, refits,
           populated, asleep, last_refit: {wait_us, gate_us, copy_us, check_us, total_us, bytes}}]
  source, transaction and last_refit are null before the first refit; state is initial, writing,
  committed or poisoned.

Examples:
  refitctl modules
  refitctl modules --json | jq -r '.modules[] | select(.state == "poisoned") | .engine'
  for m in $(refitctl modules --names); do refitctl digest "$m" --kind xxh3; done)";

constexpr const char* kTensorsFooter =
    R"(Offsets are bytes, strides elements. Where a tensor is part of a larger one, OF SHAPE is
whole and AT where the part begins.

JSON:
  engine, module
  tensors  [{name, dtype, shape, strides, region, offset_bytes, bytes, global_shape, box_offset}]

Examples:
  refitctl tensors engine0/transformer
  refitctl tensors engine0/vae --json | jq '[.tensors[].bytes] | add')";

constexpr const char* kDigestFooter =
    R"(The bytes are read in the engine's live memory, never in a copy. Kinds:
  sglang  SHA-256 of dtype, shape and bytes, as SGLang computes it
  raw     SHA-256 of the bytes alone, as sha256sum computes it
  xxh3    XXH3-128 of the bytes: fast, finds accidents, proves nothing; check refuses it

JSON, which `refitctl check` takes as it is:
  engine, module, kind, version, state
  tensors        {name: hex}
  module_digest  hex with --module, else null
  device         {name: hex} of resident layers, and
  absent         names that have no place there now: with --place device or all

Examples:
  refitctl digest engine0/transformer
  refitctl digest engine0/transformer --tensor proj_out.weight --kind raw
  refitctl digest engine0/transformer --module --json > step7.json)";

constexpr const char* kCheckFooter = R"(MANIFEST.json is what `refitctl digest --json` wrote,
  {"engine": "engine0", "module": "transformer", "kind": "sglang",
   "tensors": {"proj_out.weight": "9f86d081...", ...}}
or a plain object of names and digests, for which the target is an argument:
  {"proj_out.weight": "9f86d081...", ...}
A target that is given goes before the manifest's. Tensors that the manifest does not name are
not looked at.

JSON:
  engine, module, kind, state, version
  ok                   true if all below is as it should be and the module is whole
  expected, equal      how many tensors
  missing, mismatched  names, sorted and complete
  device_mismatched    the same on the device, and
  absent               names with no place there now: with --place device or all
  module_equal         whether the module's own digest is equal; null if the manifest has none
  tensors_live         how many tensors the module has

Examples:
  refitctl check step7.json
  refitctl check engine1/transformer step7.json
  refitctl check digests.json --target engine0/transformer --kind raw
  refitctl digest engine0/vae --json | refitctl check engine1/vae -)";

constexpr const char* kMetricsFooter =
    R"(Text that Prometheus reads (exposition format 0.0.4): refits and why they failed, bytes, phases as
histograms in seconds, checks, quotas by uid, and of each module its version, its state and how far
the last check that proved it whole lies back. Counters begin anew with the daemon. The daemon
itself opens no network socket: node_exporter's textfile collector, fed by a timer, brings the
metrics to Prometheus.

With --textfile a file of the same folder is written, synced and renamed, so that the collector
never reads half of one. If the daemon does not answer the file says `refit_up 0` and nothing else,
and the exit status is that of the failure.

JSON:
  metrics  [{name, type, help, samples: [{name, labels, value}]}]; an infinite value is null

Examples:
  refitctl metrics
  refitctl metrics --textfile /var/lib/node_exporter/textfile/refit.prom
  refitctl metrics --json | jq '.metrics[] | select(.name == "refit_module_version")')";

constexpr const char* kReloadFooter =
    R"(The daemon reads its configuration again and checks all of it before it takes any of it over. If
something is wrong with the file, every error is told with file and line, the exit status is 6, and
the old configuration holds. Only root and the daemon's own user may.

With --wait this returns when the new configuration is in force, or refused. Without it half a
second is waited: usually that is enough to know; if not, the daemon's log tells the outcome.

JSON:
  done                    false if it was not waited for
  file                    what was read
  changed, needs_restart  keys; what needs a restart of refitd was left alone; null if not done

Examples:
  refitctl reload --wait
  refitd --check-config /etc/refitd/refitd.toml && refitctl reload --wait)";

constexpr const char* kDoctorFooter =
    R"(Tries what refits need, here and now: sealed memory, populated and huge pages, process handles;
reads limits, the CPU, the sockets that clients would choose; and asks the daemon if there is one.
What it makes it takes away again. Run it as the user who has the trouble.
  ok    as it should be
  warn  works, but slower, smaller or harder to run; also where no daemon runs
  fail  refits cannot work like this

JSON:
  ok      true if nothing failed
  checks  [{id, title, verdict, found, advice}]; verdict is ok, warn or fail, ids stay as they are

Examples:
  refitctl doctor
  sudo -u trainer refitctl doctor
  refitctl doctor --json | jq -r '.checks[] | select(.verdict != "ok") | .advice')";

constexpr const char* kDrainFooter =
    R"(As SIGTERM: new refits, checks and registrations are refused (shutting_down), what runs is
finished, what still waits after the daemon's drain timeout is called off, and the daemon exits 0.
Only root and the daemon's own user may. Under socket activation the next client starts it again:
stop refitd.socket to keep it down.

Without --wait this returns when the daemon has begun. With --wait it returns when the daemon's
process has ended; --timeout bounds that, and its passing does not take the request back.

JSON:
  pid     of the daemon
  ended   true with --wait
  us      how long it took

Examples:
  refitctl drain
  refitctl drain --wait --timeout 60 && echo down)";

Error wrong(std::string message) { return Error{Errc::bad_argument, 0, std::move(message), {}}; }

Result<void> check_socket_path(const std::string& path, const std::string& origin) {
  if (path.empty()) {
    return Unexpected(wrong(origin + " is empty: give the path of the daemon's socket"));
  }
  if (path.size() > kSocketPathBytesMax) {
    return Unexpected(wrong(origin + " has " + std::to_string(path.size()) +
                            " bytes, a socket's path at most " +
                            std::to_string(kSocketPathBytesMax) + ": " + path));
  }
  return {};
}

// What the option library filled in, before it is understood.
struct Raw {
  std::string socket_path;
  double timeout_s = 0;
  std::string target;
  std::string kind;
  std::string place;
  std::vector<std::string> check_arguments;
  std::string watch_s;
  std::string shell;
};

// The library's own usage line cannot say that one of two positionals may be left out.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_usage(const CLI::App* app, std::string /*name*/) const override {
    const std::string& command = app->get_name();
    std::string usage = "Usage: refitctl ";
    if (app->get_parent() == nullptr) {
      usage += "[OPTIONS] COMMAND ...";
    } else {
      usage += command + " [OPTIONS]";
      if (command == "tensors" || command == "digest") usage += " ENGINE/MODULE";
      if (command == "check") usage += " [ENGINE/MODULE] MANIFEST.json";
      usage += "\nand the common options --socket, --timeout, --json: `refitctl --help`";
    }
    return usage + "\n";
  }
};

class CommandLine {
 public:
  CommandLine() {
    app_.formatter(std::make_shared<HelpFormatter>());
    app_.footer(kFooter);
    app_.set_version_flag("--version", kVersionText, "Show the version and exit");
    app_.require_subcommand(0, 1);
    app_.fallthrough();
    app_.get_formatter()->column_width(32);
    socket_ = app_.add_option("--socket", raw_.socket_path,
                              "The daemon's socket (default: see Environment)")
                  ->type_name("PATH");
    timeout_ =
        app_.add_option("--timeout", raw_.timeout_s,
                        "Longest wait for the answer (default: 10; digest, check, drain: 600)")
            ->type_name("SECONDS");
    shell_ = app_.add_option("--print-completion", raw_.shell, "A script for the shell")
                 ->type_name("bash")
                 ->group("");
    app_.add_flag("--json", options_.json, "JSON with stable keys instead of tables");

    status_ =
        command("status", "The daemon, its sessions, modules and their last refits", kStatusFooter);
    watch_ = status_->add_option("--watch", raw_.watch_s, "Look again every so often (default: 1)")
                 ->type_name("[SECONDS]")
                 ->expected(0, 1);
    sessions_ = command("sessions", "Who is connected, and what they hold", kSessionsFooter);
    modules_ = command("modules", "The modules that engines have registered", kModulesFooter);
    add_names(modules_);
    tensors_ = command("tensors", "The tensors of a module", kTensorsFooter);
    add_target(tensors_);
    add_names(tensors_);

    digest_ = command("digest", "Digests of a module's live bytes", kDigestFooter);
    add_target(digest_);
    add_kind(digest_, "Which digest (default: sglang)", "sglang|raw|xxh3");
    add_place(digest_);
    digest_->add_option("--tensor", options_.tensors, "Only these; after the target, or repeated")
        ->type_name("NAME")
        ->check(not_empty());
    digest_->add_flag("--module", options_.module,
                      "Also one digest of the whole module, a serial stream: slow");

    check_ =
        command("check", "Compare a module's live bytes with a manifest of digests", kCheckFooter);
    check_
        ->add_option("MANIFEST.json", raw_.check_arguments,
                     "What to compare with; - for standard input. A target may stand before it")
        ->type_name(" ");
    target_ = check_->add_option("--target", raw_.target, "The module, as an option")
                  ->type_name("ENGINE/MODULE");
    add_kind(check_, "Of a plain manifest (default: sglang)", "sglang|raw");
    add_place(check_);

    metrics_ = command("metrics", "Counters and histograms for Prometheus", kMetricsFooter);
    textfile_ = metrics_
                    ->add_option("--textfile", options_.textfile_path,
                                 "Replace this file instead of writing to standard output")
                    ->type_name("PATH")
                    ->check(not_empty());
    doctor_ = command("doctor", "What works on this host, and what to change", kDoctorFooter);
    drain_ = command("drain", "Let the daemon finish what runs, and end", kDrainFooter);
    drain_->add_flag("--wait", options_.wait, "Return when the daemon has ended");
    reload_ = command("reload", "Let the daemon read its configuration again", kReloadFooter);
    reload_->add_flag("--wait", options_.wait, "Return when it is in force or refused");
  }

  Outcome<std::variant<Options, Information>> parse(int argc, const char* const* argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) {
        std::ostringstream out;
        std::ostringstream ignored;
        app_.exit(error, out, ignored);
        return Information{out.str()};
      }
      return bad_arguments(wrong(describe(error)));
    }
    if (shell_->count() > 0) {
      if (raw_.shell == "bash") return Information{bash_completion(completed_commands())};
      return bad_arguments(
          wrong("completion is made for bash, and not for \"" + raw_.shell + "\""));
    }
    if (app_.get_subcommands().empty()) {
      return bad_arguments(wrong(std::string("a command is missing: ") + kCommandNames));
    }
    if (Result<void> understood = understand(); !understood) {
      return bad_arguments(std::move(understood).error());
    }
    if (socket_->count() == 0) {
      options_.socket_path = default_socket_path();
      Result<void> usable = check_socket_path(
          options_.socket_path, "the default socket's path (of REFIT_SOCKET or XDG_RUNTIME_DIR)");
      if (!usable) return Failed(explain(std::move(usable).error(), Stage::configuration));
    }
    return std::move(options_);
  }

 private:
  static constexpr const char* kCommandNames =
      "status, sessions, modules, tensors, digest, check, metrics, doctor, drain or reload";

  CLI::App* command(const char* name, const char* description, const char* footer) {
    CLI::App* sub = app_.add_subcommand(name, description);
    sub->footer(footer);
    return sub;
  }

  void add_target(CLI::App* sub) {
    sub->add_option("ENGINE/MODULE", raw_.target, "The module")->type_name(" ");
  }

  void add_names(CLI::App* sub) {
    sub->add_flag("--names", options_.names, "Only the names, one a line, as the table has them");
  }

  void add_kind(CLI::App* sub, const char* description, const char* kinds) {
    sub->add_option("--kind", raw_.kind, description)->type_name(kinds)->check(not_empty());
  }

  void add_place(CLI::App* sub) {
    sub->add_option("--place", raw_.place, "Where offloaded layers are looked at (default: host)")
        ->type_name("host|device|all")
        ->check(not_empty());
  }

  static CLI::Validator not_empty() {
    return {[](std::string& value) {
              return value.empty() ? std::string("the value is empty") : std::string();
            },
            "", "not empty"};
  }

  [[nodiscard]] std::string describe(const CLI::ParseError& error) const {
    // The library's words for a first word that is no command speak of arguments.
    if (app_.get_subcommands().empty()) {
      const std::vector<std::string> rest = app_.remaining();
      if (!rest.empty() && rest.front().substr(0, 1) != "-") {
        return "\"" + rest.front() + "\" is no command; the commands are " + kCommandNames;
      }
    }
    const std::vector<std::string> extras = app_.remaining(true);
    if (extras.empty()) return error.what();
    std::string text = "not understood:";
    for (const std::string& extra : extras) text += " " + extra;
    return text;
  }

  Result<void> understand() {
    if (socket_->count() > 0) {
      REFIT_TRY(check_socket_path(raw_.socket_path, "--socket"));
      options_.socket_path = raw_.socket_path;
      options_.socket_given = true;
    }
    const bool hashes = digest_->parsed() || check_->parsed();
    options_.timeout_s = hashes             ? kHashingTimeoutS
                         : drain_->parsed() ? kDrainTimeoutS
                                            : kShortTimeoutS;
    if (timeout_->count() > 0) {
      // Written so that NaN is refused too.
      if (!(raw_.timeout_s > 0 && raw_.timeout_s <= kTimeoutMaxS)) {
        return Unexpected(wrong("--timeout is a number of seconds above 0, at most 1000000"));
      }
      options_.timeout_s = raw_.timeout_s;
    }
    if (watch_->count() > 0) {
      REFIT_TRY_ASSIGN(options_.watch_interval_s, parse_interval(raw_.watch_s));
    }
    if (!raw_.kind.empty()) {
      options_.kind = parse_digest_kind(raw_.kind);
      if (!options_.kind) {
        return Unexpected(wrong("--kind is sglang, raw or xxh3, and not \"" + raw_.kind + "\""));
      }
    }

    if (!raw_.place.empty()) {
      const auto places = {Place::host, Place::device, Place::all};
      const auto* place = std::find_if(places.begin(), places.end(),
                                       [&](Place one) { return place_name(one) == raw_.place; });
      if (place == places.end()) {
        return Unexpected(wrong("--place is host, device or all, and not \"" + raw_.place + "\""));
      }
      options_.place = *place;
    }

    options_.command = status_->parsed()     ? Command::status
                       : sessions_->parsed() ? Command::sessions
                       : metrics_->parsed()  ? Command::metrics
                       : drain_->parsed()    ? Command::drain
                       : reload_->parsed()   ? Command::reload
                       : doctor_->parsed()   ? Command::doctor
                       : modules_->parsed()  ? Command::modules
                       : tensors_->parsed()  ? Command::tensors
                       : digest_->parsed()   ? Command::digest
                                             : Command::check;
    if (options_.command == Command::check) {
      if (raw_.check_arguments.empty()) return Unexpected(wrong("check needs a MANIFEST.json"));
      if (raw_.check_arguments.size() > 2) {
        return Unexpected(wrong("check takes [ENGINE/MODULE] MANIFEST.json, and no third \"" +
                                raw_.check_arguments[2] + "\""));
      }
      options_.manifest_path = raw_.check_arguments.back();
      if (options_.manifest_path.empty()) return Unexpected(wrong("the manifest's path is empty"));
      if (raw_.check_arguments.size() == 2) {
        if (target_->count() > 0) {
          return Unexpected(wrong("the target is given twice, as \"" +
                                  raw_.check_arguments.front() + "\" and by --target"));
        }
        raw_.target = raw_.check_arguments.front();
      }
    }
    if (options_.module && !options_.tensors.empty()) {
      return Unexpected(wrong("--module is of all tensors, --tensor of some: give one of them"));
    }
    if (options_.json && (options_.names || textfile_->count() > 0)) {
      return Unexpected(wrong(std::string(options_.names ? "--names" : "--textfile") +
                              " and --json are two forms of the answer: give one of them"));
    }
    const bool given =
        options_.command == Command::check
            ? target_->count() > 0 || raw_.check_arguments.size() == 2
            : options_.command == Command::tensors || options_.command == Command::digest;
    if (given && raw_.target.empty()) {
      return Unexpected(wrong("the module is missing: write ENGINE/MODULE"));
    }
    if (given) {
      REFIT_TRY_ASSIGN(options_.target, parse_target(raw_.target));
    }
    return {};
  }

  std::vector<CompletedCommand> completed_commands() const {
    std::vector<CompletedCommand> commands{completed("", app_)};
    for (const CLI::App* sub : app_.get_subcommands([](const CLI::App*) { return true; }))
      commands.push_back(completed(sub->get_name(), *sub));
    return commands;
  }

  static CompletedCommand completed(const std::string& name, const CLI::App& app) {
    CompletedCommand command{name, {}, {}};
    for (const CLI::Option* option : app.get_options([](const CLI::Option*) { return true; })) {
      if (option->get_positional()) {
        command.arguments.push_back(ValueKind::module);
        if (option->get_name(true) == "MANIFEST.json") command.arguments.push_back(ValueKind::file);
      }
      if (option->get_group().empty()) continue;
      for (const std::string& long_name : option->get_lnames())
        command.options.push_back(completed_option("--" + long_name, *option));
    }
    return command;
  }

  static CompletedOption completed_option(std::string name, const CLI::Option& option) {
    const std::string type = option.get_type_name();
    if (option.get_items_expected_max() == 0) return {std::move(name), ValueKind::none, {}};
    if (type.find('|') != std::string::npos)
      return {std::move(name), ValueKind::words, CLI::detail::split(type, '|')};
    const ValueKind kind = type == "PATH"            ? ValueKind::file
                           : type == "ENGINE/MODULE" ? ValueKind::module
                           : type == "NAME"          ? ValueKind::tensor
                                                     : ValueKind::any;
    return {std::move(name), kind, {}};
  }

  static Result<double> parse_interval(const std::string& text) {
    if (text.empty()) return kWatchS;
    char* end = nullptr;
    const double seconds = std::strtod(text.c_str(), &end);
    if (*end != '\0' || !(seconds >= kWatchMinS && seconds <= kWatchMaxS)) {
      return Unexpected(wrong("--watch takes seconds from 0.1 to 86400, and not \"" + text + "\""));
    }
    return seconds;
  }

  static Failed bad_arguments(Error error) {
    return Failed(explain(std::move(error), Stage::arguments));
  }

  CLI::App app_{
      "Shows what refitd holds, and proves it: modules, tensors, digests of live weights.",
      "refitctl"};
  Raw raw_;
  Options options_;
  CLI::Option* socket_ = nullptr;
  CLI::Option* timeout_ = nullptr;
  CLI::Option* target_ = nullptr;
  CLI::Option* shell_ = nullptr;
  CLI::Option* watch_ = nullptr;
  CLI::Option* textfile_ = nullptr;
  CLI::App* status_ = nullptr;
  CLI::App* sessions_ = nullptr;
  CLI::App* modules_ = nullptr;
  CLI::App* tensors_ = nullptr;
  CLI::App* digest_ = nullptr;
  CLI::App* check_ = nullptr;
  CLI::App* metrics_ = nullptr;
  CLI::App* doctor_ = nullptr;
  CLI::App* drain_ = nullptr;
  CLI::App* reload_ = nullptr;
};

}  // namespace

Outcome<std::variant<Options, Information>> parse_options(int argc, const char* const* argv) {
  CommandLine line;
  return line.parse(argc, argv);
}

}  // namespace refit::ctl
