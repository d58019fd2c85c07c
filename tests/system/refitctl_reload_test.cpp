// `refitctl reload` against a live daemon with a configuration file of the test's own.
//
// One thread, and a daemon.
#include <sys/stat.h>

#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

class RefitctlReload : public RefitctlSystem {
 protected:
  void start_with(const std::string& configuration) {
    configuration_ = file("refitd.toml", configuration);
    daemon_->start(REFITD_PATH, "", {"--config", configuration_});
  }

  std::string configuration_;
};

TEST_F(RefitctlReload, ChangedKeysAreToldAndThoseThatNeedARestart) {
  start_with("drain_timeout_ms = 1000\n");
  file("refitd.toml", "drain_timeout_ms = 2000\ncopy_threads = 1\n");

  const Finished text = refitctl({"reload", "--wait"});
  file("refitd.toml", "drain_timeout_ms = 3000\ncopy_threads = 1\n");
  const json root = parsed(refitctl({"reload", "--wait", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, "reloaded " + configuration_)) << text.out;
  EXPECT_TRUE(contains(text.out, "in force now:\n  drain_timeout_ms\n")) << text.out;
  EXPECT_TRUE(contains(text.out, "needs a restart of refitd:\n  copy_threads\n")) << text.out;
  EXPECT_EQ(root.at("done"), true);
  EXPECT_EQ(root.at("file"), configuration_);
  EXPECT_EQ(root.at("changed"), json({"drain_timeout_ms"}));
  EXPECT_EQ(root.at("needs_restart"), json({"copy_threads"}));
}

TEST_F(RefitctlReload, BadFileIsToldWithItsLineAndTheOldOneHolds) {
  start_with("drain_timeout_ms = 1000\n");
  file("refitd.toml", "drain_timeout_ms = 1000\nno_such_key = 1\n");

  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"reload", "--wait"}, std::vector<std::string>{"reload"}}) {
    const Finished sut = refitctl(arguments);

    EXPECT_EQ(sut.status, 6) << sut.out << sut.err;
    EXPECT_EQ(sut.out, "");
    EXPECT_TRUE(contains(sut.err, configuration_ + ":2")) << sut.err;
    EXPECT_TRUE(contains(sut.err, "no_such_key")) << sut.err;
    EXPECT_TRUE(contains(sut.err, "--check-config")) << sut.err;
  }
  EXPECT_EQ(refitctl({"status"}).status, 0);
}

TEST_F(RefitctlReload, NothingChangedIsSaidSo) {
  start_with("drain_timeout_ms = 1000\n");

  const Finished sut = refitctl({"reload", "--wait"});

  EXPECT_EQ(sut.status, 0) << sut.err;
  EXPECT_TRUE(contains(sut.out, "nothing changed")) << sut.out;
}

TEST_F(RefitctlReload, StrangerMayNotReload) {
  if (::geteuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can run the tool as another user";
  start_with("drain_timeout_ms = 1000\n");
  ASSERT_EQ(::chmod(socket_path_.c_str(), 0666), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"reload", "--wait"}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, "uid 65534 may not reload")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "sudo refitctl reload")) << sut.err;
}

}  // namespace
}  // namespace refit::test
