// Casts and fine strides of device memory, which kernels do: between all places, and what they cost
// the driver.
//
// See refit_fixture.hpp for how the suite is built. On the fake driver the kernels run on the CPU,
// of the same source (support/cuda/kernels_on_cpu.cpp). A build without them skips all of it, which
// counts as not passed.

#include "conformance/device_fixture.hpp"
#include "support/cast_by_definition.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/offloaded_model.hpp"

namespace refit::test {
namespace {

/// One tensor for each cast, and one that needs none. The dimensions are those of a matrix.
std::vector<TensorShape> cast_tensors(bool of_the_source, std::uint64_t rows = 7,
                                      std::uint64_t columns = 301) {
  std::vector<TensorShape> tensors{{"same", DType::float32, {rows, columns}}};
#define REFIT_X(from, to) \
  tensors.push_back({#from "_to_" #to, of_the_source ? DType::from : DType::to, {rows, columns}});
  REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  return tensors;
}

Cast cast_of(std::size_t tensor) {
  return *cast_between(cast_tensors(true)[tensor].dtype, cast_tensors(false)[tensor].dtype);
}

/// What `source` becomes, put into `expected`, a model on the host.
void cast_all(test::Model& expected, const test::Model& source) {
  for (std::size_t i = 0; i < expected.names().size(); ++i)
    cast_by_definition(cast_of(i), expected.data(i), source.data(i), expected.bytes(i));
}

class DeviceCasts : public DeviceFixture {
 protected:
  explicit DeviceCasts(DaemonOptions how = {}) : DeviceFixture(std::move(how)) {}
  void SetUp() override {
    if (!can_cast(GetParam())) GTEST_SKIP() << "not run: this build has no kernels";
  }
  /// Refits steps of other bytes and compares bytes and digests.
  void expect_casts(test::Model& source, test::Model& target) {
    test::Model expected("expected", cast_tensors(false));
    Trainer trainer = make_trainer(source);
    Engine engine = make_engine("flux", target);
    Engine other = make_engine("other", expected);
    const WaitingEngine waiting(engine);
    for (std::uint64_t step = 1; step <= 3; ++step) {
      source.fill(step);
      const auto report = trainer.refit(kWhole, soon());
      ASSERT_TRUE(report) << report.error().to_string();
      cast_all(expected, source);
      EXPECT_TRUE(target.equals(expected)) << "step " << step;
      EXPECT_EQ(digests("flux", "transformer"), digests("other", "expected"));
    }
  }
};

TEST_P(DeviceCasts, DeviceToDevice) {
  Model source("transformer", cast_tensors(true));
  Model target("transformer", cast_tensors(false));
  expect_casts(source, target);
}

TEST_P(DeviceCasts, HostToDevice) {
  test::Model source("transformer", cast_tensors(true));
  Model target("transformer", cast_tensors(false));
  expect_casts(source, target);
}

TEST_P(DeviceCasts, DeviceToHost) {
  Model source("transformer", cast_tensors(true));
  test::Model target("transformer", cast_tensors(false));
  expect_casts(source, target);
}

TEST_P(DeviceCasts, BetweenDevices) {
  REFIT_NEEDS_DEVICES(2);
  Model source("transformer", cast_tensors(true), 1);
  Model target("transformer", cast_tensors(false), 0);
  expect_casts(source, target);
}

// Goal: a source that lies transposed is cast in its target's order. Method: every pair of places;
// the source's rows are its columns.
TEST_P(DeviceCasts, OfStridedTensors) {
  constexpr std::uint64_t kRows = 7;
  constexpr std::uint64_t kColumns = 301;
  for (const auto& [source_kind, target_kind] :
       {std::pair{GetParam(), GetParam()}, std::pair{MemoryKind::host, GetParam()},
        std::pair{GetParam(), MemoryKind::host}}) {
    const auto source_tensors = cast_tensors(true);
    const auto target_tensors = cast_tensors(false);
    test::Model source("transformer", source_tensors,
                       make_storage(source_kind, test::Model::sizes_of(source_tensors)));
    test::Model target("transformer", target_tensors,
                       make_storage(target_kind, test::Model::sizes_of(target_tensors)));
    ModuleSpec transposed("transformer");
    for (std::size_t i = 0; i < source_tensors.size(); ++i) {
      must(transposed.add(source_tensors[i].name, source_tensors[i].dtype, {kRows, kColumns},
                          source.memory_of(i), source.address(i), {1, kRows}));
    }
    transposed.set_fence(source.spec().fence());
    Trainer trainer = connect_trainer();
    must(trainer.register_module(transposed, soon()));
    Engine engine = make_engine("flux", target);
    const WaitingEngine waiting(engine);
    source.fill(5);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    target.download();
    for (std::size_t i = 0; i < target_tensors.size(); ++i) {
      const Cast cast = cast_of(i);
      const std::size_t from = element_bytes(source_tensors[i].dtype);
      const std::size_t to = element_bytes(target_tensors[i].dtype);
      std::vector<std::byte> expected(target.bytes(i));
      for (std::uint64_t row = 0; row < kRows; ++row) {
        for (std::uint64_t column = 0; column < kColumns; ++column) {
          cast_by_definition(cast, expected.data() + (row * kColumns + column) * to,
                             source.data(i) + (column * kRows + row) * from, to);
        }
      }
      EXPECT_EQ(std::memcmp(expected.data(), target.data(i), expected.size()), 0)
          << name_of(source_kind) << " to " << name_of(target_kind) << ": "
          << target_tensors[i].name;
    }
  }
}

// Goal: layers are cast into their second places wherever they are, and absent ones are left out.
TEST_P(DeviceCasts, IntoResidentLayers) {
  constexpr std::size_t kLayers = 5;
  std::vector<TensorShape> tensors = layered_tensors(kLayers);
  test::Model expected("transformer", tensors);
  const std::vector<TensorShape> made = tensors;
  for (TensorShape& tensor : tensors) tensor.dtype = DType::float32;
  Model source("transformer", tensors);
  OffloadedModel target("transformer", kLayers, 4, 1,
                        [](const auto& bytes) { return make_storage(GetParam(), bytes); });
  Trainer trainer = make_trainer(source);
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(target.spec(), soon()));
  engine.bind_to_this_thread();
  for (std::uint64_t step = 0; step < 6; ++step) {
    for (std::size_t layer = 0; layer < kLayers; ++layer) target.drop(layer);
    for (std::size_t layer = step % 3; layer < kLayers && step != 4; layer += 2)
      target.fetch(layer);
    source.fill(step);
    must(trainer.refit(kWhole, soon()));
    must(engine.poll(soon()));
    for (std::size_t i = 0; i < made.size(); ++i) {
      cast_by_definition(*cast_between(DType::float32, made[i].dtype), expected.data(i),
                         source.data(i), expected.bytes(i));
    }
    EXPECT_TRUE(target.holds_exactly(expected)) << "step " << step;
  }
}

// Goal: a tensor whose runs are too many for the driver's copies is a kernel's, and as right.
TEST_P(DeviceCasts, StridesThatAreTooFineForCopies) {
  constexpr std::uint64_t kRows = 1 << 11;
  constexpr std::uint64_t kColumns = (1 << 9) + 3;
  const std::vector<TensorShape> tensors{{"t", DType::bfloat16, {kRows, kColumns}}};
  Model source("transformer", tensors);
  Model target("transformer", tensors);
  ModuleSpec transposed("transformer");
  must(transposed.add("t", DType::bfloat16, {kRows, kColumns}, source.memory_of(0),
                      source.address(0), {1, kRows}));
  transposed.set_fence(source.spec().fence());
  Trainer trainer = connect_trainer();
  must(trainer.register_module(transposed, soon()));
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  source.fill(1);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  bool same = true;
  for (std::uint64_t row = 0; row < kRows; ++row) {
    for (std::uint64_t column = 0; column < kColumns; ++column) {
      same = same && std::memcmp(target.data(0) + 2 * (row * kColumns + column),
                                 source.data(0) + 2 * (column * kRows + row), 2) == 0;
    }
  }
  EXPECT_TRUE(same);
}

// Goal: once a plan is there, a refit is one launch for each cast and device, whatever the number
// of tensors, and uploads, allocates and loads nothing.
TEST_P(DeviceCasts, RefitAfterTheFirstIsOneLaunchForEachCastAndDevice) {
  REFIT_FAKE_ONLY("counted calls of the driver");
  REFIT_NEEDS_DEVICES(2);
  for (const std::size_t copies : {1U, 20U}) {
    std::vector<TensorShape> from;
    std::vector<TensorShape> to;
    for (std::size_t copy = 0; copy < copies; ++copy) {
      for (const bool of_the_source : {true, false}) {
        for (TensorShape& tensor : cast_tensors(of_the_source, 3, 5 + copy)) {
          tensor.name += "." + std::to_string(copy);
          (of_the_source ? from : to).push_back(tensor);
        }
      }
    }
    Model source("transformer", from);
    Model same_device("transformer", to);
    Model other_device("transformer", to, 1);
    Trainer trainer = make_trainer(source);
    Engine a = make_engine("a", same_device);
    Engine b = make_engine("b", other_device);
    const WaitingEngine waiting_a(a);
    const WaitingEngine waiting_b(b);
    const std::vector<RefitTarget> all{{"a", "transformer"}, {"b", "transformer"}};
    const Calls made = calls_of_steady_refits(trainer, source, all, "cuLaunchKernel");
    EXPECT_EQ(made.at("cuMemcpyBatchAsync"), 2 * kSteadyRefits) << copies;
    EXPECT_EQ(made.at("cuLaunchKernel"), 2 * (kCastCount - 1) * kSteadyRefits) << copies;
  }
}

// ---- where it does not go

class DeviceTooOld : public DeviceCasts {
 protected:
  DeviceTooOld() : DeviceCasts(too_old()) {}

 private:
  static DaemonOptions too_old() {
    DaemonOptions how;
    how.environment["FAKECUDA_DEVICE_0"] = "granularity=64K,cc=75";
    return how;
  }
};

// Goal: a device that the kernels were not compiled for refuses plans that need them, by name, and
// no other; it is asked to load them once.
TEST_P(DeviceTooOld, RefusesCastsByNameAndCopiesTheRest) {
  REFIT_FAKE_ONLY("another compute capability");
  Model source("transformer", cast_tensors(true));
  Model target("transformer", cast_tensors(false));
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  source.fill(1);
  for (int i = 0; i < 2; ++i) {
    const auto refused = trainer.refit(kWhole, soon());
    EXPECT_EQ(code_of(refused), Errc::cuda) << text_of(refused);
    EXPECT_NE(text_of(refused).find("209"), std::string::npos) << text_of(refused);
    EXPECT_NE(text_of(refused).find("casting device 0 to device 0"), std::string::npos);
    EXPECT_TRUE(one_detail_has(refused, {"float32_to_bfloat16", "flux/transformer",
                                         "torch.bfloat16", "torch.float32", "is cast"}))
        << text_of(refused);
    RefitTarget plain = kWhole;
    plain.selection = {"same"};
    const auto report = trainer.refit(plain, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_TRUE(target.tensor_equals(source, 0));
  }
  EXPECT_EQ(calls_of(daemon_report()).at("cuModuleLoadData"), 1U);
}

// Goal: of two plans that are prepared for one refit the one that cannot be refuses it, and the
// other is there for the next.
TEST_P(DeviceTooOld, RefusesARefitOfSeveralOfWhichOneCasts) {
  REFIT_FAKE_ONLY("another compute capability");
  Model source("transformer", cast_tensors(true));
  Model plain_target("transformer", cast_tensors(true));
  Model cast_target("transformer", cast_tensors(false));
  Trainer trainer = make_trainer(source);
  Engine plain = make_engine("a", plain_target);
  Engine cast = make_engine("b", cast_target);
  const WaitingEngine waiting(plain);
  const WaitingEngine waiting_too(cast);
  source.fill(1);
  for (int i = 0; i < 3; ++i) {
    const auto refused = trainer.refit_all({{"a", "transformer"}, {"b", "transformer"}}, soon());
    EXPECT_NE(text_of(refused).find("209"), std::string::npos) << text_of(refused);
    EXPECT_FALSE(plain_target.equals(source));
  }
  EXPECT_EQ(waiting.events() + waiting_too.events(), 0);
  must(trainer.refit({"a", "transformer"}, soon()));
  EXPECT_TRUE(plain_target.equals(source));
}

class DevicesApart : public DeviceCasts {
 protected:
  DevicesApart() : DeviceCasts(apart()) {}

 private:
  static DaemonOptions apart() {
    DaemonOptions how;
    how.environment["FAKECUDA_DEVICE_1"] = "granularity=64K,peers=0";
    return how;
  }
};

TEST_P(DevicesApart, RefuseACastByNameThatNeitherCouldMake) {
  REFIT_FAKE_ONLY("devices that cannot reach each other");
  Model source("transformer", cast_tensors(true), 1);
  Model target("transformer", cast_tensors(false), 0);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  source.fill(1);
  const auto refused = trainer.refit(kWhole, soon());
  EXPECT_EQ(code_of(refused), Errc::unsupported) << text_of(refused);
  EXPECT_NE(text_of(refused).find("cannot reach"), std::string::npos) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"float32_to_bfloat16", "flux/transformer"}))
      << text_of(refused);
}

INSTANTIATE_TEST_SUITE_P(Memory, DeviceCasts, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });
INSTANTIATE_TEST_SUITE_P(Memory, DeviceTooOld, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });
INSTANTIATE_TEST_SUITE_P(Memory, DevicesApart, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
