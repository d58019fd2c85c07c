// The command line: what is understood and what is refused. One thread; sets REFIT_SOCKET.
#include "refitctl/options.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "support/text.hpp"

namespace refit::ctl {
namespace {

using test::contains;

class OptionsTest : public testing::Test {
 protected:
  void SetUp() override { ::setenv("REFIT_SOCKET", "/tmp/from-environment.sock", 1); }
  void TearDown() override { ::unsetenv("REFIT_SOCKET"); }

  static Outcome<std::variant<Options, Information>> parse(std::vector<const char*> arguments) {
    arguments.insert(arguments.begin(), "refitctl");
    return parse_options(static_cast<int>(arguments.size()), arguments.data());
  }

  static Options options(std::vector<const char*> arguments) {
    auto parsed = parse(std::move(arguments));
    if (!parsed || !std::holds_alternative<Options>(*parsed)) {
      ADD_FAILURE() << (parsed ? "information instead of options" : parsed.error().error.message);
      return {};
    }
    return std::get<Options>(std::move(*parsed));
  }

  static std::string information(std::vector<const char*> arguments) {
    auto parsed = parse(std::move(arguments));
    if (!parsed || !std::holds_alternative<Information>(*parsed)) {
      ADD_FAILURE() << "no information";
      return {};
    }
    return std::get<Information>(*parsed).text;
  }

  static Failure failure(std::vector<const char*> arguments) {
    auto parsed = parse(std::move(arguments));
    if (parsed) {
      ADD_FAILURE() << "was understood";
      return {};
    }
    return parsed.error();
  }
};

TEST_F(OptionsTest, StatusTakesTheEnvironmentsSocket) {
  const Options sut = options({"status"});

  EXPECT_EQ(sut.command, Command::status);
  EXPECT_EQ(sut.socket_path, "/tmp/from-environment.sock");
  EXPECT_EQ(sut.timeout_s, 10);
  EXPECT_FALSE(sut.json);
}

TEST_F(OptionsTest, CommonOptionsStandOnEitherSideOfTheCommand) {
  for (const auto& arguments :
       {std::vector<const char*>{"--socket", "/s", "--timeout", "2.5", "--json", "modules"},
        std::vector<const char*>{"modules", "--socket", "/s", "--timeout", "2.5", "--json"}}) {
    const Options sut = options(arguments);

    EXPECT_EQ(sut.command, Command::modules);
    EXPECT_EQ(sut.socket_path, "/s");
    EXPECT_EQ(sut.timeout_s, 2.5);
    EXPECT_TRUE(sut.json);
  }
}

TEST_F(OptionsTest, TensorsNeedsATarget) {
  EXPECT_EQ(options({"tensors", "e0/dit"}).target, (Target{"e0", "dit"}));
  EXPECT_EQ(failure({"tensors"}).exit, ExitCode::bad_arguments);
  const Failure sut = failure({"tensors", "e0"});
  EXPECT_EQ(sut.exit, ExitCode::bad_arguments);
  EXPECT_TRUE(contains(sut.error.message, "ENGINE/MODULE"));
}

TEST_F(OptionsTest, DigestTakesKindAndManyTensors) {
  const Options sut =
      options({"digest", "e0/dit", "--kind", "xxh3", "--tensor", "a", "b", "--tensor", "c"});

  EXPECT_EQ(sut.command, Command::digest);
  EXPECT_EQ(sut.target, (Target{"e0", "dit"}));
  EXPECT_EQ(sut.kind, DigestKind::xxh3);
  EXPECT_EQ(sut.tensors, (std::vector<std::string>{"a", "b", "c"}));
  EXPECT_EQ(sut.timeout_s, 600);
  EXPECT_TRUE(options({"digest", "e0/dit", "--module"}).module);
}

TEST_F(OptionsTest, DigestRefusesWhatItCannotMean) {
  EXPECT_TRUE(contains(failure({"digest", "e0/dit", "--kind", "md5"}).error.message, "md5"));
  EXPECT_EQ(failure({"digest", "e0/dit", "--kind", ""}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"digest", "e0/dit", "--tensor", ""}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"digest", "e0/dit", "--tensor", "a", "--module"}).exit,
            ExitCode::bad_arguments);
}

TEST_F(OptionsTest, CheckTakesTheManifestAloneOrWithATarget) {
  const Options alone = options({"check", "dir/m.json"});
  EXPECT_EQ(alone.command, Command::check);
  EXPECT_EQ(alone.manifest_path, "dir/m.json");
  EXPECT_FALSE(alone.target);

  for (const auto& arguments :
       {std::vector<const char*>{"check", "e0/dit", "m.json"},
        std::vector<const char*>{"check", "m.json", "--target", "e0/dit"},
        std::vector<const char*>{"check", "--target", "e0/dit", "m.json"}}) {
    const Options sut = options(arguments);
    EXPECT_EQ(sut.target, (Target{"e0", "dit"}));
    EXPECT_EQ(sut.manifest_path, "m.json");
  }
  EXPECT_EQ(options({"check", "-"}).manifest_path, "-");
}

TEST_F(OptionsTest, CheckRefusesTwoTargetsAndNoManifest) {
  EXPECT_TRUE(contains(failure({"check", "e0/dit", "m.json", "--target", "e1/dit"}).error.message,
                       "twice"));
  EXPECT_EQ(failure({"check"}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"check", ""}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"check", "a/b", "m.json", "third"}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"check", "m.json", "--target", ""}).exit, ExitCode::bad_arguments);
}

TEST_F(OptionsTest, TimeoutIsAPositiveNumber) {
  for (const char* text : {"0", "-1", "nan", "inf", "1e300", "soon", ""}) {
    EXPECT_EQ(failure({"status", "--timeout", text}).exit, ExitCode::bad_arguments) << text;
  }
}

