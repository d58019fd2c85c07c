// Who may use whose engine: rules of the configuration, real uids and groups, revocation,
// ambiguity.
//
// Needs root, to be several users; says so where it cannot run, which is no pass.

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>

#include "support/daemon_test.hpp"
#include "support/other_user.hpp"
#include "support/waiting_engine.hpp"

namespace refit::test {
namespace {

constexpr uid_t kStranger = 12345;
constexpr uid_t kOther = 12346;

class Permission : public DaemonTest {
 protected:
  void SetUp() override {
    if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can be several users";
  }
  void start_with(const std::string& rules) {
    write(rules);
    DaemonOptions how;
    how.arguments = {"--config", file()};
    start(how);
    ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
    ASSERT_EQ(::chmod(socket_.c_str(), 0666), 0);
  }
  void write(const std::string& rules) { std::ofstream(file()) << rules; }
  void reload() {
    Observer observer = must(Observer::connect("operator", options(), soon()));
    must(observer.reload(soon()));
  }
  [[nodiscard]] std::string file() const { return directory_.path() + "/refitd.toml"; }

  /// A trainer that refits when it is told to, and says what came of it.
  void refit_when_told(OtherUser::Talk& talk, std::uint64_t seed) {
    auto source = model_of(small_tensors(), seed);
    Trainer trainer = make_trainer(*source);
    talk.say("ready");
    for (;;) {
      talk.wait();
      const auto report = trainer.refit({"flux", "transformer"}, soon());
      talk.say(report ? "ok" : report.error().to_string());
    }
  }
  /// Lets the other user's trainer refit while `engine` answers its gate.
  static std::string refit(OtherUser& user, Engine& engine) {
    const WaitingEngine waiting(engine);
    user.go();
    return user.hear();
  }
  static void expect_has(const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
  }
};

// Goal: a rule lets another uid refit, and taking it away refuses the next refit of a session that
// was open before. Method: one trainer of another uid, the rule comes and goes by reloads.
TEST_F(Permission, RuleLetsAnotherUidRefitUntilItIsTakenAway) {
  start_with("");
  OtherUser sut(kStranger, {kStranger}, [&](OtherUser::Talk& talk) { refit_when_told(talk, 31); });
  ASSERT_EQ(sut.hear(), "ready");
  auto target = model_of(small_tensors(), 30);
  auto wanted = model_of(small_tensors(), 31);
  Engine engine = make_engine("flux", *target);

  const std::string refused = refit(sut, engine);
  EXPECT_EQ(refused.rfind("permission: ", 0), 0U) << refused;
  expect_has(refused, std::to_string(kStranger));
  expect_has(refused, "[[engine]]");
  EXPECT_FALSE(target->equals(*wanted));

  write("[[engine]]\nname = \"fl*\"\nowner = \"root\"\nallow_uids = [12345]\n");
  reload();
  EXPECT_EQ(refit(sut, engine), "ok");
  EXPECT_TRUE(target->equals(*wanted));

  write("[[engine]]\nname = \"fl*\"\nowner = 1\nallow_uids = [12345]\n");
  reload();
  EXPECT_EQ(refit(sut, engine).rfind("permission: ", 0), 0U);
  EXPECT_EQ(engine.version("transformer"), 1U);
}

// Goal: groups are the process's own, primary or supplementary, and no others.
TEST_F(Permission, GroupsAreThoseOfTheProcess) {
  start_with("[[engine]]\nname = \"flux\"\nallow_gids = [777]\n");
  auto target = model_of(small_tensors(), 30);
  Engine engine = make_engine("flux", *target);
  const auto answer = [&](const std::vector<gid_t>& groups) {
    OtherUser user(kStranger, groups, [&](OtherUser::Talk& talk) { refit_when_told(talk, 31); });
    EXPECT_EQ(user.hear(), "ready");
    return refit(user, engine);
  };
  EXPECT_EQ(answer({777}), "ok");
  EXPECT_EQ(answer({5, 6, 777}), "ok");
  EXPECT_EQ(answer({5, 6, 778}).rfind("permission: ", 0), 0U);
  std::vector<gid_t> many;
  for (gid_t gid = 1000; gid < 1200; ++gid) many.push_back(gid);
  many.push_back(777);
  EXPECT_EQ(answer(many), "ok") << "more groups than fit the first buffer";
}

// Goal: root is refused like anybody else, for refit, check, digest and tensors.
TEST_F(Permission, RootIsNoException) {
  start_with("[[engine]]\nname = \"flux\"\nallow_uids = [12346]\n");
  OtherUser owner(kStranger, {kStranger}, [&](OtherUser::Talk& talk) {
    auto target = model_of(small_tensors(), 30);
    Engine engine = make_engine("flux", *target);
    talk.say("ready");
    talk.wait();
  });
  ASSERT_EQ(owner.hear(), "ready");
  auto source = model_of(small_tensors(), 31);
  Trainer trainer = make_trainer(*source);
  Observer observer = must(Observer::connect("root", options(), soon()));
  EXPECT_EQ(code_of(trainer.refit({"flux", "transformer"}, soon())), Errc::permission);
  EXPECT_EQ(code_of(observer.tensors("flux", "transformer", soon())), Errc::permission);
  EXPECT_EQ(code_of(observer.digest({"flux", "transformer"}, soon())), Errc::permission);
  CheckRequest check{"flux", "transformer"};
  check.expected = {{"scale", Digest{}}};
  EXPECT_EQ(code_of(observer.check(check, soon())), Errc::permission);
}

// Goal: of two engines of one name the own uid's is taken; two of others' that both allow it are
// ambiguous, and both are named.
TEST_F(Permission, OwnEngineGoesFirstAndTwoOfOthersAreAmbiguous) {
  start_with("[[engine]]\nname = \"flux\"\nallow_uids = [0]\n");
  const auto hold = [&](OtherUser::Talk& talk) {
    auto target = model_of(small_tensors(), 30);
    Engine engine = make_engine("flux", *target);
    talk.say("ready");
    talk.wait();
  };
  OtherUser first(kStranger, {kStranger}, hold);
  ASSERT_EQ(first.hear(), "ready");
  Observer sut = must(Observer::connect("root", options(), soon()));
  EXPECT_TRUE(sut.tensors("flux", "transformer", soon())) << "one of another uid allows it";

  OtherUser second(kOther, {kOther}, hold);
  ASSERT_EQ(second.hear(), "ready");
  const auto ambiguous = sut.tensors("flux", "transformer", soon());
  ASSERT_FALSE(ambiguous);
  EXPECT_EQ(ambiguous.error().code, Errc::bad_argument);
  expect_has(ambiguous.error().message, "uid 12345 (session ");
  expect_has(ambiguous.error().message, "uid 12346 (session ");

  auto target = model_of(large_tensors(), 30);
  Engine own = make_engine("flux", *target);
  const auto tensors = must(sut.tensors("flux", "transformer", soon()));
  EXPECT_EQ(tensors.size(), large_tensors().size()) << "the own uid's engine goes first";
}

// Goal: status tells another uid names and states, root everything.
TEST_F(Permission, StatusTellsAnotherUidOnlyNamesAndStates) {
  start_with("");
  auto target = model_of(small_tensors(), 30);
  Engine engine = make_engine("flux", *target);
  OtherUser sut(kStranger, {kStranger}, [&](OtherUser::Talk& talk) {
    Observer observer = must(Observer::connect("stranger", options(), soon()));
    const DaemonStatus status = must(observer.status(soon()));
    for (const ModuleStatus& module : status.modules) {
      talk.say(module.engine + "/" + module.module + " " +
               std::string(module_state_name(module.state)) + " uid " + std::to_string(module.uid) +
               " restricted " + std::to_string(module.restricted) + " tensors " +
               std::to_string(module.tensors) + " bytes " + std::to_string(module.bytes));
    }
    for (const SessionStatus& session : status.sessions) {
      if (session.role == Role::engine)
        talk.say(session.name + " restricted " + std::to_string(session.restricted) + " pid " +
                 std::to_string(session.pid) + " modules " + std::to_string(session.modules));
    }
  });
  EXPECT_EQ(sut.hear(), "flux/transformer initial uid 0 restricted 1 tensors 0 bytes 0");
  EXPECT_EQ(sut.hear(), "flux restricted 1 pid 0 modules 0");

  Observer root = must(Observer::connect("root", options(), soon()));
  const DaemonStatus all = must(root.status(soon()));
  ASSERT_EQ(all.modules.size(), 1U);
  EXPECT_FALSE(all.modules.front().restricted);
  EXPECT_EQ(all.modules.front().tensors, small_tensors().size());
}

}  // namespace
}  // namespace refit::test
