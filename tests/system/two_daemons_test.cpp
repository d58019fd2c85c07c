// A system daemon and a user's daemon on one host: each knows its own clients only, and who asks
// the wrong one is told where to look.
//
// The well-known places are moved into a private directory by the environment, as the client
// library allows. One thread.

#include <csignal>
#include <cstdlib>
#include <filesystem>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

/// Sets variables of the environment and puts back what was there.
class ScopedEnvironment {
 public:
  void set(const std::string& name, const std::string& value) {
    const char* before = std::getenv(name.c_str());
    before_.emplace_back(name,
                         before == nullptr ? std::nullopt : std::optional<std::string>(before));
    ::setenv(name.c_str(), value.c_str(), 1);
  }
  ~ScopedEnvironment() {
    for (const auto& [name, value] : before_) {
      if (value) {
        ::setenv(name.c_str(), value->c_str(), 1);
      } else {
        ::unsetenv(name.c_str());
      }
    }
  }

 private:
  std::vector<std::pair<std::string, std::optional<std::string>>> before_;
};

class TwoDaemons : public DaemonTest {
 protected:
  TwoDaemons() {
    std::filesystem::create_directories(directory_.path() + "/run/refit");
    environment_.set("REFIT_SOCKET", "");
    environment_.set("XDG_RUNTIME_DIR", directory_.path() + "/run");
    environment_.set("REFIT_SYSTEM_SOCKET", system_);
  }

  Engine engine_at(const std::string& socket, const std::string& name, Model& model) {
    Engine engine = must(Engine::connect(name, {socket}, soon()));
    must(engine.register_module(model.spec(), soon()));
    engine.bind_to_this_thread();
    return engine;
  }
  Trainer trainer_at(const std::string& socket) {
    Trainer trainer = must(Trainer::connect("trainer", {socket}, soon()));
    must(trainer.register_module(source_->spec(), soon()));
    return trainer;
  }
  static std::vector<std::string> engines_at(const std::string& socket) {
    Observer observer = must(Observer::connect("observer", {socket}, soon()));
    std::vector<std::string> names;
    for (const SessionStatus& session : must(observer.status(soon())).sessions) {
      if (session.role == Role::engine) names.push_back(session.name);
    }
    return names;
  }

  ScopedEnvironment environment_;
  const std::string user_ = directory_.path() + "/run/refit/refitd.sock";
  const std::string system_ = directory_.path() + "/system.sock";
  std::unique_ptr<Model> source_ = model_of(small_tensors(), 2);
  std::unique_ptr<Model> target_ = model_of(small_tensors(), 1);
  std::unique_ptr<Model> other_target_ = model_of(small_tensors(), 1);
};

TEST_F(TwoDaemons, DoNotMeet) {
  const DaemonProcess system_daemon(system_);
  const DaemonProcess user_daemon(user_);
  // One name at both: nobody takes it from anybody.
  Engine at_user = engine_at(user_, "flux", *target_);
  Engine at_system = engine_at(system_, "flux", *other_target_);
  Engine only_user = engine_at(user_, "wan", *source_);
  EXPECT_EQ(engines_at(user_), (std::vector<std::string>{"flux", "wan"}));
  EXPECT_EQ(engines_at(system_), (std::vector<std::string>{"flux"}));
  auto weights = model_of(small_tensors(), 3);
  Trainer trainer = must(Trainer::connect("trainer", {user_}, soon()));
  must(trainer.register_module(weights->spec(), soon()));
  ASSERT_TRUE(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(target_->equals(*weights));
  EXPECT_EQ(at_user.version("transformer"), 1U);
  EXPECT_EQ(at_system.version("transformer"), 0U);
  EXPECT_FALSE(other_target_->equals(*weights));
}

TEST_F(TwoDaemons, WhoAsksTheWrongOneIsToldWhereToLook) {
  const DaemonProcess system_daemon(system_);
  const DaemonProcess user_daemon(user_);
  Engine at_user = engine_at(user_, "flux", *target_);
  Engine at_system = engine_at(system_, "wan", *other_target_);
  Trainer sut_system = trainer_at(system_);
  const auto refit = sut_system.refit({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(refit), Errc::no_such_engine);
  EXPECT_NE(text_of(refit).find("engine flux is registered with the daemon at " + user_ +
                                "; set REFIT_SOCKET or ConnectOptions::socket_path to it"),
            std::string::npos)
      << text_of(refit);
  Trainer sut_user = trainer_at(user_);
  for (const auto& text : {text_of(sut_user.check({"wan", "transformer"}, soon())),
                           text_of(sut_user.digest({"wan", "transformer"}, soon()))}) {
    EXPECT_NE(text.find("engine wan is registered with the daemon at " + system_),
              std::string::npos)
        << text;
  }
  Observer observer = must(Observer::connect("observer", {system_}, soon()));
  EXPECT_NE(text_of(observer.digest({"flux", "transformer"}, soon())).find(user_),
            std::string::npos);
  // It is nowhere: nothing is added.
  const auto nowhere = sut_user.digest({"nobody", "transformer"}, soon());
  EXPECT_EQ(code_of(nowhere), Errc::no_such_engine);
  EXPECT_TRUE(nowhere.error().details.empty()) << text_of(nowhere);
}

TEST_F(TwoDaemons, OneThatIsNotThereOrDoesNotAnswerCostsOnlyTheHint) {
  const DaemonProcess user_daemon(user_);
  Trainer sut = trainer_at(user_);
  auto missing = sut.digest({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(missing), Errc::no_such_engine);
  EXPECT_TRUE(missing.error().details.empty()) << text_of(missing);

  DaemonProcess stopped(system_);
  stopped.send_signal(SIGSTOP);
  ASSERT_TRUE(stopped.wait_stopped(20'000));
  missing = sut.digest({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(missing), Errc::no_such_engine);
  EXPECT_TRUE(missing.error().details.empty()) << text_of(missing);
}

TEST_F(TwoDaemons, DefaultIsTheUsersIfItIsThereAndElseTheSystems) {
  EXPECT_EQ(default_socket_path(), system_);
  const DaemonProcess user_daemon(user_);
  EXPECT_EQ(default_socket_path(), user_);
  environment_.set("REFIT_SOCKET", "/elsewhere.sock");
  EXPECT_EQ(default_socket_path(), "/elsewhere.sock");
}

}  // namespace
}  // namespace refit::test
