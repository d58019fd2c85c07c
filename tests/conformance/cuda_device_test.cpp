// What only device memory has: sides on the host and on devices in any mixture, several devices,
// and what a refit costs the driver once everything is open.
//
// See refit_fixture.hpp for how the suite is built. What the daemon asked of the driver is counted
// by the fake one, in a page that it shares; a real one tells nobody.

#include <sys/resource.h>

#include <cstdlib>

#include "conformance/device_fixture.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/effort.hpp"
#include "support/offloaded_model.hpp"

namespace refit::test {
namespace {

class Devices : public DeviceFixture {
 protected:
  explicit Devices(DaemonOptions how = {}) : DeviceFixture(std::move(how)) {}

  /// Refits steps of other bytes and compares them.
  void expect_refits(Trainer& trainer, test::Model& source, const test::Model& target,
                     std::uint64_t first_step) {
    for (std::uint64_t step = first_step; step < first_step + 3; ++step) {
      source.fill(step);
      const auto report = trainer.refit(kWhole, soon());
      ASSERT_TRUE(report) << report.error().to_string();
      EXPECT_TRUE(target.equals(source)) << "step " << step;
    }
  }
};

class SeveralDevices : public Devices {
 protected:
  void SetUp() override { REFIT_NEEDS_DEVICES(2); }
};

std::vector<TensorShape> many_tensors(std::size_t count) {
  std::vector<TensorShape> tensors;
  for (std::size_t i = 0; i < count; ++i)
    tensors.push_back({"t." + std::to_string(i), DType::bfloat16, {3 + i % 7, 5}});
  return tensors;
}

TEST_P(Devices, HostSourceReachesADeviceTarget) {
  test::Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  expect_refits(trainer, source, target, 1);
  EXPECT_EQ(must(trainer.refit(kWhole, soon())).guarantee, Guarantee::atomic)
      << "the source outlives its trainer";
}

TEST_P(Devices, DeviceSourceReachesAHostTarget) {
  Model source("transformer", small_tensors());
  test::Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  expect_refits(trainer, source, target, 1);
}

// Goal: one module may lie on both sides of the bus. Method: every other tensor is on the host, and
// not the same ones in the trainer and in the engine, so that all four pairs are in one refit.
TEST_P(Devices, ModulesThatAreInPartOnTheHostAreRefittedWhole) {
  const auto tensors = many_tensors(40);
  Model device_source("transformer", tensors);
  test::Model host_source("transformer", tensors);
  Model device_target("transformer", tensors);
  test::Model host_target("transformer", tensors);
  const auto mix = [&](const test::Model& device, const test::Model& host, std::size_t period) {
    ModuleSpec spec("transformer");
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const test::Model& side = i / period % 2 == 0 ? device : host;
      must(spec.add(tensors[i].name, tensors[i].dtype, tensors[i].shape, side.memory_of(i),
                    side.address(i)));
    }
    return spec;
  };
  ModuleSpec source = mix(device_source, host_source, 1);
  source.set_fence(device_source.spec().fence());
  ModuleSpec target = mix(device_target, host_target, 2);
  target.set_fence(device_target.spec().fence());
  Trainer trainer = connect_trainer();
  must(trainer.register_module(source, soon()));
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(target, soon()));
  const WaitingEngine waiting(engine);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    device_source.fill(step);
    host_source.fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    device_target.download();
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const test::Model& side =
          i / 2 % 2 == 0 ? static_cast<test::Model&>(device_target) : host_target;
      EXPECT_EQ(std::memcmp(side.data(i), host_source.data(i), side.bytes(i)), 0)
          << "step " << step << ", tensor " << i;
    }
  }
}

