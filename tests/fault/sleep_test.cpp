// An engine that gives its memory up and takes it again: what is refused meanwhile, what survives,
// and that the memory is really gone.
//
// Trainer and engine live in the test; what the daemon has mapped is read from outside, in /proc.

#include <signal.h>
#include <sys/stat.h>

#include <fstream>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class Sleep : public DaemonTest {
 protected:
  static ino_t inode_of(const Model& model) {
    struct stat status {};
    EXPECT_EQ(::fstat(model.memory()->fd(), &status), 0);
    return status.st_ino;
  }
  /// Lines of the daemon's /proc/PID/maps that are this memory.
  std::size_t mappings_of(ino_t inode) const {
    std::ifstream maps("/proc/" + std::to_string(daemon_->pid()) + "/maps");
    std::size_t count = 0;
    std::string range, mode, offset, device, line;
    ino_t found = 0;
    while (maps >> range >> mode >> offset >> device >> found && std::getline(maps, line)) {
      count += found == inode ? 1 : 0;
    }
    return count;
  }
  static Result<DigestReport> digest(Observer& observer) {
    return observer.digest({"flux", "transformer", DigestKind::raw}, soon());
  }
  /// The refit of everything, with the engine polling on this thread.
  Result<RefitReport> refit(Trainer& trainer, Engine& engine) {
    engine.bind_to_this_thread();
    auto report = trainer.refit(kWhole, soon());
    must(engine.poll(soon()));
    return report;
  }
  static ModuleStatus module_status(Observer& observer) {
    const DaemonStatus status = must(observer.status(soon()));
    EXPECT_EQ(status.modules.size(), 1U);
    return status.modules.empty() ? ModuleStatus{} : status.modules.front();
  }

  std::unique_ptr<Model> source_ = model_of(gapped_tensors(), 1);
  std::unique_ptr<Model> target_ = model_of(gapped_tensors(), 2);
};

// Goal: one whole nap. Method: after sleep() nobody but this test holds the memory, so that letting
// go of it frees it; whatever wants the engine is refused by name; other memory wakes it.
TEST_F(Sleep, GivesTheMemoryUpRefusesByNameAndWakesElsewhere) {
  start();
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  Observer observer = must(Observer::connect("observer", options(), soon()));
  ASSERT_EQ(must(refit(trainer, sut)).version, 1U);
  const ino_t inode = inode_of(*target_);
  ASSERT_GT(mappings_of(inode), 0U) << "the test does not see the daemon's mappings";

  must(sut.sleep(soon()));
  EXPECT_EQ(mappings_of(inode), 0U);
  const std::weak_ptr<SharedMemory> memory = target_->memory();
  target_.reset();
  EXPECT_TRUE(memory.expired()) << "the client library still holds the memory";

  const auto refused = trainer.refit(kWhole, soon());
  EXPECT_EQ(code_of(refused), Errc::engine_asleep);
  EXPECT_NE(text_of(refused).find("engine flux sleeps"), std::string::npos) << text_of(refused);
  EXPECT_EQ(code_of(digest(observer)), Errc::engine_asleep);
  const Digest nothing = *Digest::from_hex(std::string(64, '0'));
  EXPECT_EQ(
      code_of(observer.check({"flux", "transformer", DigestKind::raw, {{"a", nothing}}}, soon())),
      Errc::engine_asleep);
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.version("transformer"), 1U);
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  ModuleStatus seen = module_status(observer);
  EXPECT_TRUE(seen.asleep);
  EXPECT_EQ(seen.version, 1U);
  EXPECT_EQ(seen.state, ModuleState::committed);
  EXPECT_FALSE(must(sut.poll(soon()))) << "a sleeping engine may poll";
  must(sut.sleep(soon()));  // once more is no mistake

  const auto too_early = sut.wake(soon());
  EXPECT_EQ(code_of(too_early), Errc::engine_asleep);
  EXPECT_NE(text_of(too_early).find("flux/transformer was not registered again"), std::string::npos)
      << text_of(too_early);
  EXPECT_FALSE(sut.step_allowed());

  target_ = model_of(gapped_tensors(), 3);
  must(sut.register_module(target_->spec(), soon()));
  EXPECT_EQ(code_of(trainer.refit(kWhole, soon())), Errc::engine_asleep) << "it has not woken";
  EXPECT_FALSE(sut.step_allowed());
  must(sut.wake(soon()));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.version("transformer"), 1U);
  seen = module_status(observer);
  EXPECT_FALSE(seen.asleep);
  EXPECT_EQ(seen.version, 1U);
  ASSERT_EQ(must(refit(trainer, sut)).version, 2U);
  EXPECT_TRUE(target_->equals(*source_));
  must(sut.wake(soon()));  // nor is this
}

