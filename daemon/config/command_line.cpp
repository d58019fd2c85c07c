#include "config/command_line.hpp"

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "config/exit_code.hpp"
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

constexpr const char* kAbout =
    "refitd moves a trainer's weights into a live engine on the same host.\n\n"
    "Trainers and engines connect through the socket and register shared memory once; a refit is "
    "then one small "
    "message.\n"
    "Needs no configuration. Under systemd the socket comes by activation; elsewhere name one:\n\n"
    "  refitd --socket $XDG_RUNTIME_DIR/refit/refitd.sock\n";

std::string footer() {
  std::string text =
      "A flag goes before the file, the file before what is built in. Limits and permissions stand "
      "in "
      "the file only: refitd.toml(5).\n"
      "Signals: SIGTERM and SIGINT drain and exit 0; SIGHUP reads the file again.\nExit codes:";
  for (const ExitMeaning& one : kExitMeanings)
    text += "\n  " + std::to_string(one.code) + "  " + std::string(one.meaning);
  return text;
}

/// Everything that the command line takes; made twice, to parse and to describe.
class Parser {
 public:
  Parser() {
    app_.add_option("--socket", line_.socket_path,
                    "Listen on this path (its directory must exist); without it, the socket that "
                    "systemd passes.")
        ->type_name("PATH");
    file_ = app_.add_option(
                    "--config", line_.configuration.file,
                    std::string("Read this file; without it, ") + kDefaultFile + " if it is there.")
                ->type_name("FILE");
    check_ = app_.add_option("--check-config", check_file_,
                             "Say everything that is wrong with the configuration and exit, with 0 "
                             "if nothing is.")
                 ->type_name("[FILE]")
                 ->expected(0, 1);
    app_.add_flag("--print-config", print_wanted_,
                  "Print the settings in force, each with its origin, and exit.");
    values_.resize(options().size());
    for (std::size_t i = 0; i < options().size(); ++i) {
      const Option& option = options()[i];
      given_.push_back(option.flag.empty() ? nullptr : add(option, values_[i]));
    }
    app_.set_version_flag("--version", version_text(),
                          "Print version, protocol and layout, and exit.");
    app_.set_help_flag("-h,--help", "Print this and exit.");
    app_.add_flag("--print-reference", reference_wanted_, "")->group("");
    app_.footer(footer());
  }

  CommandLine parse(int argc, char** argv) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::ParseError& error) {
      return finished(app_.exit(error) == 0 ? kExitOk : kExitBadArguments);
    }
    using Action = CommandLine::Action;
    ConfigurationSource& source = line_.configuration;
    source.file_required = file_->count() > 0;
    if (reference_wanted_) line_.action = Action::print_reference;
    if (print_wanted_) line_.action = Action::print_config;
    if (check_->count() > 0) {
      line_.action = Action::check_config;
      if (!check_file_.empty()) {
        source.file = check_file_;
        source.file_required = true;
      }
    }
    for (std::size_t i = 0; i < options().size(); ++i) {
      if (given_[i] == nullptr || given_[i]->count() == 0) continue;
      const Option& option = options()[i];
      const auto value = parse_value(option, values_[i]);
      if (!value) {
        std::fprintf(stderr,
                     "refitd: --%s is %s, and not \"%s\"\nRun with --help for more information.\n",
                     given_[i]->get_lnames().front().c_str(), allowed_text(option).c_str(),
                     values_[i].c_str());
        return finished(kExitBadArguments);
      }
      source.flags.emplace_back(&option, *value);
    }
    return line_;
  }

  [[nodiscard]] nlohmann::ordered_json flags() const {
    nlohmann::ordered_json list;
    for (const CLI::Option* option : app_.get_options()) {
      if (option->get_group().empty()) continue;
      std::string type = option->get_type_name();
      list.push_back({{"flag", option->get_name(false, true)},
                      {"type", type},
                      {"help", option->get_description()}});
    }
    return list;
  }

 private:
  CLI::Option* add(const Option& option, std::string& value) {
    const std::string flag(option.flag);
    const std::string help(option.help);
    if (option.type == OptionType::boolean) return app_.add_flag(flag, value, help);
    const std::string type = option.type == OptionType::waiting ? "MODE" : "N";
    return app_.add_option(flag, value, help + " Default: " + default_text(option) + ".")
        ->type_name(type);
  }

  static std::string default_text(const Option& option) {
    std::string text = value_text(option, option.fallback);
    std::erase(text, '"');
    return text;
  }

  CommandLine finished(int exit_code) {
    line_.action = CommandLine::Action::finished;
    line_.exit_code = exit_code;
    return line_;
  }

  CLI::App app_{kAbout, "refitd"};
  CommandLine line_;
  std::string check_file_;
  std::vector<std::string> values_;
  std::vector<CLI::Option*> given_;
  CLI::Option* file_ = nullptr;
  CLI::Option* check_ = nullptr;
  bool print_wanted_ = false;
  bool reference_wanted_ = false;
};

}  // namespace

CommandLine parse_command_line(int argc, char** argv) { return Parser().parse(argc, argv); }

std::string reference_json() {
  nlohmann::ordered_json reference;
  reference["version"] = kVersion;
  reference["default_file"] = kDefaultFile;
  reference["about"] = kAbout;
  reference["flags"] = Parser().flags();
  for (const Option& option : options()) {
    reference["options"].push_back({{"key", option.key},
                                    {"flag", option.flag},
                                    {"allowed", allowed_text(option)},
                                    {"default", value_text(option, option.fallback)},
                                    {"live", option.live},
                                    {"help", option.help}});
  }
  for (const RuleKey& key : rule_keys())
    reference["rule_keys"].push_back(
        {{"key", key.key}, {"allowed", key.allowed}, {"help", key.help}});
  for (const ExitMeaning& one : kExitMeanings)
    reference["exit_codes"].push_back({{"code", one.code}, {"meaning", one.meaning}});
  return reference.dump(1) + "\n";
}

}  // namespace refit::daemon
