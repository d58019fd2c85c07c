// Digests through the ring: their definition, their kinds, and what a check reports.
//
// Expected values are the golden vectors of the sglang checker (computed with Python's hashlib) or
// SHA-256 by OpenSSL over bytes that this file puts together itself; nothing of the project's
// digest code is used to make them. See refit_fixture.hpp for how the suite is built.

#include <openssl/evp.h>

#include "conformance/refit_fixture.hpp"

namespace refit::test {
namespace {

std::string sha256_hex(const std::string& bytes) {
  unsigned char digest[32];
  unsigned int length = sizeof digest;
  EVP_Digest(bytes.data(), bytes.size(), digest, &length, EVP_sha256(), nullptr);
  std::string hex;
  for (const unsigned char byte : digest) {
    constexpr char kHex[] = "0123456789abcdef";
    hex += kHex[byte >> 4];
    hex += kHex[byte & 15];
  }
  return hex;
}

std::string bytes_of_tensor(const test::Model& model, std::size_t index) {
  return {reinterpret_cast<const char*>(model.data(index)), model.bytes(index)};
}

const std::string kBfloat0To5("\x00\x00\x80\x3f\x00\x40\x40\x40\x80\x40\xa0\x40", 12);

template <typename T>
void put(const test::Model& model, std::size_t index, const std::vector<T>& values) {
  ASSERT_EQ(model.bytes(index), values.size() * sizeof(T));
  std::memcpy(model.data(index), values.data(), model.bytes(index));
}

/// A model whose tensors have golden digests; filled in the trainer, refitted, read in the engine.
std::vector<TensorShape> golden_tensors() {
  return {{"bf16.matrix", DType::bfloat16, {2, 3}}, {"bf16.vector", DType::bfloat16, {6}},
          {"f32.matrix", DType::float32, {2, 3}},   {"f32.scalar", DType::float32, {}},
          {"i64.scalar", DType::int64, {}},         {"bf16.empty", DType::bfloat16, {0}}};
}
const std::map<std::string, std::string> kGolden{
    {"bf16.matrix", "8ba196e3a883df1c7546f265a6d6172d2254c7e21f353bf635d78ad7d7a45450"},
    {"bf16.vector", "613d4f8d90555cc3f5cf565eba20d7d8838aa1986763ef06674e048beb2ed37c"},
    {"f32.matrix", "e20933188a476ce2418266391f2f875503b2dbea37a1f5a230c18b535bc495b5"},
    {"f32.scalar", "8bc059d0e2eca020bd2cf282ed95203c45abb0b83d6e7897ee20ef990d00f63e"},
    {"i64.scalar", "c47b9eb9dadfe352a6a5d2b74233ce6e820045bf40faae836476ccc0b75f4aa7"},
    {"bf16.empty", "e1e1cba52298223a552e2fbfc11e9a9d30dbeb8ae05aa6aa0bc1e420eeaf1114"}};

void fill_golden(const test::Model& model) {
  std::memcpy(model.data(0), kBfloat0To5.data(), kBfloat0To5.size());
  std::memcpy(model.data(1), kBfloat0To5.data(), kBfloat0To5.size());
  put<float>(model, 2, {0, 1, 2, 3, 4, 5});
  put<float>(model, 3, {7});
  put<std::int64_t>(model, 4, {7});
  model.upload();
}

TEST_P(Refit, SglangDigestsEqualTheGoldenVectors) {
  Model source("transformer", golden_tensors());
  Model target("transformer", golden_tensors());
  fill_golden(source);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  const auto report = trainer.digest({"flux", "transformer", DigestKind::sglang}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  std::map<std::string, std::string> got;
  for (const auto& [name, digest] : report->tensors) got[name] = digest.to_hex();
  EXPECT_EQ(got, kGolden);
  EXPECT_EQ(report->version, 1U);
  EXPECT_EQ(report->state, ModuleState::committed);
}

TEST_P(Refit, ModuleDigestEqualsTheGoldenVector) {
  // Registered in the order that is not the names' order, which the digest must not follow.
  const std::vector<TensorShape> tensors{{"b", DType::float32, {2, 3}},
                                         {"a", DType::bfloat16, {2, 3}}};
  Model target("transformer", tensors);
  put<float>(target, 0, {0, 1, 2, 3, 4, 5});
  std::memcpy(target.data(1), kBfloat0To5.data(), kBfloat0To5.size());
  target.upload();
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  DigestRequest request{"flux", "transformer"};
  request.per_module = true;
  const auto report = observer.digest(request, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->module.to_hex(),
            "e3b8fa9a41be8295bfabe11d5d6004282552d12acb1cc87324ef1723f799ecc3");
}

TEST_P(Refit, DigestsOfEveryDtypeFollowTheDefinition) {
  struct Case {
    TensorShape tensor;
    std::string header;  ///< dtype and shape as Python prints them
  };
  const std::vector<Case> cases{
      {{"bf16", DType::bfloat16, {3, 5}}, "torch.bfloat16(3, 5)"},
      {{"bool", DType::boolean, {9}}, "torch.bool(9,)"},
      {{"empty", DType::float32, {0, 4}}, "torch.float32(0, 4)"},
      {{"f16", DType::float16, {2, 2, 2, 2, 2}}, "torch.float16(2, 2, 2, 2, 2)"},
      {{"f32", DType::float32, {7, 1}}, "torch.float32(7, 1)"},
      {{"f64", DType::float64, {4}}, "torch.float64(4,)"},
      {{"f64.scalar", DType::float64, {}}, "torch.float64()"},
      {{"f8.e4m3", DType::float8_e4m3fn, {11}}, "torch.float8_e4m3fn(11,)"},
      {{"f8.e5m2", DType::float8_e5m2, {11}}, "torch.float8_e5m2(11,)"},
      {{"i16", DType::int16, {5}}, "torch.int16(5,)"},
      {{"i32", DType::int32, {5}}, "torch.int32(5,)"},
      {{"i64", DType::int64, {5, 2}}, "torch.int64(5, 2)"},
      {{"i8", DType::int8, {13}}, "torch.int8(13,)"},
      {{"u8", DType::uint8, {1000, 3}}, "torch.uint8(1000, 3)"}};
  std::vector<TensorShape> tensors;
  for (const Case& one : cases) tensors.push_back(one.tensor);
  Model target("transformer", tensors);
  target.fill(5);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  DigestRequest request{"flux", "transformer", DigestKind::sglang};
  request.per_module = true;
  const auto sglang = observer.digest(request, soon());
  ASSERT_TRUE(sglang) << sglang.error().to_string();
  request.kind = DigestKind::raw;
  const auto raw = observer.digest(request, soon());
  ASSERT_TRUE(raw) << raw.error().to_string();
  ASSERT_EQ(sglang->tensors.size(), cases.size());
  ASSERT_EQ(raw->tensors.size(), cases.size());
  std::string module;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const std::string bytes = bytes_of_tensor(target, i);
    EXPECT_EQ(sglang->tensors[i].first, cases[i].tensor.name) << "not sorted by name";
    EXPECT_EQ(sglang->tensors[i].second.to_hex(), sha256_hex(cases[i].header + bytes))
        << cases[i].tensor.name;
    EXPECT_EQ(raw->tensors[i].second.to_hex(), sha256_hex(bytes)) << cases[i].tensor.name;
    module += cases[i].tensor.name + bytes;
  }
  EXPECT_EQ(sglang->module.to_hex(), sha256_hex(module));
}

TEST_P(Refit, DigestOfAStridedTensorIsThatOfItsRowMajorBytes) {
  Model memory("transformer", {{"matrix", DType::float32, {3, 4}}});
  std::vector<float> column_major(12);
  std::string row_major;
  for (std::size_t row = 0; row < 3; ++row) {
    for (std::size_t column = 0; column < 4; ++column) {
      const auto value = static_cast<float>(10 * row + column);
      column_major[column * 3 + row] = value;
      row_major.append(reinterpret_cast<const char*>(&value), sizeof value);
    }
  }
  put<float>(memory, 0, column_major);
  memory.upload();
  memory.settle();
  ModuleSpec strided("transformer");
  must(strided.add("matrix", DType::float32, {3, 4}, memory.memory_of(0), memory.address(0),
                   {1, 3}));
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(strided, soon()));
  Observer observer = make_observer();
  const auto report = must(observer.digest({"flux", "transformer", DigestKind::raw}, soon()));
  ASSERT_EQ(report.tensors.size(), 1U);
  EXPECT_EQ(report.tensors[0].second.to_hex(), sha256_hex(row_major));
}

// Goal: streams that are hashed side by side stay apart, and each is whole. Method: many small
// tensors between a few that take several chunks of a device's; none is a multiple of a block.
TEST_P(Refit, DigestsOfManyTensorsOfAllLengthsAreEachTheirOwn) {
  std::vector<TensorShape> tensors;
  for (std::uint64_t i = 0; i < 150; ++i) {
    const std::uint64_t bytes = i % 50 == 7 ? 5'000'011 * (i / 50 + 1) : i * i * 13 % 20'011;
    tensors.push_back({"tensor." + std::to_string(1000 + i), DType::uint8, {bytes}});
  }
  Model target("transformer", tensors);
  target.fill(3);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  DigestRequest request{"flux", "transformer", DigestKind::raw};
  request.per_module = true;
  const auto report = must(observer.digest(request, soon()));
  ASSERT_EQ(report.tensors.size(), tensors.size());
  std::string module;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::string bytes = bytes_of_tensor(target, i);
    EXPECT_EQ(report.tensors[i].second.to_hex(), sha256_hex(bytes)) << tensors[i].name;
    module += tensors[i].name + bytes;
  }
  EXPECT_EQ(report.module.to_hex(), sha256_hex(module));
}

