// Every call that the daemon makes to the driver fails once, in each of the ways of the fake one:
// refused, done but reported as failed, or reported as failed by a later call.
//
// Method: a trainer and an engine of the test's process register, refit, ask for digests, and go on
// by the same transaction. A life without a fault tells which calls there are; then each of them
// fails in a life of its own. The target's bytes are read by the test itself. Two codes: one of a
// call, and one after which the device answers nothing any more.
//
// By default each call fails in a third of the ways, another third for the next call; with
// `ctest -C slow -L slow` in all of them.

#include <gtest/gtest.h>

#include <csignal>
#include <cstdlib>
#include <map>

#include "conformance/memory_kinds.hpp"
#include "refit/engine.hpp"
#include "refit/trainer.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/daemon_process.hpp"
#include "support/daemon_test.hpp"
#include "support/effort.hpp"
#include "support/shapes.hpp"

namespace refit::test {
namespace {

constexpr int kOutOfMemory = 2;
constexpr int kLaunchFailed = 719;  // sticky

struct Fault {
  const char* name;
  int code;
  const char* kind;
  std::uint64_t turn;  ///< which of the calls it begins with where it does not take them all
};

class CudaFaults : public ::testing::TestWithParam<std::tuple<MemoryKind, Fault>> {
 protected:
  static Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }
  static MemoryKind kind() { return std::get<0>(GetParam()); }
  static const Fault& fault() { return std::get<1>(GetParam()); }
  static Model model(std::uint64_t seed) {
    Model made("transformer", gapped_tensors(),
               make_storage(kind(), Model::sizes_of(gapped_tensors())));
    made.fill(seed);
    made.settle();
    return made;
  }
  void SetUp() override { REFIT_FAKE_ONLY("injected faults"); }
  ~CudaFaults() override { end_of_test(); }