// Goal: naps leave nothing behind in the daemon.
TEST_F(Sleep, ManyNapsLeaveFdsAndMapsAsTheyWere) {
  start();
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  const auto nap = [&] {
    must(sut.sleep(soon()));
    target_ = model_of(gapped_tensors(), 3);
    must(sut.register_module(target_->spec(), soon()));
    must(sut.wake(soon()));
    ASSERT_TRUE(refit(trainer, sut));
    EXPECT_TRUE(target_->equals(*source_));
  };
  for (int i = 0; i < 5; ++i) nap();
  const std::size_t fds = count_fds(daemon_->pid());
  const std::size_t maps = count_maps(daemon_->pid());
  for (int i = 0; i < 20; ++i) nap();
  // The fds of a registration are closed off the loop.
  EXPECT_TRUE(eventually([&] { return count_fds(daemon_->pid()) <= fds; }));
  EXPECT_LE(count_maps(daemon_->pid()), maps);
}

// Goal: a refit that waits at the gate does not keep the engine awake.
TEST_F(Sleep, RefitThatWaitsForTheGateIsRefusedByName) {
  start();
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  const auto old_bytes = model_of(gapped_tensors(), 2);
  EXPECT_GE(sut.fd(), 0);
  must(sut.poll(soon()));
  BackgroundRefit refit(trainer, {kWhole}, soon());
  ASSERT_TRUE(eventually([&] {
    pollfd entry{sut.fd(), POLLIN, 0};
    return ::poll(&entry, 1, 0) > 0;
  })) << "the engine was never asked";
  must(sut.sleep(soon()));
  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_asleep) << text_of(refit.outcome());
  EXPECT_TRUE(target_->equals(*old_bytes));
  EXPECT_EQ(sut.version("transformer"), 0U);
}

// Goal: memory is never taken away from under a digest. Method: two observers ask all the time
// while the engine sleeps and wakes; each answer is whole or says why not.
TEST_F(Sleep, DigestsUnderWayEndOrAreRefused) {
  start();
  target_ = model_of(large_tensors(), 2);
  Engine sut = make_engine("flux", *target_);
  std::atomic<bool> stop{false};
  std::atomic<int> answered{0};
  std::atomic<int> refused{0};
  std::vector<std::thread> askers;
  for (int i = 0; i < 2; ++i) {
    askers.emplace_back([&, i] {
      Observer observer =
          must(Observer::connect("observer" + std::to_string(i), options(), soon()));
      while (!stop.load()) {
        const auto report = digest(observer);
        const bool expected = report || report.error().code == Errc::engine_asleep ||
                              report.error().code == Errc::engine_not_ready;
        EXPECT_TRUE(expected) << text_of(report);
        (report ? answered : refused) += 1;
      }
    });
  }
  for (int i = 0; i < 10; ++i) {
    const int before = answered.load();
    EXPECT_TRUE(eventually([&] { return answered.load() > before; }));
    must(sut.sleep(soon()));
    EXPECT_EQ(mappings_of(inode_of(*target_)), 0U);
    must(sut.register_module(target_->spec(), soon()));
    must(sut.wake(soon()));
  }
  stop.store(true);
  for (std::thread& asker : askers) asker.join();
  EXPECT_GT(refused.load(), 0) << "no digest ever met a sleeping engine";
}