TEST_P(SeveralDevices, SourceOnOneReachesATargetOnAnother) {
  Model source("transformer", small_tensors(), 0);
  Model target("transformer", small_tensors(), 1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  expect_refits(trainer, source, target, 1);
  EXPECT_EQ(digests("flux", "transformer").size(), target.names().size());
}

// Goal: ranks on several devices are written together from one of them.
TEST_P(SeveralDevices, EnginesOnSeveralAreWrittenTogether) {
  Model source("transformer", small_tensors(), 1);
  Model first("transformer", small_tensors(), 0);
  Model second("transformer", small_tensors(), 1);
  Trainer trainer = make_trainer(source);
  Engine a = make_engine("a", first);
  Engine b = make_engine("b", second);
  const WaitingEngine waiting_a(a);
  const WaitingEngine waiting_b(b);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    source.fill(step);
    const auto report = trainer.refit_all({{"a", "transformer"}, {"b", "transformer"}}, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_TRUE(first.equals(source));
    EXPECT_TRUE(second.equals(source));
  }
  EXPECT_EQ(digests("a", "transformer"), digests("b", "transformer"));
}

TEST_P(Devices, OffloadedLayersComeFromAHostSourceToo) {
  constexpr std::size_t kLayers = 3;
  test::Model source("transformer", layered_tensors(kLayers));
  source.fill(1);
  const int last = cuda::device_count() - 1;
  OffloadedModel target("transformer", kLayers, 2, 1, [last](const auto& bytes) {
    return make_storage(GetParam(), bytes, last);
  });
  Trainer trainer = make_trainer(source);
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(target.spec(), soon()));
  engine.bind_to_this_thread();
  target.fetch(2);
  const RefitReport report = must(trainer.refit(kWhole, soon()));
  must(engine.poll(soon()));
  EXPECT_GT(report.device_bytes, 0U);
  EXPECT_TRUE(target.holds_exactly(source));
}

// ---- what it costs

// Goal: once a plan is there, a refit opens, allocates and registers nothing, and asks the driver
// for one copy for each pair of places, whatever the number of tensors.
TEST_P(SeveralDevices, RefitAfterTheFirstIsOneBatchForEachPairAndNothingElse) {
  REFIT_FAKE_ONLY("counted calls of the driver");
  for (const std::size_t count : {1U, 17U, 900U}) {
    const auto tensors = many_tensors(count);
    Model source("transformer", tensors);
    Model same_device("transformer", tensors);
    Model other_device("transformer", tensors, 1);
    test::Model host("transformer", tensors);
    Trainer trainer = make_trainer(source);
    Engine a = make_engine("a", same_device);
    Engine b = make_engine("b", other_device);
    Engine c = make_engine("c", host);
    const WaitingEngine waiting_a(a);
    const WaitingEngine waiting_b(b);
    const WaitingEngine waiting_c(c);
    const std::vector<RefitTarget> all{
        {"a", "transformer"}, {"b", "transformer"}, {"c", "transformer"}};
    const Calls made = calls_of_steady_refits(trainer, source, all);
    EXPECT_EQ(made.at("cuMemcpyBatchAsync"), 3 * kSteadyRefits) << count << " tensors";
    EXPECT_TRUE(same_device.equals(source));
    EXPECT_TRUE(other_device.equals(source));
    EXPECT_TRUE(host.equals(source));
  }
}

// Goal: layers that are resident cost no call more than the host places do. Method: the daemon's
// calls are counted while no layer, one and several are resident, each in another place every time.
TEST_P(Devices, RefitOfResidentLayersIsOneBatchForEachPairHoweverManyThereAre) {
  REFIT_FAKE_ONLY("counted calls of the driver");
  constexpr std::size_t kLayers = 6;
  Model source("transformer", layered_tensors(kLayers));
  OffloadedModel target("transformer", kLayers, 5, 1,
                        [](const auto& bytes) { return make_storage(GetParam(), bytes); });
  Trainer trainer = make_trainer(source);
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(target.spec(), soon()));
  engine.bind_to_this_thread();
  source.fill(1);
  must(trainer.refit(kWhole, soon()));
  must(engine.poll(soon()));
  const auto report = daemon_report();
  const auto held = gauges_of(report);
  std::uint64_t calls_of_one_batch = 0;
  for (const std::size_t resident : {0U, 1U, 5U, 3U, 0U, 4U}) {
    for (std::size_t layer = 0; layer < kLayers; ++layer) target.drop(layer);
    for (std::size_t layer = 0; layer < resident; ++layer) target.fetch(layer);
    source.fill(10 + resident);
    const auto before = calls_of(report);
    const RefitReport refitted = must(trainer.refit(kWhole, soon()));
    must(engine.poll(soon()));
    const Calls made = since(before, calls_of(report));
    const std::uint64_t batches = resident == 0 ? 1 : 2;
    EXPECT_EQ(refitted.device_bytes > 0, resident > 0);
    EXPECT_EQ(made.at("cuMemcpyBatchAsync"), batches) << resident << " resident layers";
    std::uint64_t calls = 0;
    for (const auto& [name, times] : made) {
      // A fence is asked for until it is passed, with its context made current each time.
      if (name != "cuEventQuery" && name.rfind("cuCtx", 0) != 0) calls += times;
    }
    if (calls_of_one_batch == 0) calls_of_one_batch = calls;
    EXPECT_EQ(calls, batches * calls_of_one_batch) << resident << " resident layers";
    EXPECT_EQ(gauges_of(report), held) << resident << " resident layers";
    EXPECT_TRUE(target.holds_exactly(source)) << resident << " resident layers";
  }
}