TEST_P(Refit, FastDigestHas128BitsAndSeesEveryChange) {
  Model target("transformer", small_tensors());
  target.fill(1);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const DigestRequest request{"flux", "transformer", DigestKind::xxh3, {"block.0.attn.weight"}};
  const auto before = must(observer.digest(request, soon()));
  ASSERT_EQ(before.tensors.size(), 1U);
  EXPECT_EQ(before.tensors[0].second.length, 16U);
  EXPECT_EQ(must(observer.digest(request, soon())).tensors[0].second, before.tensors[0].second);
  target.data(1)[17] ^= std::byte{1};
  target.upload();
  target.settle();
  EXPECT_NE(must(observer.digest(request, soon())).tensors[0].second, before.tensors[0].second);
}

// Goal: the lists of a check are sorted and complete, and live tensors that nobody expects are left
// out of it.
TEST_P(Refit, CheckListsMissingAndMismatchedSortedAndComplete) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  const auto digest = [&](std::size_t index) {
    return *Digest::from_hex(sha256_hex(bytes_of_tensor(source, index)));
  };
  CheckRequest request{"flux", "transformer", DigestKind::raw};
  request.expected = {{"zebra", digest(0)},           {source.names()[3], digest(2)},
                      {source.names()[0], digest(0)}, {"absent", digest(0)},
                      {source.names()[1], digest(2)}, {source.names()[2], digest(2)}};
  auto report = trainer.check(request, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->verified, 2U);
  EXPECT_EQ(report->missing, (std::vector<std::string>{"absent", "zebra"}));
  EXPECT_EQ(report->mismatched, (std::vector<std::string>{source.names()[1], source.names()[3]}));
  EXPECT_FALSE(report->ok());
  EXPECT_EQ(report->version, 1U);

  request.expected.clear();
  for (std::size_t i = 0; i < source.names().size(); ++i)
    request.expected.emplace_back(source.names()[i], digest(i));
  report = trainer.check(request, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(report->ok());
  EXPECT_EQ(report->verified, source.names().size());
}

