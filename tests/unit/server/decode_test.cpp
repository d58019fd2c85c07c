// Decoding of names and registrations: what is copied is bounded, whatever the message claims.

#include "server/decode.hpp"

#include <gtest/gtest.h>

#include "ipc/shared_layout.hpp"

namespace refit::daemon {
namespace {

using Strings = std::vector<flatbuffers::Offset<flatbuffers::String>>;

/// One message under construction and its verified root.
class Message {
 public:
  flatbuffers::FlatBufferBuilder fbb;

  template <typename Root>
  const Root* finish(flatbuffers::Offset<Root> root) {
    fbb.Finish(root);
    const Root* verified = verified_root<Root>(fbb.GetBufferPointer(), fbb.GetSize());
    EXPECT_NE(verified, nullptr) << "the fixture's message does not verify";
    return verified;
  }
};

Result<std::string> name_of(const std::string& text) {
  Message message;
  const auto name = message.fbb.CreateString(text);
  return decode_name(message.finish(wire::CreateUnregisterModule(message.fbb, name))->module_name(),
                     "module");
}

TEST(DecodeName, TakesPrintableNamesOfUpTo256Bytes) {
  for (const std::string& text :
       {std::string("transformer"), std::string("vae.2"), std::string(256, 'x'),
        std::string("\xc3\xbc"
                    "ber")}) {
    const auto name = name_of(text);
    ASSERT_TRUE(name) << name.error().to_string();
    EXPECT_EQ(*name, text);
  }
}

TEST(DecodeName, RefusesWhatCannotBePrintedOrSplit) {
  for (const std::string& text :
       {std::string(), std::string(257, 'x'), std::string("a/b"), std::string("a b"),
        std::string("a\tb"), std::string("a\0b", 3), std::string("\x7f"), std::string("\xff"),
        std::string("\xc2\x9b")}) {
    const auto name = name_of(text);
    ASSERT_FALSE(name) << text;
    EXPECT_EQ(name.error().code, Errc::bad_argument);
    EXPECT_NE(name.error().message.find("module"), std::string::npos) << name.error().message;
  }
}

TEST(DecodeName, RefusesAMissingName) { EXPECT_FALSE(decode_name(nullptr, "module")); }

TEST(DecodeRegister, KeepsEveryField) {
  Message message;
  auto& fbb = message.fbb;
  const auto region = wire::CreateRegion(fbb, 11, 12);
  const std::vector<std::uint64_t> shape{2, 3}, strides{3, 1}, global{4, 3}, box{1, 0};
  const auto tensor = wire::CreateTensor(fbb, fbb.CreateString("t"), 4, fbb.CreateVector(shape),
                                         fbb.CreateVector(strides), 5, 6, fbb.CreateVector(global),
                                         fbb.CreateVector(box));
  const auto rule = wire::CreateNameRule(fbb, fbb.CreateString("p"), fbb.CreateString("q"), 1, 3);
  const wire::TransactionId id(7, 8);
  const auto regions = fbb.CreateVector(&region, 1);
  const auto tensors = fbb.CreateVector(&tensor, 1);
  const auto rules = fbb.CreateVector(&rule, 1);
  const auto name = fbb.CreateString("m");
  const auto sut = decode(
      *message.finish(wire::CreateRegisterModule(fbb, name, regions, tensors, rules, 9, &id, true)),
      ManifestLimits{});
  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(sut->module, "m");
  ASSERT_EQ(sut->regions.size(), 1U);
  EXPECT_EQ(sut->regions[0].ticket, 11U);
  EXPECT_EQ(sut->regions[0].bytes, 12U);
  ASSERT_EQ(sut->tensors.size(), 1U);
  EXPECT_EQ(sut->tensors[0].name, "t");
  EXPECT_EQ(sut->tensors[0].dtype, DType::bfloat16);
  EXPECT_EQ(sut->tensors[0].shape, shape);
  EXPECT_EQ(sut->tensors[0].strides, strides);
  EXPECT_EQ(sut->tensors[0].region, 5U);
  EXPECT_EQ(sut->tensors[0].offset_bytes, 6U);
  EXPECT_EQ(sut->tensors[0].global_shape, global);
  EXPECT_EQ(sut->tensors[0].box_offset, box);
  ASSERT_EQ(sut->name_map.size(), 1U);
  EXPECT_EQ(sut->name_map[0].pattern, "p");
  EXPECT_EQ(sut->name_map[0].target, "q");
  EXPECT_EQ(sut->name_map[0].part, 1U);
  EXPECT_EQ(sut->name_map[0].parts, 3U);
  EXPECT_EQ(sut->version, 9U);
  EXPECT_EQ(sut->transaction, (TransactionId{7, 8}));
  EXPECT_TRUE(sut->poisoned);
}

TEST(DecodeRegister, TakesAMessageWithNothingButItsName) {
  Message message;
  const auto name = message.fbb.CreateString("m");
  const auto sut =
      decode(*message.finish(wire::CreateRegisterModule(message.fbb, name)), ManifestLimits{});
  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_TRUE(sut->regions.empty());
  EXPECT_TRUE(sut->tensors.empty());
  EXPECT_TRUE(sut->transaction.is_zero());
}

TEST(DecodeRegister, RefusesTensorsWithoutFieldsOnlyLater) {
  // A tensor without a name is Manifest's to list, beside everything else that is wrong.
  Message message;
  auto& fbb = message.fbb;
  const auto tensor = wire::CreateTensor(fbb);
  const auto tensors = fbb.CreateVector(&tensor, 1);
  const auto name = fbb.CreateString("m");
  const auto sut =
      decode(*message.finish(wire::CreateRegisterModule(fbb, name, 0, tensors)), ManifestLimits{});
  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_TRUE(sut->tensors[0].name.empty());
}

TEST(DecodeRegister, RefusesCountsOverTheLimits) {
  ManifestLimits limits;
  limits.tensors_max = 3;
  limits.regions_max = 2;
  limits.name_rules_max = 1;
  const auto outcome = [&](std::size_t tensors, std::size_t regions, std::size_t rules) {
    Message message;
    auto& fbb = message.fbb;
    const auto name = fbb.CreateString("m");
    const std::vector<flatbuffers::Offset<wire::Tensor>> tensor_list(tensors,
                                                                     wire::CreateTensor(fbb, name));
    const std::vector<flatbuffers::Offset<wire::Region>> region_list(regions,
                                                                     wire::CreateRegion(fbb));
    const std::vector<flatbuffers::Offset<wire::NameRule>> rule_list(
        rules, wire::CreateNameRule(fbb, name, name));
    const auto all_regions = fbb.CreateVector(region_list);
    const auto all_tensors = fbb.CreateVector(tensor_list);
    const auto all_rules = fbb.CreateVector(rule_list);
    return decode(
        *message.finish(wire::CreateRegisterModule(fbb, name, all_regions, all_tensors, all_rules)),
        limits);
  };
  EXPECT_TRUE(outcome(3, 2, 1));
  for (const auto& refused : {outcome(4, 2, 1), outcome(3, 3, 1), outcome(3, 2, 2)}) {
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::quota);
    EXPECT_NE(refused.error().message.find("m: "), std::string::npos) << refused.error().message;
    EXPECT_NE(refused.error().message.find("limit"), std::string::npos) << refused.error().message;
  }
}

// Goal: a small message cannot make the daemon copy more than a message's worth.
// Method: tables that all name the same long string or vector, of which a few thousand would be
// GBs.
TEST(DecodeRegister, RefusesPartsThatAreSharedIntoMoreThanAMessage) {
  Message names;
  {
    auto& fbb = names.fbb;
    const auto tensor = wire::CreateTensor(fbb, fbb.CreateString(std::string(1'000'000, 'n')));
    const std::vector<flatbuffers::Offset<wire::Tensor>> many(50'000, tensor);
    const auto tensors = fbb.CreateVector(many);
    const auto name = fbb.CreateString("m");
    const auto sut =
        decode(*names.finish(wire::CreateRegisterModule(fbb, name, 0, tensors)), ManifestLimits{});
    ASSERT_FALSE(sut);
    EXPECT_EQ(sut.error().code, Errc::bad_manifest);
  }
  Message shapes;
  {
    auto& fbb = shapes.fbb;
    const auto shape = fbb.CreateVector(std::vector<std::uint64_t>(100'000, 1));
    const auto tensor = wire::CreateTensor(fbb, 0, 0, shape, shape, 0, 0, shape, shape);
    const std::vector<flatbuffers::Offset<wire::Tensor>> many(50'000, tensor);
    const auto tensors = fbb.CreateVector(many);
    const auto name = fbb.CreateString("m");
    EXPECT_FALSE(decode(*shapes.finish(wire::CreateRegisterModule(fbb, name, 0, tensors)),
                        ManifestLimits{}));
  }
}

// Goal: the bound never refuses an honest message, however full.
TEST(DecodeRegister, TakesTheLargestHonestMessage) {
  Message message;
  auto& fbb = message.fbb;
  std::vector<flatbuffers::Offset<wire::Tensor>> list;
  for (int i = 0; fbb.GetSize() < kPayloadBytesMax - 512 * 1024; ++i) {
    const auto name =
        fbb.CreateString("a.rather.long.name.of.a.tensor.number." + std::to_string(i));
    const auto shape = fbb.CreateVector(std::vector<std::uint64_t>{1, 2, 3, 4});
    list.push_back(wire::CreateTensor(fbb, name, 2, shape));
  }
  const auto tensors = fbb.CreateVector(list);
  const auto name = fbb.CreateString("m");
  const auto* root = message.finish(wire::CreateRegisterModule(fbb, name, 0, tensors));
  ASSERT_LE(fbb.GetSize(), kPayloadBytesMax);
  const auto sut = decode(*root, ManifestLimits{});
  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(sut->tensors.size(), list.size());
}

TEST(DecodeTensorNames, TakesDistinctNamesAndNone) {
  EXPECT_TRUE(decode_tensor_names(nullptr, "the selection"));
  Message message;
  const auto list = message.fbb.CreateVectorOfStrings({"b", "a"});
  const auto* root = message.finish(wire::CreateDigestQuery(message.fbb, 0, 0, 0, list));
  const auto sut = decode_tensor_names(root->selection(), "the selection");
  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(*sut, (std::vector<std::string>{"b", "a"}));
}

TEST(DecodeTensorNames, RefusesTwiceTooLongAndTooMany) {
  const auto refused = [](const std::string& name, std::size_t count) {
    Message message;
    const auto one = message.fbb.CreateString(name);
    const auto list = message.fbb.CreateVector(Strings(count, one));
    const auto* root = message.finish(wire::CreateDigestQuery(message.fbb, 0, 0, 0, list));
    return decode_tensor_names(root->selection(), "the selection");
  };
  const auto twice = refused("weight", 2);
  ASSERT_FALSE(twice);
  EXPECT_EQ(twice.error().code, Errc::bad_argument);
  EXPECT_NE(twice.error().message.find("weight"), std::string::npos) << twice.error().message;
  const auto too_long = refused(std::string(513, 'n'), 1);
  ASSERT_FALSE(too_long);
  EXPECT_EQ(too_long.error().code, Errc::quota);
  const auto too_many = refused("n", 65'537);
  ASSERT_FALSE(too_many);
  EXPECT_EQ(too_many.error().code, Errc::quota);
}

}  // namespace
}  // namespace refit::daemon