// Goal: a layer whose weights come from the host and from a device reaches a pool of either.
TEST_P(Devices, LayersComeFromBothSidesAtOnce) {
  constexpr std::size_t kLayers = 3;
  const auto tensors = layered_tensors(kLayers);
  Model on_device("transformer", tensors);
  test::Model on_host("transformer", tensors);
  ModuleSpec source("transformer");
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const test::Model& side = i % 2 == 0 ? on_device : on_host;
    must(source.add(tensors[i].name, tensors[i].dtype, tensors[i].shape, side.memory_of(i),
                    side.address(i)));
  }
  source.set_fence(on_device.spec().fence());
  Trainer trainer = connect_trainer();
  must(trainer.register_module(source, soon()));
  for (const MemoryKind pool : {GetParam(), MemoryKind::host}) {
    OffloadedModel target("transformer", kLayers, 2, 1,
                          [pool](const auto& bytes) { return make_storage(pool, bytes); });
    Engine engine = must(Engine::connect("flux", options(), soon()));
    must(engine.register_module(target.spec(), soon()));
    engine.bind_to_this_thread();
    target.fetch(0);
    target.fetch(2);
    on_device.fill(3);
    on_host.fill(3);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << name_of(pool) << ": " << report.error().to_string();
    must(engine.poll(soon()));
    EXPECT_TRUE(target.holds_exactly(on_host)) << name_of(pool);
  }
}

/// One thread, so that how many of its readings there are at once does not depend on luck.
class DevicesWithOneHashingThread : public Devices {
 protected:
  DevicesWithOneHashingThread() : Devices(one_thread()) {}

 private:
  static DaemonOptions one_thread() {
    DaemonOptions how;
    how.arguments = {"--check-threads", "1"};
    return how;
  }
};

// Goal: nothing grows with refits, digests and registrations: no handle, descriptor, mapping,
// device or pinned memory, stream or event of the daemon.
TEST_P(DevicesWithOneHashingThread, TenThousandRefitsWithDigestsLeaveNothingBehind) {
  Model source("transformer", small_tensors());
  Model first("transformer", small_tensors());
  Model second("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", first);
  engine.bind_to_this_thread();
  const auto round = [&](std::uint64_t refits) {
    for (Model* const target : {&second, &first}) {
      must(engine.register_module(target->spec(), soon()));
      for (std::uint64_t i = 0; i < refits; ++i) {
        must(trainer.refit(kWhole, soon()));
        must(trainer.digest({"flux", "transformer", DigestKind::raw}, soon()));
      }
      must(engine.poll(soon()));
      must(trainer.register_module(source.spec(), soon()));
    }
  };
  // Readers, threads and their stacks are made when first needed.
  round(rounds(200));
  // What was replaced is let go in the background.
  if (cuda::Driver::fake()) {
    const auto report = daemon_report();
    ASSERT_TRUE(
        eventually([&] { return report->gauge(fakecuda::Gauge::pending_operations) == 0; }));
  }
  round(1);
  std::vector<std::uint64_t> held;
  std::size_t fds = 0;
  ASSERT_TRUE(eventually([&] {
    const auto now = held_by_daemon();
    const std::size_t open = count_fds(daemon_.pid());
    const bool same = now == held && open == fds;
    held = now;
    fds = open;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return same;
  }));
  const std::size_t maps = count_maps(daemon_.pid());
  for (unsigned i = 0; i < 10; ++i) round(rounds(500));
  EXPECT_TRUE(eventually([&] { return held_by_daemon() == held; }));
  EXPECT_TRUE(eventually([&] { return count_fds(daemon_.pid()) == fds; }))
      << fds << " before, " << count_fds(daemon_.pid()) << " after";
  EXPECT_LE(count_maps(daemon_.pid()), maps);
  source.fill(5);
  must(trainer.refit(kWhole, soon()));
  EXPECT_TRUE(first.equals(source));
}

