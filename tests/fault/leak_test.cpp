// What a daemon holds does not grow: over refits, over sessions that come and go, over clients that
// are killed. Counted from outside, in /proc.

#include <filesystem>

#include "support/client_process.hpp"
#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class Leak : public DaemonTest {
 protected:
  struct Held {
    std::size_t fds = 0;
    std::size_t maps = 0;
  };
  Held held() const { return {count_fds(daemon_->pid()), count_maps(daemon_->pid())}; }
  /// What the daemon's fds are, for the message of a failure.
  std::string fd_list() const {
    std::string list;
    const std::string folder = "/proc/" + std::to_string(daemon_->pid()) + "/fd";
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      std::error_code gone;
      list += entry.path().filename().string() + " -> " +
              std::filesystem::read_symlink(entry.path(), gone).string() + "\n";
    }
    return list;
  }
  /// Sessions end a moment after their clients: waits for what was there before.
  void expect_back_to(const Held& before) {
    eventually([&] { return held().fds <= before.fds && held().maps <= before.maps; }, 5s);
    const Held now = held();
    EXPECT_LE(now.fds, before.fds) << fd_list();
    EXPECT_LE(now.maps, before.maps);
  }
};

TEST_F(Leak, ThousandRefitsLeaveFdsAndMapsAsTheyWere) {
  start();
  auto source = model_of(small_tensors(), 1);
  auto target = model_of(small_tensors(), 2);
  Trainer trainer = make_trainer(*source);
  Engine engine = make_engine("flux", *target);
  engine.bind_to_this_thread();
  const auto refit = [&] {
    const auto report = trainer.refit({"flux", "transformer"}, soon());
    ASSERT_TRUE(report) << text_of(report);
    must(engine.poll(soon()));
  };
  for (int i = 0; i < 20; ++i) refit();
  const Held before = held();
  const std::size_t own_fds = count_fds(::getpid());
  for (int i = 0; i < 1'000; ++i) refit();
  expect_back_to(before);
  EXPECT_EQ(count_fds(::getpid()), own_fds);
  EXPECT_EQ(engine.version("transformer"), 1'020U);
}

TEST_F(Leak, TwoHundredSessionsThatCameAndWentLeaveNothing) {
  start();
  auto source = model_of(small_tensors(), 1);
  auto target = model_of(small_tensors(), 2);
  const auto come_and_go = [&](int round) {
    const std::string name = "flux" + std::to_string(round);
    Trainer trainer = make_trainer(*source);
    Engine engine = make_engine(name, *target);
    engine.bind_to_this_thread();
    const auto report = trainer.refit({name, "transformer"}, soon());
    ASSERT_TRUE(report) << text_of(report);
  };
  // An answer proves that the daemon is all there; the observer stays until the end.
  Observer observer = must(Observer::connect("observer", options(), soon()));
  must(observer.status(soon()));
  const Held empty = held();
  for (int i = 0; i < 10; ++i) come_and_go(i);
  // What the first sessions leave for good (buffers that are reused) is allowed; more is not.
  eventually([&] { return held().fds <= empty.fds; }, 5s);
  const Held before = held();
  EXPECT_LE(before.fds, empty.fds) << fd_list();
  const std::size_t own_fds = count_fds(::getpid());
  for (int i = 10; i < 110; ++i) come_and_go(i);  // two sessions each
  expect_back_to(before);
  EXPECT_EQ(count_fds(::getpid()), own_fds);
}

TEST_F(Leak, ClientsKilledInEveryStateLeaveNothing) {
  start();
  auto source = model_of(small_tensors(), 1);
  Trainer trainer = make_trainer(*source);
  const auto round = [&] {
    ClientProcess idle;
    ASSERT_EQ(idle.ask("trainer t " + socket_), "ok");
    ClientProcess engine;
    ASSERT_EQ(engine.ask("engine flux " + socket_), "ok");
    ASSERT_EQ(engine.ask("module transformer 7"), "ok");
    BackgroundRefit refit(trainer, {{"flux", "transformer"}}, soon());
    std::this_thread::sleep_for(2ms);
    engine.kill_now();
    // Killed before or after its refit found it, as chance has it: both are states to leave.
    const Errc code = code_of(refit.outcome());
    EXPECT_TRUE(code == Errc::engine_gone || code == Errc::no_such_engine)
        << text_of(refit.outcome());
  };
  round();
  std::this_thread::sleep_for(50ms);
  const Held before = held();
  for (int i = 0; i < 20; ++i) round();
  expect_back_to(before);
}

}  // namespace
}  // namespace refit::test