  /// One life with the k-th call of a function failing; none fails of the empty one. Returns the
  /// calls of the first daemon by function.
  std::map<std::string, std::uint64_t> live(const std::string& function, std::uint64_t k);
  void expect_named(const Error& error, const std::string& where) {
    told_ = true;
    const std::string text = error.to_string();
    EXPECT_NE(text.find("cu"), std::string::npos) << where << ": no call in: " << text;
    EXPECT_NE(text.find(std::to_string(fault().code)), std::string::npos)
        << where << ": no code in: " << text;
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  ConnectOptions options_{socket_, Waiting::adaptive, /*reconnect=*/false};
  std::unique_ptr<DaemonProcess> daemon_;
  Model old_ = model(2);
  Model source_ = model(1);
  bool told_ = false;  ///< the fault of this life was told to somebody
  int struck_ = 0;
  int poisoned_ = 0;
  int lost_ = 0;
};

std::map<std::string, std::uint64_t> CudaFaults::live(const std::string& function,
                                                      std::uint64_t k) {
  const std::string where = function + ", call " + std::to_string(k);
  told_ = false;
  Model target = model(2);
  DaemonOptions how;
  how.environment = {{"FAKECUDA_ROLE", "daemon"},
                     {"FAKECUDA_ON_LEAK", "ignore"}};  // what could not be given back
  how.arguments = {"--proof-threads", "0"};            // whose calls come when they like
  if (!function.empty()) {
    how.environment["FAKECUDA_FAULT"] = function + "#" + std::to_string(k) + "=" +
                                        std::to_string(fault().code) + ":" + fault().kind;
  }
  daemon_.reset();  // before the next one takes its socket
  daemon_ = std::make_unique<DaemonProcess>(socket_, how);
  const pid_t pid = daemon_->pid();
  Engine engine = must(Engine::connect("flux", options_, soon()));
  const TransactionId id = TransactionId::random();
  {
    Trainer trainer = must(Trainer::connect("trainer", options_, soon()));
    const auto source_taken = trainer.register_module(source_.spec(), soon());
    const auto target_taken = engine.register_module(target.spec(), soon());
    for (const auto* taken : {&source_taken, &target_taken}) {
      if (*taken || taken->error().code == Errc::daemon_gone) continue;
      expect_named(taken->error(), where);
    }
    engine.bind_to_this_thread();
    if (source_taken && target_taken) {
      const auto before = trainer.digest({"flux", "transformer", DigestKind::raw}, soon());
      if (!before && before.error().code != Errc::daemon_gone) expect_named(before.error(), where);
      RefitOptions with;
      with.transaction = id;
      const auto report = trainer.refit({"flux", "transformer"}, soon(), with);
      if (report) {
        EXPECT_TRUE(target.equals(source_)) << where;
      } else if (engine.state("transformer") == ModuleState::poisoned) {
        ++poisoned_;
        EXPECT_TRUE(function != "cuStreamWaitEvent" || std::string(fault().kind) == "later")
            << where << ": before the only copy";
        EXPECT_FALSE(engine.step_allowed()) << where;
        expect_named(report.error(), where);
      } else {
        EXPECT_TRUE(target.equals(old_)) << where << ": " << report.error().to_string();
        if (report.error().code != Errc::daemon_gone) expect_named(report.error(), where);
      }
      const auto after = trainer.digest({"flux", "transformer", DigestKind::raw}, soon());
      if (!after && after.error().code != Errc::daemon_gone) expect_named(after.error(), where);
    }
    if (!target_taken) {
      // The engine has to hold it to be asked for it by the next daemon.
      const auto again = engine.register_module(target.spec(), soon());
      if (!again && again.error().code != Errc::daemon_gone) expect_named(again.error(), where);
    }
  }
  std::map<std::string, std::uint64_t> calls;
  const auto page = fakecuda::ProcessReport::open(std::getenv("FAKECUDA_DIR"), pid);
  if (page) {
    for (const auto& entry : (*page)->calls) {
      if (entry.count.load() != 0) calls[entry.name] = entry.count.load();
    }
  }
  const bool struck = page && (*page)->tally(fakecuda::Tally::faults) != 0;
  if (struck) ++struck_;

  // The same daemon, if it still can; else the next one.
  bool whole = false;
  if (struck && fault().code == kOutOfMemory && std::string(fault().kind) != "later") {
    Result<Trainer> trainer = Trainer::connect("trainer", options_, soon());
    if (trainer) {
      RefitOptions with;
      with.transaction = id;
      whole = engine.register_module(target.spec(), soon()) &&
              trainer->register_module(source_.spec(), soon()) &&
              trainer->refit({"flux", "transformer"}, soon(), with);
    }
  } else if (struck && fault().code == kLaunchFailed) {
    // Nothing but another process helps, and this one is to say so by its exit code: unless the
    // failure was nobody's to see, as of a call that gives something back.
    if (told_) {
      const auto status = daemon_->wait_end(20'000);
      EXPECT_TRUE(status) << where << ": the daemon goes on with a device that is lost";
      EXPECT_EQ(status && WIFEXITED(*status) ? WEXITSTATUS(*status) : -1, 10) << where;
      lost_ += status ? 1 : 0;
    }
  }
  if (!whole) {
    if (daemon_->pid() > 0) daemon_->send_signal(SIGTERM);
    if (daemon_->pid() > 0) daemon_->wait_end(20'000);
    daemon_.reset();  // before the next one takes its socket
    daemon_ = std::make_unique<DaemonProcess>(socket_);
    Engine next = must(Engine::connect("another", options_, soon()));
    auto reconnected = engine.reconnect(soon());
    EXPECT_TRUE(reconnected) << where << ": " << text_of(reconnected);
    if (engine.state("transformer") == ModuleState::none)
      must(engine.register_module(target.spec(), soon()));
    Trainer trainer = must(Trainer::connect("trainer", options_, soon()));
    must(trainer.register_module(source_.spec(), soon()));
    RefitOptions with;
    with.transaction = id;
    const auto report = trainer.refit({"flux", "transformer"}, soon(), with);
    EXPECT_TRUE(report) << where << ": " << text_of(report);
  }
  must(engine.poll(soon()));
  EXPECT_TRUE(engine.step_allowed()) << where;
  EXPECT_TRUE(target.equals(source_)) << where;
  return calls;
}

TEST_P(CudaFaults, LeaveTheModuleOldNewOrPoisonedAndTheNextRefitMakesItWhole) {
  const bool all = std::getenv("REFIT_TEST_ALL_FAULTS") != nullptr;
  const std::uint64_t one_in = all ? 1 : kSanitized ? 9 : 3;
  std::uint64_t turn = fault().turn;
  for (const auto& [function, count] : live("", 0)) {
    // Which functions there are is another question than whether they succeed.
    if (function == "cuGetProcAddress") continue;
    for (std::uint64_t k = 1; k <= count; ++k) {
      if (turn++ % one_in == 0) live(function, k);
    }
  }
  // A lot must have been asked of the driver, and some of it in the middle of writing.
  EXPECT_GT(struck_, 120 / static_cast<int>(one_in));
  EXPECT_TRUE(!all || poisoned_ > 0);
  std::printf("%d calls failed; %d left the module poisoned, %d ended the daemon\n", struck_,
              poisoned_, lost_);
  daemon_->send_signal(SIGTERM);
  EXPECT_TRUE(daemon_->wait_end(20'000));
}

INSTANTIATE_TEST_SUITE_P(
    Memory, CudaFaults,
    ::testing::Combine(::testing::ValuesIn(memory_kinds()),
                       ::testing::Values(Fault{"Refused", kOutOfMemory, "refuse", 0},
                                         Fault{"Done", kOutOfMemory, "after", 1},
                                         Fault{"Later", kOutOfMemory, "later", 2},
                                         Fault{"StickyRefused", kLaunchFailed, "refuse", 1},
                                         Fault{"StickyDone", kLaunchFailed, "after", 2},
                                         Fault{"StickyLater", kLaunchFailed, "later", 0})),
    [](const auto& test) {
      return name_of(std::get<0>(test.param)) + std::get<1>(test.param).name;
    });

}  // namespace
}  // namespace refit::test
