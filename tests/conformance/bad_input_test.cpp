// Wrong input that the public interface can express: refused before the first byte moves, with one
// error that lists everything wrong and names both sides.
//
// After every attack the target's digests are what they were, an honest trainer and engine beside
// it are refitted, and the daemon is the same process. What only a client that speaks the protocol
// by itself can send is in tests/system/protocol_test.cpp.

#include "conformance/refit_fixture.hpp"
#include "ipc/handshake.hpp"
#include "support/bystander.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class BadInput : public Refit {
 protected:
  BadInput() { target_.fill(2); }

  void SetUp() override {
    engine_.emplace(make_engine("flux", target_));
    before_ = digests("flux", "transformer");
  }
  void TearDown() override {
    if (engine_) {
      EXPECT_EQ(digests("flux", "transformer"), before_) << "bytes moved";
    }
    bystander_.goes_on();
  }

  /// Refits from `tensors` and expects a refusal.
  Result<RefitReport> refused(const std::vector<TensorShape>& tensors) {
    Model source("transformer", tensors);
    source.fill(9);
    Trainer trainer = make_trainer(source);
    const WaitingEngine waiting(*engine_);
    auto result = trainer.refit({"flux", "transformer"}, soon());
    EXPECT_EQ(code_of(result), Errc::manifest_mismatch) << text_of(result);
    return result;
  }
  /// Registers `spec` as an engine's and expects a refusal.
  Result<void> refused_engine(const ModuleSpec& spec, Errc code = Errc::bad_manifest) {
    Engine engine = must(Engine::connect("wrong", options(), soon()));
    auto result = engine.register_module(spec, soon());
    EXPECT_EQ(code_of(result), code) << text_of(result);
    // The session lives on: a right module is taken.
    Model right("transformer", small_tensors());
    const auto accepted = engine.register_module(right.spec(), soon());
    EXPECT_TRUE(accepted) << text_of(accepted);
    return result;
  }
  static TensorSpec spec_of(const std::string& name, DType dtype, Dims shape,
                            std::uint64_t offset) {
    TensorSpec spec;
    spec.name = name;
    spec.dtype = dtype;
    spec.shape = std::move(shape);
    spec.offset_bytes = offset;
    return spec;
  }

  Bystander bystander_{socket_, daemon_.pid()};
  Model target_{"transformer", small_tensors()};
  std::optional<Engine> engine_;
  std::map<std::string, std::string> before_;
};

const std::vector<std::string> kBothSides{"trainer/transformer", "flux/transformer"};

std::vector<std::string> both_sides_and(std::vector<std::string> parts) {
  parts.insert(parts.end(), kBothSides.begin(), kBothSides.end());
  return parts;
}

TEST_P(BadInput, UnknownNameIsRefused) {
  auto tensors = small_tensors();
  tensors.push_back({"stranger", DType::float32, {3}});
  EXPECT_TRUE(one_detail_has(refused(tensors), both_sides_and({"stranger"})));
}

TEST_P(BadInput, MissingNameIsRefused) {
  auto tensors = small_tensors();
  tensors.erase(tensors.begin() + 1);
  EXPECT_TRUE(one_detail_has(refused(tensors), both_sides_and({"block.0.attn.weight"})));
}

TEST_P(BadInput, WrongShapeIsRefused) {
  auto tensors = small_tensors();
  tensors[1].shape = {48, 24, 2};
  EXPECT_TRUE(one_detail_has(refused(tensors), both_sides_and({"block.0.attn.weight", "shape",
                                                               "(48, 24, 2)", "(48, 48)"})));
}

TEST_P(BadInput, WrongDtypeIsRefused) {
  auto tensors = small_tensors();
  tensors[2].dtype = DType::int32;
  EXPECT_TRUE(one_detail_has(
      refused(tensors), both_sides_and({"block.0.attn.bias", "torch.int32", "torch.float32"})));
}

