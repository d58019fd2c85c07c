// `refitctl doctor` on this host, with a daemon, without one, and as a user who is not let in.
//
// One thread, and a daemon. What the host's kernel lacks is not this test's matter: it looks at the
// findings that the test itself decides.
#include <sys/stat.h>

#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

class RefitctlDoctor : public RefitctlSystem {
 protected:
  json examine(int* status = nullptr, const RunOptions& options = {}) {
    const Finished finished = refitctl({"doctor", "--json"}, options);
    if (status != nullptr) *status = finished.status;
    json root = parsed(finished);
    // The exit status says what the verdicts say.
    bool failed = false;
    for (const json& check : root.at("checks")) failed = failed || check.at("verdict") == "fail";
    EXPECT_EQ(finished.status, failed ? 1 : 0) << root;
    EXPECT_EQ(root.at("ok"), !failed);
    return root;
  }
  static json check(const json& root, const std::string& id) {
    for (const json& one : root.at("checks")) {
      if (one.at("id") == id) return one;
    }
    ADD_FAILURE() << "no check " << id;
    return {{"verdict", ""}, {"found", ""}, {"advice", ""}};
  }
};

TEST_F(RefitctlDoctor, LiveDaemonIsDescribed) {
  daemon_->start();

  const Finished text = refitctl({"doctor"});
  const json sut = examine();

  EXPECT_EQ(check(sut, "daemon").at("verdict"), "ok");
  EXPECT_TRUE(contains(check(sut, "daemon").at("found"), std::to_string(daemon_->pid())));
  EXPECT_EQ(check(sut, "socket").at("verdict"), "ok");
  EXPECT_TRUE(contains(check(sut, "socket").at("found"), "mode 0660"));
  EXPECT_EQ(check(sut, "release").at("verdict"), "ok");
  EXPECT_TRUE(contains(check(sut, "release").at("found"), "as the daemon"));
  EXPECT_EQ(check(sut, "cuda").at("verdict"), "ok") << "a host without a GPU is nothing to mend";
  EXPECT_NE(check(sut, "cuda").at("found"), "");
  EXPECT_TRUE(contains(text.out, "FOUND")) << text.out;
  EXPECT_TRUE(contains(text.out, " failed\n")) << text.out;
}

TEST_F(RefitctlDoctor, HostWithoutADaemonIsExaminedAllTheSame) {
  const json sut = examine();

  EXPECT_EQ(check(sut, "daemon").at("verdict"), "warn");
  EXPECT_EQ(check(sut, "socket").at("verdict"), "warn");
  EXPECT_TRUE(contains(check(sut, "socket").at("advice"), "refitd --socket " + socket_path_));
  // What the tests of the daemon itself need, this host has.
  for (const char* id : {"memfd_seals", "future_write_seal", "populate_write", "pidfd_open"})
    EXPECT_EQ(check(sut, id).at("verdict"), "ok") << id;
}

TEST_F(RefitctlDoctor, SocketOfADeadDaemonIsToldFromALiveOne) {
  daemon_->start();
  daemon_->stop(SIGKILL);

  const json sut = examine();

  EXPECT_EQ(check(sut, "daemon").at("verdict"), "warn");
  EXPECT_TRUE(contains(check(sut, "daemon").at("found"), "nobody listens"));
}

TEST_F(RefitctlDoctor, UserWhoIsNotLetInLearnsWhichGroupToJoin) {
  if (::geteuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can run the tool as another user";
  daemon_->start();
  RunOptions options;
  options.as_nobody = true;

  int status = 0;
  const json sut = examine(&status, options);

  EXPECT_EQ(status, 1);
  EXPECT_EQ(check(sut, "socket").at("verdict"), "fail");
  EXPECT_TRUE(contains(check(sut, "socket").at("advice"), "usermod -aG"));
}

TEST_F(RefitctlDoctor, SocketThatClientsWouldChooseIsNamed) {
  daemon_->start();
  RunOptions options;
  options.environment["XDG_RUNTIME_DIR"] = folder_;
  std::filesystem::create_directory(folder_ + "/refit");
  std::filesystem::create_symlink(socket_path_, folder_ + "/refit/refitd.sock");

  const Finished finished = run(REFITCTL_PATH, {"doctor", "--json"}, options);
  const json sut = parsed(finished);

  EXPECT_TRUE(contains(check(sut, "socket_choice").at("found"),
                       folder_ + "/refit/refitd.sock (this user's own)"))
      << sut;
}

}  // namespace
}  // namespace refit::test