// Goal: the checker reads what is really there, not what was copied.
TEST_P(Refit, CheckSeesAByteThatChangedInTheEngineAfterTheRefit) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  CheckRequest request{"flux", "transformer", DigestKind::raw};
  for (std::size_t i = 0; i < source.names().size(); ++i) {
    request.expected.emplace_back(source.names()[i],
                                  *Digest::from_hex(sha256_hex(bytes_of_tensor(source, i))));
  }
  EXPECT_TRUE(must(trainer.check(request, soon())).ok());
  target.download();
  target.data(1)[target.bytes(1) - 1] ^= std::byte{0x80};
  target.upload();
  target.settle();
  const auto report = must(trainer.check(request, soon()));
  EXPECT_EQ(report.mismatched, (std::vector<std::string>{target.names()[1]}));
}

TEST_P(Refit, CheckWithoutProofIsRefused) {
  Model target("transformer", small_tensors());
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  Digest digest;
  digest.length = 32;
  Digest fast;
  fast.length = 16;
  CheckRequest request{"flux", "transformer", DigestKind::xxh3, {{"scale", fast}}};
  EXPECT_EQ(code_of(observer.check(request, soon())), Errc::bad_argument);
  request.kind = DigestKind::raw;
  EXPECT_EQ(code_of(observer.check(request, soon())), Errc::bad_argument);
  request.expected = {};
  EXPECT_EQ(code_of(observer.check(request, soon())), Errc::bad_argument);
  request.expected = {{"scale", digest}, {"scale", digest}};
  const auto twice = observer.check(request, soon());
  EXPECT_EQ(code_of(twice), Errc::bad_argument);
  EXPECT_NE(text_of(twice).find("scale"), std::string::npos) << text_of(twice);
}

TEST_P(Refit, DigestSelectionIsExactAndItsUnknownNamesAreListed) {
  Model target("transformer", small_tensors());
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const auto some =
      must(observer.digest({"flux", "transformer", DigestKind::raw, {"scale", "counter"}}, soon()));
  ASSERT_EQ(some.tensors.size(), 2U);
  EXPECT_EQ(some.tensors[0].first, "counter");
  EXPECT_EQ(some.tensors[1].first, "scale");
  EXPECT_EQ(some.module.length, 0U) << "nobody asked for the module's digest";
  const auto unknown =
      observer.digest({"flux", "transformer", DigestKind::raw, {"nope", "scale", "nil"}}, soon());
  EXPECT_EQ(code_of(unknown), Errc::manifest_mismatch);
  EXPECT_TRUE(one_detail_has(unknown, {"nope", "flux/transformer"})) << text_of(unknown);
  EXPECT_TRUE(one_detail_has(unknown, {"nil", "flux/transformer"})) << text_of(unknown);
  const auto twice =
      observer.digest({"flux", "transformer", DigestKind::raw, {"scale", "scale"}}, soon());
  EXPECT_EQ(code_of(twice), Errc::bad_argument) << text_of(twice);
}

}  // namespace
}  // namespace refit::test
