// The fixture of the conformance suite: what a refit does, whatever memory the tensors are in.
//
// One suite, instantiated for each memory kind of the program (memory_kinds.hpp). Each test runs a
// real daemon; trainers and engines live in the test's process, an engine answers its gate on a
// thread of its own unless the test is about sharing one. Device memory is written late: a test
// that asks for bytes before a refit that waits for the module's fence settles it first.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>

#include <csignal>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "conformance/memory_kinds.hpp"
#include "refit/engine.hpp"
#include "refit/observer.hpp"
#include "refit/trainer.hpp"
#include "support/daemon_process.hpp"
#include "support/daemon_test.hpp"
#include "support/eventually.hpp"
#include "support/model.hpp"
#include "support/waiting_engine.hpp"

namespace refit::test {

class Refit : public ::testing::TestWithParam<MemoryKind> {
 public:
  /// A model in memory of the kind that the test is instantiated for.
  class Model : public test::Model {
   public:
    Model(const std::string& module, const std::vector<TensorShape>& tensors, int device = 0)
        : test::Model(module, tensors, make_storage(GetParam(), sizes_of(tensors), device)) {}
  };

 protected:
  explicit Refit(const DaemonOptions& how = {}) : daemon_(socket_, how) {}
  /// Clients are gone by now. The daemon says by its exit code whether it leaked.
  ~Refit() override {
    daemon_.send_signal(SIGTERM);
    EXPECT_EQ(daemon_.wait_end(20'000), 0);
    end_of_test();
  }

  static Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }
  [[nodiscard]] ConnectOptions options() const { return {socket_, Waiting::adaptive}; }

  Trainer connect_trainer(const std::string& name = "trainer") {
    return must(Trainer::connect(name, options(), soon()));
  }
  Trainer make_trainer(test::Model& model, const std::string& name = "trainer") {
    Trainer trainer = connect_trainer(name);
    must(trainer.register_module(model.spec(), soon()));
    return trainer;
  }
  Engine make_engine(const std::string& name, test::Model& model) {
    model.settle();
    Engine engine = must(Engine::connect(name, options(), soon()));
    must(engine.register_module(model.spec(), soon()));
    return engine;
  }
  Observer make_observer() { return must(Observer::connect("observer", options(), soon())); }

  /// Drains the doorbell that the reply to a registration may have rung. The daemon has one loop:
  /// once it has let an observer in, that ring is over.
  void quiet(Engine& engine) {
    make_observer();
    EXPECT_GE(engine.fd(), 0);
    EXPECT_FALSE(must(engine.poll(soon())));
  }

  /// SHA-256 of every tensor's live bytes, read through the ring.
  std::map<std::string, std::string> digests(const std::string& engine, const std::string& module) {
    Observer observer = make_observer();
    const DigestReport report = must(observer.digest({engine, module, DigestKind::raw}, soon()));
    std::map<std::string, std::string> all;
    for (const auto& [name, digest] : report.tensors) all[name] = digest.to_hex();
    return all;
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  DaemonProcess daemon_;
};

/// True once the daemon has asked this engine to hold still. Takes the engine's fd(), which must be
/// quiet before the refit is sent: see Refit::quiet().
inline bool asked(Engine& engine) {
  return eventually([&] {
    pollfd entry{engine.fd(), POLLIN, 0};
    return ::poll(&entry, 1, 0) > 0;
  });
}

/// The details of an error hold exactly one line with all of `parts`.
template <typename T>
bool one_detail_has(const Result<T>& result, const std::vector<std::string>& parts) {
  if (result) return false;
  int lines = 0;
  for (const std::string& line : result.error().details) {
    bool all = true;
    for (const std::string& part : parts) all = all && line.find(part) != std::string::npos;
    lines += all ? 1 : 0;
  }
  return lines == 1;
}

}  // namespace refit::test