// ---- when memory is its owner's again

/// A module of one tensor in memory that the test frees itself.
struct Loan {
  explicit Loan(const std::string& module)
      : memory(std::make_unique<DeviceAllocation>(
            Refit::GetParam() == MemoryKind::cuda_legacy ? DeviceKind::legacy : DeviceKind::vmm, 0,
            4096)),
        spec(module) {
    const auto shared = must(DeviceMemory::share(memory->pointer(), 4096));
    must(spec.add("t", DType::uint8, {64}, shared, memory->pointer()));
  }
  std::unique_ptr<DeviceAllocation> memory;
  ModuleSpec spec;
};

// Goal: to free what another process has open is undefined, so the reply comes when it has not.
// Method: the fake driver reports a free of open memory at the end of the test. Digests of the
// module are under way meanwhile, which hold the memory too.
TEST_P(Devices, MemoryMayBeFreedWhenItsModuleIsUnregistered) {
  Engine engine = must(Engine::connect("flux", options(), soon()));
  Trainer trainer = connect_trainer();
  std::atomic<bool> stop{false};
  std::thread digests([&] {
    Observer observer = make_observer();
    while (!stop.load()) {
      static_cast<void>(observer.digest({"flux", "vae", DigestKind::raw}, soon()));
    }
  });
  for (int i = 0; i < 100; ++i) {
    Loan target("vae");
    Loan source("vae");
    must(engine.register_module(target.spec, soon()));
    must(trainer.register_module(source.spec, soon()));
    std::this_thread::yield();
    must(engine.unregister_module("vae", soon()));
    target.memory.reset();
    must(trainer.unregister_module("vae", soon()));
    source.memory.reset();
  }
  stop.store(true);
  digests.join();
}

TEST_P(Devices, MemoryMayBeFreedWhenOtherMemoryTookItsPlace) {
  Engine engine = must(Engine::connect("flux", options(), soon()));
  Trainer trainer = connect_trainer();
  auto target = std::make_unique<Loan>("vae");
  auto source = std::make_unique<Loan>("vae");
  must(engine.register_module(target->spec, soon()));
  must(trainer.register_module(source->spec, soon()));
  engine.bind_to_this_thread();
  for (int i = 0; i < 100; ++i) {
    must(trainer.refit({"flux", "vae"}, soon()));
    must(engine.poll(soon()));
    auto next = std::make_unique<Loan>("vae");
    must(engine.register_module(next->spec, soon()));
    target = std::move(next);
    next = std::make_unique<Loan>("vae");
    must(trainer.register_module(next->spec, soon()));
    source = std::move(next);
  }
  must(engine.unregister_module("vae", soon()));
  must(trainer.unregister_module("vae", soon()));
}

TEST_P(Devices, MemoryMayBeFreedWhileItsEngineSleeps) {
  Model source("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Loan first("transformer");
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(first.spec, soon()));
  for (int i = 0; i < 20; ++i) {
    must(engine.sleep(soon()));
    first.memory.reset();
    first = Loan("transformer");
    must(engine.register_module(first.spec, soon()));
    must(engine.wake(soon()));
    EXPECT_EQ(digests("flux", "transformer").size(), 1U);
  }
  must(engine.unregister_module("transformer", soon()));
}

