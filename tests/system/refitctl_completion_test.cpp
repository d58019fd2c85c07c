// Bash's completion of refitctl: bash sources what the tool prints, and completes command lines
// with it, with and without a live daemon.
//
// One thread, a daemon, and a bash for each line.
#include <sstream>

#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

class RefitctlCompletion : public RefitctlSystem {
 protected:
  void SetUp() override {
    RefitctlSystem::SetUp();
    const Finished script = run(REFITCTL_PATH, {"--print-completion", "bash"});
    ASSERT_EQ(script.status, 0) << script.err;
    script_ = file("refitctl.bash", script.out);
  }

  /// What bash offers after `words`, of which the last one is being typed.
  std::vector<std::string> complete(std::vector<std::string> words) {
    words.insert(words.begin(), REFITCTL_PATH);
    std::string program = "source " + script_ + "; COMP_WORDS=(";
    for (const std::string& word : words) program += " '" + word + "'";
    program += "); COMP_CWORD=" + std::to_string(words.size() - 1) +
               "; _refitctl; for reply in \"${COMPREPLY[@]}\"; do echo \"$reply\"; done";
    RunOptions options;
    options.environment["REFIT_SOCKET"] = socket_path_;
    const Finished finished = run("/bin/bash", {"-c", program}, options);
    EXPECT_EQ(finished.err, "") << program;
    std::vector<std::string> replies;
    std::istringstream lines(finished.out);
    for (std::string line; std::getline(lines, line);) replies.push_back(line);
    return replies;
  }

  std::string script_;
};

using Words = std::vector<std::string>;

TEST_F(RefitctlCompletion, CommandsAreThoseOfTheHelp) {
  // Goal: none is forgotten. Method: each line of the help's list of subcommands is offered.
  const std::string help = run(REFITCTL_PATH, {"--help"}).out;
  std::istringstream lines(help.substr(help.find("Subcommands:")));
  Words expected;
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line) && line.rfind("  ", 0) == 0)
    expected.push_back(line.substr(2, line.find(' ', 2) - 2));
  ASSERT_GE(expected.size(), 9U) << help;

  EXPECT_EQ(complete({""}), expected);
  EXPECT_EQ(complete({"dr"}), Words{"drain"});
  EXPECT_EQ(complete({"--socket", "/x", "dr"}), Words{"drain"});
  EXPECT_EQ(complete({"--json", "sess"}), Words{"sessions"});
  EXPECT_EQ(complete({"nothing-like-it"}), Words{});
}

TEST_F(RefitctlCompletion, OptionsAreThoseOfTheCommandAndTheCommonOnes) {
  EXPECT_EQ(complete({"drain", "--w"}), Words{"--wait"});
  EXPECT_EQ(complete({"status", "--w"}), Words{"--watch"});
  EXPECT_EQ(complete({"modules", "--w"}), Words{});
  EXPECT_EQ(complete({"drain", "--so"}), Words{"--socket"});
  EXPECT_EQ(complete({"--ver"}), Words{"--version"});
  // What is not meant for people is not offered.
  EXPECT_EQ(complete({"--print"}), Words{});
}

TEST_F(RefitctlCompletion, KindsAreThoseThatTheCommandTakes) {
  EXPECT_EQ(complete({"digest", "e/m", "--kind", ""}), (Words{"sglang", "raw", "xxh3"}));
  EXPECT_EQ(complete({"check", "x.json", "--kind", ""}), (Words{"sglang", "raw"}));
  EXPECT_EQ(complete({"digest", "--kind", "=", "x"}), Words{"xxh3"});
  EXPECT_EQ(complete({"digest", "--kind", "="}), (Words{"sglang", "raw", "xxh3"}));
  EXPECT_EQ(complete({"status", "--timeout", ""}), Words{});
}

TEST_F(RefitctlCompletion, LiveNamesAreOffered) {
  daemon_->start();
  start_engine({"proj_out.weight", "proj_in.weight", "norm"});

  EXPECT_EQ(complete({"digest", "e"}), Words{"engine0/transformer"});
  EXPECT_EQ(complete({"tensors", ""}), Words{"engine0/transformer"});
  EXPECT_EQ(complete({"check", "--target", ""}), Words{"engine0/transformer"});
  EXPECT_EQ(complete({"digest", "x"}), Words{});
  EXPECT_EQ(complete({"digest", "engine0/transformer", "--tensor", "proj_"}),
            (Words{"proj_out.weight", "proj_in.weight"}));
  EXPECT_EQ(complete({"--socket", socket_path_, "digest", ""}), Words{"engine0/transformer"});
  EXPECT_EQ(complete({"--socket", "/nowhere", "digest", ""}), Words{});
}

TEST_F(RefitctlCompletion, AbsentDaemonIsQuiet) {
  EXPECT_EQ(complete({"digest", ""}), Words{});
  EXPECT_EQ(complete({"digest", "e/m", "--tensor", ""}), Words{});
}

TEST_F(RefitctlCompletion, FilesAreOfferedWhereFilesStand) {
  const std::string manifest = file("step 7.json", "{}");

  EXPECT_EQ(complete({"check", folder_ + "/st"}), Words{manifest});
  EXPECT_EQ(complete({"check", "e/m", folder_ + "/st"}), Words{manifest});
  EXPECT_EQ(complete({"metrics", "--textfile", folder_ + "/st"}), Words{manifest});
}

TEST_F(RefitctlCompletion, NamesThatOthersChoseAreNotRun) {
  // Goal: a peer that calls a tensor by a command does not run it in an operator's shell. Method:
  // the command would leave a file; what is offered is quoted, so that bash takes it for one word.
  const std::string trap = folder_ + "/trap";
  const std::string name = "x$(touch " + trap + ")`touch " + trap + "`; touch " + trap;
  daemon_->start();
  start_engine({name});

  const Words sut = complete({"digest", "engine0/transformer", "--tensor", "x"});

  ASSERT_EQ(sut.size(), 1U);
  EXPECT_FALSE(std::filesystem::exists(trap));
  const Finished word = run("/bin/bash", {"-c", "printf %s " + sut[0]});
  EXPECT_EQ(word.out, name);
  EXPECT_FALSE(std::filesystem::exists(trap));
}

TEST_F(RefitctlCompletion, OtherShellsAreRefused) {
  const Finished sut = run(REFITCTL_PATH, {"--print-completion", "fish"});

  EXPECT_EQ(sut.status, 2);
  EXPECT_TRUE(contains(sut.err, "fish")) << sut.err;
}

}  // namespace
}  // namespace refit::test