TEST_P(BadInput, EverythingWrongIsInOneError) {
  auto tensors = small_tensors();
  tensors[0].name = "stranger";
  tensors[1].shape = {48, 49};
  tensors[2].dtype = DType::int32;
  const auto result = refused(tensors);
  EXPECT_EQ(result.error().details.size(), 4U) << text_of(result);
  EXPECT_TRUE(one_detail_has(result, both_sides_and({"stranger"})));
  EXPECT_TRUE(one_detail_has(result, both_sides_and({"embed.weight"})));
  EXPECT_TRUE(one_detail_has(result, both_sides_and({"block.0.attn.weight"})));
  EXPECT_TRUE(one_detail_has(result, both_sides_and({"block.0.attn.bias"})));
  EXPECT_TRUE(std::is_sorted(result.error().details.begin(), result.error().details.end()));
}

TEST_P(BadInput, SourceThatIsTheTargetIsRefused) {
  Trainer trainer = connect_trainer();
  must(trainer.register_module(target_.spec(), soon()));
  const auto result = trainer.refit({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(result), Errc::manifest_mismatch) << text_of(result);
}

TEST_P(BadInput, EngineManifestWithManyFaultsListsThemAll) {
  constexpr std::uint64_t kMost = ~std::uint64_t{0};
  Model memory("m", {{"room", DType::uint8, {4096}}});
  ModuleSpec spec("transformer");
  spec.add_region(memory.memory_of(0));
  const std::uint64_t end = memory.memory_of(0)->bytes();
  spec.add(spec_of("beyond", DType::uint8, {16}, end - 15));
  spec.add(spec_of("far", DType::uint8, {16}, kMost - 7));
  spec.add(spec_of("product", DType::float64, {std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0));
  auto strided = spec_of("strided", DType::float32, {4, 4}, 0);
  strided.strides = {end / 4, 1};
  spec.add(strided);
  auto overflowing = spec_of("overflowing", DType::float32, {4, 4}, 0);
  overflowing.strides = {kMost / 2, 1};
  spec.add(overflowing);
  auto itself = spec_of("itself", DType::float32, {4, 4}, 512);
  itself.strides = {1, 1};
  spec.add(itself);
  auto rank = spec_of("rank", DType::float32, {4, 4}, 512);
  rank.strides = {4};
  spec.add(rank);
  spec.add(spec_of("first", DType::uint8, {64}, 1024));
  spec.add(spec_of("second", DType::uint8, {64}, 1087));
  spec.add(spec_of("twice", DType::uint8, {1}, 2048));
  spec.add(spec_of("twice", DType::uint8, {1}, 2049));
  spec.add(spec_of("dtype", static_cast<DType>(200), {1}, 3000));
  spec.add(spec_of("dims", DType::uint8, {1, 1, 1, 1, 1, 1, 1, 1, 1}, 3000));
  spec.add(spec_of(std::string(600, 'n'), DType::uint8, {1}, 3001));
  spec.add(spec_of("tab\there", DType::uint8, {1}, 3002));
  spec.add(spec_of("", DType::uint8, {1}, 3003));
  auto region = spec_of("region", DType::uint8, {1}, 0);
  region.region = 7;
  spec.add(region);
  auto box = spec_of("box", DType::uint8, {4}, 3004);
  box.global_shape = {8};
  box.box_offset = {5};
  spec.add(box);
  const auto result = refused_engine(spec);
  for (const char* name : {"'beyond'", "'far'", "'product'", "'strided'", "'overflowing'",
                           "'itself'", "'rank'", "'first'", "'twice'", "'dtype'", "'dims'", "nnn",
                           "tab\\x09here", "number 15", "'region'", "'box'"}) {
    EXPECT_TRUE(one_detail_has(result, {name})) << name << "\n" << text_of(result);
  }
  EXPECT_TRUE(one_detail_has(result, {"'first'", "'second'", "overlap"})) << text_of(result);
  EXPECT_NE(text_of(result).find("wrong/transformer"), std::string::npos) << text_of(result);
}

TEST_P(BadInput, TensorsThatOverlapAcrossTwoModulesAreRefused) {
  ModuleSpec other("vae");
  must(other.add("stolen", DType::uint8, {8}, target_.memory_of(1), target_.address(1) + 8));
  const auto result = engine_->register_module(other, soon());
  EXPECT_EQ(code_of(result), Errc::bad_manifest) << text_of(result);
  EXPECT_TRUE(
      one_detail_has(result, {"stolen", "block.0.attn.weight", "flux/vae", "flux/transformer"}))
      << text_of(result);
}

TEST_P(BadInput, ManifestLargerThanAMessageIsRefusedAndTheSessionLives) {
  Model memory("m", {{"room", DType::uint8, {4096}}});
  ModuleSpec spec("transformer");
  spec.add_region(memory.memory_of(0));
  for (std::uint64_t i = 0; i < 70'000; ++i)
    spec.add(spec_of("tensor." + std::to_string(i), DType::uint8, {0}, 0));
  const auto result = refused_engine(spec, Errc::quota);
  EXPECT_NE(text_of(result).find("limit"), std::string::npos) << text_of(result);
}

TEST_P(BadInput, MoreRegionsThanTicketsIsRefusedAndTheSessionLives) {
  ModuleSpec spec("transformer");
  std::vector<std::shared_ptr<SharedMemory>> memories;
  constexpr std::size_t kCount = kUnclaimedTicketsMax + 1;
  for (std::size_t i = 0; i < kCount; ++i) {
    memories.push_back(must(SharedMemory::allocate(4096)));
    must(spec.add("tensor." + std::to_string(i), DType::uint8, {16}, memories.back(),
                  memories.back()->data()));
  }
  const auto result = refused_engine(spec, Errc::quota);
  EXPECT_NE(text_of(result).find(std::to_string(kCount) + " regions"), std::string::npos)
      << text_of(result);
  EXPECT_NE(text_of(result).find("expandable_segments"), std::string::npos) << text_of(result);
}

TEST_P(BadInput, NameRuleThatDoesNotCompileIsRefused) {
  Model source("transformer", small_tensors());
  source.spec().set_name_map({{"(", "x"}, {"a", R"(\7)"}, {"b", "c", 3, 2}});
  Trainer trainer = connect_trainer();
  const auto result = trainer.register_module(source.spec(), soon());
  EXPECT_EQ(code_of(result), Errc::bad_manifest) << text_of(result);
  EXPECT_EQ(result.error().details.size(), 3U) << text_of(result);
}

TEST_P(BadInput, EngineThatNobodyRegisteredIsRefusedWithTheOnesThatAre) {
  Model source("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  const auto result = trainer.refit({"sdxl", "transformer"}, soon());
  EXPECT_EQ(code_of(result), Errc::no_such_engine) << text_of(result);
  EXPECT_NE(text_of(result).find("sdxl"), std::string::npos) << text_of(result);
  EXPECT_NE(text_of(result).find("flux"), std::string::npos) << text_of(result);
}

TEST_P(BadInput, ModuleThatNobodyRegisteredIsRefusedWithTheOnesThatAre) {
  Model source("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  const auto no_target = trainer.refit({"flux", "vae", "transformer"}, soon());
  EXPECT_EQ(code_of(no_target), Errc::no_such_module) << text_of(no_target);
  EXPECT_NE(text_of(no_target).find("flux"), std::string::npos) << text_of(no_target);
  EXPECT_NE(text_of(no_target).find("transformer"), std::string::npos) << text_of(no_target);
  const auto no_source = trainer.refit({"flux", "transformer", "vae"}, soon());
  EXPECT_EQ(code_of(no_source), Errc::no_such_module) << text_of(no_source);
  EXPECT_NE(text_of(no_source).find("trainer"), std::string::npos) << text_of(no_source);
}

TEST_P(BadInput, SecondSessionForAnEngineNameIsToldWhoHoldsIt) {
  const auto second = Engine::connect("flux", options(), soon());
  EXPECT_EQ(code_of(second), Errc::name_taken) << text_of(second);
  EXPECT_NE(text_of(second).find("flux"), std::string::npos) << text_of(second);
  EXPECT_NE(text_of(second).find("pid " + std::to_string(::getpid())), std::string::npos)
      << text_of(second);
}

TEST_P(BadInput, IllegalSessionAndModuleNamesAreRefused) {
  for (const std::string& name :
       {std::string(), std::string("a/b"), std::string("a b"), std::string("a\nb"),
        std::string("a\x1b[31mb"), std::string(257, 'n'), std::string("\xff\xfe"),
        std::string("\xc2\x9b"
                    "2J"),
        std::string("a\0b", 3)}) {
    EXPECT_EQ(code_of(Engine::connect(name, options(), soon())), Errc::bad_argument) << name;
    EXPECT_EQ(code_of(Trainer::connect(name, options(), soon())), Errc::bad_argument) << name;
    Model model(name, small_tensors());
    Trainer trainer = connect_trainer();
    const auto result = trainer.register_module(model.spec(), soon());
    EXPECT_EQ(code_of(result), Errc::bad_argument) << text_of(result);
  }
  // Names in other scripts are names.
  EXPECT_TRUE(
      Engine::connect("\xc3\xbc"
                      "ber",
                      options(), soon()));
}

TEST_P(BadInput, SameModuleTwiceInOneRefitIsRefused) {
  Model source("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  const auto result = trainer.refit_all({{"flux", "transformer"}, {"flux", "transformer"}}, soon());
  EXPECT_EQ(code_of(result), Errc::bad_argument) << text_of(result);
  EXPECT_NE(text_of(result).find("flux/transformer"), std::string::npos) << text_of(result);
}

TEST_P(BadInput, TooManyOrNoTargetsAreRefused) {
  Model source("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  const auto many =
      trainer.refit_all(std::vector<RefitTarget>(65, {"flux", "transformer"}), soon());
  EXPECT_EQ(code_of(many), Errc::quota) << text_of(many);
  EXPECT_NE(text_of(many).find("64"), std::string::npos) << text_of(many);
  const auto none = trainer.refit_all({}, soon());
  EXPECT_EQ(code_of(none), Errc::bad_argument) << text_of(none);
}

TEST_P(BadInput, MoreModulesThanAnEngineMayHaveAreRefused) {
  Engine engine = must(Engine::connect("many", options(), soon()));
  Model first("m", {{"t", DType::uint8, {64}}});
  for (int i = 0; i < 64; ++i) {
    ModuleSpec spec("module." + std::to_string(i));
    must(spec.add("t", DType::uint8, {1}, first.memory_of(0), first.address(0) + i));
    must(engine.register_module(spec, soon()));
  }
  ModuleSpec spec("one.more");
  must(spec.add("t", DType::uint8, {0}, first.memory_of(0), first.address(0)));
  const auto result = engine.register_module(spec, soon());
  EXPECT_EQ(code_of(result), Errc::quota) << text_of(result);
  EXPECT_NE(text_of(result).find("64"), std::string::npos) << text_of(result);
  must(engine.unregister_module("module.7", soon()));
  EXPECT_TRUE(engine.register_module(spec, soon()));
}

TEST_P(BadInput, DeadlineThatIsOverIsRefusedAndAHugeOneIsTaken) {
  Model source("transformer", small_tensors());
  target_.fill(2);
  Trainer trainer = make_trainer(source);
  const auto over = trainer.refit({"flux", "transformer"}, Deadline::in(-1s));
  EXPECT_FALSE(over);
  // A century; the daemon must not overflow on it.
  const auto wrong = trainer.refit({"flux", "vae", "transformer"}, Deadline::in(24h * 365 * 100));
  EXPECT_EQ(code_of(wrong), Errc::no_such_module) << text_of(wrong);
}

TEST_P(BadInput, QuestionsOfTheCheckerAboutNothingAreRefused) {
  Observer observer = make_observer();
  EXPECT_EQ(code_of(observer.digest({"sdxl", "transformer"}, soon())), Errc::no_such_engine);
  EXPECT_EQ(code_of(observer.digest({"flux", "vae"}, soon())), Errc::no_such_module);
  EXPECT_EQ(code_of(observer.tensors("flux", "vae", soon())), Errc::no_such_module);
  EXPECT_EQ(code_of(observer.digest({"flux", "transformer", static_cast<DigestKind>(9)}, soon())),
            Errc::bad_argument);
}

INSTANTIATE_TEST_SUITE_P(Memory, BadInput, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