// Goal: sleep waits for no write and breaks none. Method: the daemon stands still with bytes half
// written while the engine asks for sleep.
TEST_F(Sleep, WhileBytesAreWrittenIsRefused) {
  start_armed("writing.half=stop");
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  BackgroundRefit refit(trainer, {kWhole}, soon());
  ASSERT_TRUE(eventually([&] { return code_of(sut.poll(Deadline::in(20ms))) == Errc::deadline; }));
  ASSERT_TRUE(daemon_->wait_stopped(20'000));
  const auto refused = sut.sleep(soon());
  EXPECT_EQ(code_of(refused), Errc::busy);
  EXPECT_NE(text_of(refused).find("engine flux is being written"), std::string::npos)
      << text_of(refused);
  daemon_->send_signal(SIGCONT);
  ASSERT_TRUE(poll_until_event(sut, soon()));
  EXPECT_TRUE(refit.outcome()) << text_of(refit.outcome());
  must(sut.sleep(soon()));
  EXPECT_TRUE(target_->equals(*source_));
}

// Goal: a daemon that dies does not wake its engine. Method: the next daemon knows name, version
// and state of the module before it is registered again.
TEST_F(Sleep, OutlivesTheDaemon) {
  start();
  {
    Trainer trainer = make_trainer(*source_);
    Engine sut = make_engine("flux", *target_);
    ASSERT_EQ(must(refit(trainer, sut)).version, 1U);
    must(sut.sleep(soon()));
    daemon_->kill_now();
    EXPECT_EQ(code_of(sut.wake(Deadline::in(100ms))), Errc::daemon_gone);
    start();
    ASSERT_TRUE(eventually([&] {
      must(sut.poll(soon()));
      return sut.connected();
    }));
    EXPECT_FALSE(sut.step_allowed());

    Observer observer = must(Observer::connect("observer", options(), soon()));
    ModuleStatus seen = module_status(observer);
    EXPECT_TRUE(seen.asleep);
    EXPECT_EQ(seen.version, 1U);
    EXPECT_EQ(seen.state, ModuleState::committed);
    Trainer again = make_trainer(*source_);
    EXPECT_EQ(code_of(again.refit(kWhole, soon())), Errc::engine_asleep);
    EXPECT_EQ(code_of(sut.wake(soon())), Errc::engine_asleep);

    target_ = model_of(gapped_tensors(), 3);
    must(sut.register_module(target_->spec(), soon()));
    must(sut.wake(soon()));
    EXPECT_TRUE(sut.step_allowed());
    ASSERT_EQ(must(refit(again, sut)).version, 2U);
    EXPECT_TRUE(target_->equals(*source_));
  }
}

// Goal: sleep does not make broken weights whole, nor does waking with other memory.
TEST_F(Sleep, PoisonedModuleStaysPoisoned) {
  reconnect_ = false;
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  {
    Trainer trainer = make_trainer(*source_);
    BackgroundRefit refit(trainer, {kWhole}, soon());
    EXPECT_EQ(code_of(poll_until_event(sut, soon())), Errc::daemon_gone);
  }
  start();
  must(sut.reconnect(soon()));
  ASSERT_EQ(sut.state("transformer"), ModuleState::poisoned);
  must(sut.sleep(soon()));
  daemon_->kill_now();
  start();
  must(sut.reconnect(soon()));
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
  target_ = model_of(gapped_tensors(), 3);
  must(sut.register_module(target_->spec(), soon()));
  must(sut.wake(soon()));
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
  EXPECT_FALSE(sut.step_allowed());
  Trainer trainer = make_trainer(*source_);
  RefitTarget part = kWhole;
  part.selection = {"a"};
  part.allow_unmatched = true;
  EXPECT_EQ(code_of(trainer.refit(part, soon())), Errc::poisoned);
  ASSERT_TRUE(refit(trainer, sut));
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(sut.step_allowed());
}

}  // namespace
}  // namespace refit::test
