#include "conformance/cuda_scenario.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>

#include "refit/engine.hpp"
#include "refit/trainer.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/shapes.hpp"

namespace refit::test {
namespace {

Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }

std::string sha256_hex(const std::byte* data, std::size_t bytes) {
  Digest digest;
  digest.length = 32;
  unsigned int length = 0;
  EVP_Digest(data, bytes, digest.bytes.data(), &length, EVP_sha256(), nullptr);
  return digest.to_hex();
}

/// As small_tensors() and the gapped ones, with one that no batch of small pieces covers.
std::vector<TensorShape> tensors() {
  std::vector<TensorShape> all = small_tensors();
  for (const TensorShape& one : gapped_tensors()) all.push_back(one);
  all.push_back({"wide", DType::bfloat16, {96, 1024}});
  return all;
}

/// Scribbles over what the gate protects and answers at once: as an engine whose last step is
/// still queued.
class BusyEngine {
 public:
  explicit BusyEngine(Engine& engine) : engine_(engine) {
    must(engine_.serve({[this](Deadline) {
                          if (Model* const model = scribbled_.load())
                            static_cast<DeviceStorage&>(model->storage()).scribble(++value_);
                          return true;
                        },
                        [](const GateEvent*) {}}));
  }
  ~BusyEngine() { engine_.stop_serving(); }
  BusyEngine(const BusyEngine&) = delete;
  BusyEngine& operator=(const BusyEngine&) = delete;
  void scribble_over(Model* model) { scribbled_.store(model); }

 private:
  Engine& engine_;
  std::atomic<Model*> scribbled_{nullptr};
  unsigned char value_ = 0;
};

class Scenario {
 public:
  Scenario(std::string socket, MemoryKind kind, std::uint64_t seed)
      : socket_(std::move(socket)), kind_(kind), seed_(seed) {}

  ScenarioOutcome run() {
    if (auto done = play(); !done) outcome_.error = done.error().to_string();
    return outcome_;
  }

 private:
  Model make_model() {
    Model model{"transformer", tensors(), make_storage(kind_, Model::sizes_of(tensors()))};
    static_cast<DeviceStorage&>(model.storage()).run_late();
    return model;
  }

  Result<void> play() {
    Model source = make_model();
    Model first = make_model();
    Model second = make_model();
    REFIT_TRY_ASSIGN(Trainer trainer, Trainer::connect("trainer", {socket_}, soon()));
    REFIT_TRY_ASSIGN(Engine engine, Engine::connect("flux", {socket_}, soon()));
    REFIT_TRY(trainer.register_module(source.spec(), soon()));
    REFIT_TRY(engine.register_module(first.spec(), soon()));
    {
      BusyEngine busy(engine);
      busy.scribble_over(&first);
      for (int step = 0; step < 3; ++step) REFIT_TRY(refit(trainer, source, first, {}));
      // Of a part, so the engine leaves the rest alone.
      busy.scribble_over(nullptr);
      for (const std::size_t part : {1U, 10U})
        REFIT_TRY(refit(trainer, source, first, {source.names()[part], source.names()[4]}));
    }
    REFIT_TRY(engine.register_module(second.spec(), soon()));
    BusyEngine busy(engine);
    busy.scribble_over(&second);
    for (int step = 0; step < 2; ++step) REFIT_TRY(refit(trainer, source, second, {}));
    return {};
  }

  Result<void> refit(Trainer& trainer, Model& source, const Model& target,
                     const std::vector<std::string>& selection) {
    target.download();
    std::map<std::string, std::string> expected;
    const auto selected = [&](std::size_t i) {
      return selection.empty() ||
             std::count(selection.begin(), selection.end(), source.names()[i]) != 0;
    };
    for (std::size_t i = 0; i < target.names().size(); ++i)
      expected[target.names()[i]] = sha256_hex(target.data(i), target.bytes(i));
    source.fill(++seed_ * 1000);
    for (std::size_t i = 0; i < source.names().size(); ++i) {
      if (selected(i)) expected[source.names()[i]] = sha256_hex(source.data(i), source.bytes(i));
    }
    ++outcome_.refits;
    REFIT_TRY(trainer.refit({"flux", "transformer", "", selection}, soon()));
    target.download();
    std::map<std::string, std::string> held;
    for (std::size_t i = 0; i < target.names().size(); ++i)
      held[target.names()[i]] = sha256_hex(target.data(i), target.bytes(i));
    if (held != expected) ++outcome_.wrong_bytes;
    REFIT_TRY_ASSIGN(const DigestReport report,
                     trainer.digest({"flux", "transformer", DigestKind::raw}, soon()));
    std::map<std::string, std::string> told;
    for (const auto& [name, digest] : report.tensors) told[name] = digest.to_hex();
    if (told != expected) ++outcome_.wrong_digests;
    return {};
  }

  std::string socket_;
  MemoryKind kind_;
  std::uint64_t seed_;
  ScenarioOutcome outcome_;
};

}  // namespace

ScenarioOutcome run_scenario(const std::string& socket, MemoryKind kind, std::uint64_t seed) {
  return Scenario(socket, kind, seed).run();
}

void choose_schedule(std::uint64_t seed, const std::string& schedule) {
  ::setenv("FAKECUDA_SEED", std::to_string(seed).c_str(), 1);
  ::setenv("FAKECUDA_SCHEDULE", schedule.c_str(), 1);
  if (cuda::Driver::fake()) cuda::Driver::fake()->reload();
}

}  // namespace refit::test