// Goal: memory of many segments, as PyTorch's expandable segments make it, needs an fd for each.
TEST_P(Devices, MemoryOfHundredsOfSegmentsIsRegisteredAndRefitted) {
  if (GetParam() != MemoryKind::cuda_vmm) return;  // the other kind has no segments
  constexpr std::uint64_t kSegments = 300;
  constexpr std::uint64_t kBytes = kSegments * (64 << 10);
  const auto module_of = [](const DeviceAllocation& memory) {
    ModuleSpec spec("vae");
    must(spec.add("t", DType::uint8, {kBytes}, must(DeviceMemory::share(memory.pointer(), kBytes)),
                  memory.pointer()));
    return spec;
  };
  const DeviceAllocation source(DeviceKind::vmm, 0, kBytes, true, kSegments);
  const DeviceAllocation target(DeviceKind::vmm, 0, kBytes, true, kSegments);
  {
    const cuda::Current current(0);
    CUstream stream = nullptr;
    const cuda::Driver& driver = cuda::Driver::get();
    cuda::must(driver.cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    cuda::must(driver.cuMemsetD8Async(source.address(), 0x5a, kBytes, stream), "cuMemsetD8Async");
    cuda::must(driver.cuMemsetD8Async(target.address(), 0, kBytes, stream), "cuMemsetD8Async");
    cuda::must(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
    cuda::must(driver.cuStreamDestroy(stream), "cuStreamDestroy");
  }
  Trainer trainer = connect_trainer();
  must(trainer.register_module(module_of(source), soon()));
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(module_of(target), soon()));
  {
    const WaitingEngine waiting(engine);
    must(trainer.refit({"flux", "vae"}, soon()));
  }
  unsigned char last = 0;
  const cuda::Current current(0);
  cuda::must(cuda::Driver::get().cuMemcpyDtoH(&last, target.address() + kBytes - 1, 1),
             "cuMemcpyDtoH");
  EXPECT_EQ(last, 0x5a);
  must(engine.unregister_module("vae", soon()));
  must(trainer.unregister_module("vae", soon()));
}

// Goal: host memory that a stream still writes is waited for, because the CPUs that copy it know of
// no streams. Method: the trainer's weights come from a device late, behind its fence.
TEST_P(Devices, HostMemoryThatAStreamStillWritesIsWaitedFor) {
  constexpr std::uint64_t kBytes = 1 << 20;
  const auto tensors = std::vector<TensorShape>{{"t", DType::uint8, {kBytes}}};
  test::Model source("transformer", tensors);
  test::Model target("transformer", tensors);
  Model on_device("transformer", tensors);
  on_device.fill(7);
  on_device.settle();
  source.fill(1);
  const cuda::Current current(0);
  cuda::must(cuda::Driver::get().cuMemHostRegister(source.data(0), kBytes, 0), "cuMemHostRegister");
  ModuleSpec spec = source.spec();
  spec.set_fence(on_device.spec().fence());
  Trainer trainer = connect_trainer();
  must(trainer.register_module(spec, soon()));
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  cuda::must(cuda::Driver::get().cuMemcpyDtoHAsync(
                 source.data(0), reinterpret_cast<CUdeviceptr>(on_device.address(0)), kBytes,
                 static_cast<DeviceStorage&>(on_device.storage()).stream()),
             "cuMemcpyDtoHAsync");
  must(trainer.refit(kWhole, soon()));
  on_device.download();
  EXPECT_EQ(std::memcmp(target.data(0), on_device.data(0), kBytes), 0);
  must(trainer.unregister_module("transformer", soon()));
  cuda::must(cuda::Driver::get().cuMemHostUnregister(source.data(0)), "cuMemHostUnregister");
}

/// A daemon that finds no device when it first looks.
class LateDevices : public Refit {
 protected:
  LateDevices() : Refit(no_device_at_first()) {}
  static DaemonOptions no_device_at_first() {
    DaemonOptions how;
    how.environment = {{"FAKECUDA_FAULT", "cuInit#1=100"}};
    return how;
  }
};

TEST_P(LateDevices, AreTakenWhenAModuleIsRegisteredAgain) {
  REFIT_FAKE_ONLY("a driver that finds no device at first");
  Model source("transformer", small_tensors());
  Trainer trainer = connect_trainer();
  // The first look is for whoever could do without, the second for who cannot.
  test::Model on_host("vae", small_tensors());
  must(trainer.register_module(on_host.spec(), soon()));
  must(trainer.register_module(source.spec(), soon()));
}

INSTANTIATE_TEST_SUITE_P(Memory, LateDevices, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });
INSTANTIATE_TEST_SUITE_P(Memory, SeveralDevices, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });
INSTANTIATE_TEST_SUITE_P(Memory, Devices, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });
INSTANTIATE_TEST_SUITE_P(Memory, DevicesWithOneHashingThread, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
