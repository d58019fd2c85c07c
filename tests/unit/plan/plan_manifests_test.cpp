// Plans between the source and target lists of the real models in bench/manifests: every tensor
// maps, every byte of the target is written. REFIT_SOURCE_DIR is the project's root, from the
// build.
#include <gtest/gtest.h>

#include <cstdint>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "plan_support.hpp"

namespace refit::daemon {
namespace {

using namespace testing;  // NOLINT: the tests read as sentences only without the prefix.

struct Model {
  std::vector<TensorSpec> source;
  std::vector<TensorSpec> target;
  std::vector<NameRule> rules;
  std::uint64_t bytes = 0;
};

std::vector<TensorSpec> tensors_of(const nlohmann::json& list, DType dtype) {
  std::vector<TensorSpec> tensors;
  for (const auto& entry : list) {
    tensors.push_back(tensor(entry.at(0).get<std::string>(), entry.at(1).get<Dims>(), 0, dtype));
  }
  return tensors;
}

Model load(const std::string& name) {
  std::ifstream file(std::string(REFIT_SOURCE_DIR) + "/bench/manifests/" + name + ".json");
  EXPECT_TRUE(file.good()) << name;
  const nlohmann::json json = nlohmann::json::parse(file);
  Model model;
  const DType dtype = parse_dtype(json.at("dtype").get<std::string>()).value();
  model.source = tensors_of(json.at("source"), dtype);
  model.target =
      json.at("target").is_string() ? model.source : tensors_of(json.at("target"), dtype);
  for (const auto& rule : json.at("name_map")) {
    model.rules.push_back({rule.at("pattern").get<std::string>(),
                           rule.at("target").get<std::string>(), rule.value("part", 0U),
                           rule.value("parts", 1U)});
  }
  model.bytes = json.at("bytes").get<std::uint64_t>();
  return model;
}

struct Pair {
  ManifestPtr source;
  ManifestPtr target;
};

Pair manifests_of(Model model, std::uint64_t align_bytes) {
  const std::uint64_t source_bytes = pack(model.source, align_bytes);
  const std::uint64_t target_bytes = pack(model.target, align_bytes);
  return {trainer(std::move(model.source), std::move(model.rules), source_bytes),
          engine(std::move(model.target), target_bytes)};
}

class RealManifest : public ::testing::TestWithParam<const char*> {};

TEST_P(RealManifest, CompilesToAPlanThatWritesEveryByteOnce) {
  const Model model = load(GetParam());
  const Pair pair = manifests_of(model, 64);
  EXPECT_EQ(pair.source->bytes(), model.bytes);
  const Result<Plan> sut = Plan::compile(*pair.source, *pair.target, {});
  ASSERT_TRUE(sut.has_value()) << sut.error().to_string();
  EXPECT_EQ(sut->bytes, model.bytes);
  EXPECT_TRUE(sut->whole);
  EXPECT_EQ(sut->targets.size(), model.target.size());
  std::uint64_t end = 0;
  std::uint64_t bytes = 0;
  for (const Copy& copy : sut->copies) {
    EXPECT_EQ(copy.loop_count, 0U);
    ASSERT_GE(copy.target_offset, end) << "copies must not meet";
    end = copy.target_offset + copy.run_bytes;
    bytes += copy.run_bytes;
  }
  EXPECT_EQ(bytes, model.bytes);
}

TEST_P(RealManifest, NamesTheOneTensorThatIsRemoved) {
  Model model = load(GetParam());
  const std::string lost = model.source.front().name;
  model.source.erase(model.source.begin());
  const Pair pair = manifests_of(model, 64);
  const Result<Plan> sut = Plan::compile(*pair.source, *pair.target, {});
  ASSERT_FALSE(sut.has_value());
  // No rule renames the first tensor of any of the three.
  ASSERT_EQ(sut.error().details.size(), 1U) << sut.error().to_string();
  EXPECT_NE(sut.error().details[0].find("'" + lost + "'"), std::string::npos);
}

TEST_P(RealManifest, WithoutTheNameMapIsRefusedIfItHasOne) {
  Model model = load(GetParam());
  const bool needed = !model.rules.empty();
  model.rules.clear();
  const Pair pair = manifests_of(model, 64);
  EXPECT_EQ(Plan::compile(*pair.source, *pair.target, {}).has_value(), !needed);
}

INSTANTIATE_TEST_SUITE_P(Models, RealManifest,
                         ::testing::Values("wan2.1-t2v-1.3b", "qwen-image", "flux2-klein-4b"),
                         [](const ::testing::TestParamInfo<const char*>& model) {
                           std::string name = model.param;
                           for (char& c : name) {
                             if (c == '.' || c == '-') c = '_';
                           }
                           return name;
                         });

TEST(QwenImageManifest, FusesThreePartsIntoOneRun) {
  const Model model = load("qwen-image");
  ASSERT_EQ(model.source.size(), 1'933U);
  ASSERT_EQ(model.target.size(), 1'693U);
  const Pair pair = manifests_of(model, 64);
  const Result<Plan> sut = Plan::compile(*pair.source, *pair.target, {});
  ASSERT_TRUE(sut.has_value()) << sut.error().to_string();
  const std::string fused = "transformer_blocks.7.attn.to_added_qkv.weight";
  const TensorSpec* to = pair.target->find(fused);
  ASSERT_NE(to, nullptr);
  const std::uint64_t part_bytes = bytes_of(*to) / 3;
  const char* parts[] = {"add_q_proj", "add_k_proj", "add_v_proj"};
  for (std::uint64_t part = 0; part < 3; ++part) {
    const TensorSpec* from =
        pair.source->find("transformer_blocks.7.attn." + std::string(parts[part]) + ".weight");
    ASSERT_NE(from, nullptr);
    // The part's bytes come from its own source: look for the copy that writes its first byte.
    const std::uint64_t first = to->offset_bytes + part * part_bytes;
    std::size_t found = 0;
    for (const Copy& copy : sut->copies) {
      if (copy.target_offset > first || copy.target_offset + copy.run_bytes <= first) continue;
      ++found;
      EXPECT_EQ(copy.source_offset + (first - copy.target_offset), from->offset_bytes);
      EXPECT_GE(copy.target_offset + copy.run_bytes, first + part_bytes);
    }
    EXPECT_EQ(found, 1U);
  }
}

TEST(KleinManifest, EqualLayoutsOnBothSidesMergeIntoOneCopy) {
  const Pair pair = manifests_of(load("flux2-klein-4b"), 1);
  const Result<Plan> sut = Plan::compile(*pair.source, *pair.target, {});
  ASSERT_TRUE(sut.has_value()) << sut.error().to_string();
  EXPECT_EQ(sut->copies.size(), 1U);
}

}  // namespace
}  // namespace refit::daemon