TEST_F(OptionsTest, UnknownCommandIsNamedBesideTheKnownOnes) {
  const Failure sut = failure({"stats"});

  EXPECT_EQ(sut.exit, ExitCode::bad_arguments);
  EXPECT_TRUE(contains(sut.error.message, "\"stats\"")) << sut.error.message;
  EXPECT_TRUE(contains(sut.error.message, "doctor, drain or reload"));
  EXPECT_TRUE(contains(failure({}).error.message, "a command is missing"));
}

TEST_F(OptionsTest, UnknownOptionIsNamed) {
  const Failure sut = failure({"status", "--colour"});

  EXPECT_EQ(sut.exit, ExitCode::bad_arguments);
  EXPECT_TRUE(contains(sut.error.message, "--colour")) << sut.error.message;
  EXPECT_TRUE(contains(sut.advice, "--help"));
}

TEST_F(OptionsTest, SocketPathMustFitAnAddress) {
  // Goal: the same unusable path is an argument's fault or the environment's, whoever gave it.
  const std::string longest(107, 's');
  const std::string too_long(108, 's');

  EXPECT_EQ(options({"--socket", longest.c_str(), "status"}).socket_path, longest);
  EXPECT_EQ(failure({"--socket", too_long.c_str(), "status"}).exit, ExitCode::bad_arguments);
  EXPECT_EQ(failure({"--socket", "", "status"}).exit, ExitCode::bad_arguments);

  ::setenv("REFIT_SOCKET", too_long.c_str(), 1);
  const Failure sut = failure({"status"});
  EXPECT_EQ(sut.exit, ExitCode::bad_configuration);
  EXPECT_TRUE(contains(sut.error.message, "REFIT_SOCKET"));
  EXPECT_EQ(options({"--socket", "/s", "status"}).socket_path, "/s");
}

TEST_F(OptionsTest, HelpTeachesCommandsExitCodesAndKeys) {
  const std::string text = information({"--help"});
  for (const char* part :
       {"status", "sessions", "modules", "tensors", "digest", "check", "metrics", "drain", "doctor",
        "--socket", "--timeout", "--json", "REFIT_SOCKET", "NO_COLOR", "Exit status", "Examples"}) {
    EXPECT_TRUE(contains(text, part)) << part << "\n" << text;
  }
  for (const char* command : {"status", "sessions", "modules", "tensors", "digest", "check",
                              "metrics", "drain", "doctor"}) {
    const std::string help = information({command, "--help"});
    EXPECT_TRUE(contains(help, "JSON")) << help;
    EXPECT_TRUE(contains(help, "Examples")) << help;
  }
}

TEST_F(OptionsTest, WatchTakesAnIntervalOrItsDefault) {
  EXPECT_FALSE(options({"status"}).watch_interval_s);
  EXPECT_EQ(options({"status", "--watch"}).watch_interval_s, 1);
  EXPECT_EQ(options({"status", "--watch", "0.5"}).watch_interval_s, 0.5);
  EXPECT_EQ(options({"status", "--watch=2", "--json"}).watch_interval_s, 2);
  const Options json = options({"status", "--watch", "--json"});
  EXPECT_EQ(json.watch_interval_s, 1);
  EXPECT_TRUE(json.json);
  for (const char* interval : {"0", "-1", "often", "1s", "nan", "1e9"})
    EXPECT_EQ(failure({"status", "--watch", interval}).exit, ExitCode::bad_arguments) << interval;
  EXPECT_EQ(failure({"modules", "--watch"}).exit, ExitCode::bad_arguments);
}

TEST_F(OptionsTest, OperatingCommandsTakeTheirOptions) {
  EXPECT_EQ(options({"sessions"}).command, Command::sessions);
  EXPECT_EQ(options({"doctor"}).command, Command::doctor);
  EXPECT_EQ(options({"metrics", "--textfile", "a.prom"}).textfile_path, "a.prom");
  EXPECT_FALSE(options({"drain"}).wait);
  const Options drain = options({"drain", "--wait"});
  EXPECT_EQ(drain.command, Command::drain);
  EXPECT_TRUE(drain.wait);
  EXPECT_EQ(drain.timeout_s, 600);
  EXPECT_EQ(options({"reload"}).command, Command::reload);
  EXPECT_TRUE(options({"reload", "--wait"}).wait);
  EXPECT_TRUE(options({"modules", "--names"}).names);
  EXPECT_TRUE(options({"tensors", "e/m", "--names"}).names);
}

TEST_F(OptionsTest, TwoFormsOfOneAnswerAreRefused) {
  EXPECT_TRUE(
      contains(failure({"metrics", "--textfile", "a", "--json"}).error.message, "--textfile"));
  EXPECT_TRUE(contains(failure({"modules", "--names", "--json"}).error.message, "--names"));
  EXPECT_EQ(failure({"metrics", "--textfile", ""}).exit, ExitCode::bad_arguments);
}

TEST_F(OptionsTest, CompletionIsPrintedForBashAlone) {
  EXPECT_TRUE(contains(information({"--print-completion", "bash"}), "complete -F _refitctl"));
  EXPECT_EQ(failure({"--print-completion", "fish"}).exit, ExitCode::bad_arguments);
  EXPECT_FALSE(contains(information({"--help"}), "--print-completion"));
}

TEST_F(OptionsTest, VersionIsOneLine) {
  const std::string text = information({"--version"});

  EXPECT_EQ(text.substr(0, 9), "refitctl ");
  EXPECT_EQ(text.find('\n'), text.size() - 1);
}

}  // namespace
}  // namespace refit::ctl
