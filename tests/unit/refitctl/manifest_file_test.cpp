// The manifests that `check` takes, and the errors for what is none. One thread.
#include "refitctl/manifest_file.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "refitctl/format/json.hpp"

namespace refit::ctl {
namespace {

const std::string kSha(64, 'a');
const std::string kOtherSha(64, 'b');
const std::string kXxh3(32, 'c');

bool has_detail(const Error& error, const std::string& part) {
  for (const std::string& line : error.details) {
    if (line.find(part) != std::string::npos) return true;
  }
  return false;
}

TEST(ManifestFile, TargetFormIsTaken) {
  const auto sut = parse_manifest(R"({"engine":"e0","module":"dit","kind":"raw","tensors":{"b":")" +
                                      kOtherSha + R"(","a":")" + kSha + R"("}})",
                                  "m.json");

  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(sut->target, (Target{"e0", "dit"}));
  EXPECT_EQ(sut->kind, DigestKind::raw);
  ASSERT_EQ(sut->expected.size(), 2U);
  EXPECT_EQ(sut->expected[0].first, "a");
  EXPECT_EQ(sut->expected[0].second.to_hex(), kSha);
  EXPECT_EQ(sut->expected[1].first, "b");
  EXPECT_FALSE(sut->module);
}

TEST(ManifestFile, PlainObjectIsTakenWithoutATarget) {
  const auto sut = parse_manifest(R"({"w":")" + kSha + R"("})", "m.json");

  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_FALSE(sut->target);
  EXPECT_FALSE(sut->kind);
  EXPECT_EQ(sut->expected.size(), 1U);
}

TEST(ManifestFile, PlainObjectMayNameATensorLikeAKey) {
  const auto sut =
      parse_manifest(R"({"tensors":")" + kSha + R"(","engine":")" + kSha + R"("})", "m.json");

  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_FALSE(sut->target);
  EXPECT_EQ(sut->expected.size(), 2U);
}

TEST(ManifestFile, KindOfPlainShortDigestsIsXxh3) {
  const auto sut = parse_manifest(R"({"w":")" + kXxh3 + R"("})", "m.json");

  ASSERT_TRUE(sut);
  EXPECT_EQ(sut->kind, DigestKind::xxh3);
}

TEST(ManifestFile, DigestOutputIsTakenAsItIs) {
  // Goal: a saved digest can be checked. Method: what digest_json() writes, with every optional
  // part, goes through the parser, and nothing is lost.
  DigestReport report;
  report.tensors = {{"a \"quoted\"\n名", *Digest::from_hex(kSha)},
                    {"b", *Digest::from_hex(kOtherSha)}};
  report.module = *Digest::from_hex(kSha);
  report.state = ModuleState::committed;
  report.version = 7;
  const auto json = digest_json({"e0", "dit"}, DigestKind::sglang, report);
  ASSERT_TRUE(json);

  const auto sut = parse_manifest(*json, "m.json");

  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(sut->target, (Target{"e0", "dit"}));
  EXPECT_EQ(sut->kind, DigestKind::sglang);
  EXPECT_EQ(sut->expected, report.tensors);
  EXPECT_EQ(sut->module, report.module);
}

TEST(ManifestFile, EveryProblemIsListedWithItsKey) {
  const auto sut = parse_manifest(
      R"({"engine":"e0","kind":"md5","tensors":{"short":"abc","number":1,"letters":")" +
          std::string(64, 'z') + R"(","":")" + kSha + R"("},"version":1,"kinds":"raw"})",
      "m.json");

  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::bad_argument);
  EXPECT_NE(sut.error().message.find("m.json"), std::string::npos);
  EXPECT_TRUE(has_detail(sut.error(), "\"kinds\" is not a key"));
  EXPECT_TRUE(has_detail(sut.error(), "\"engine\" and \"module\" belong together"));
  EXPECT_TRUE(has_detail(sut.error(), "\"md5\""));
  EXPECT_TRUE(has_detail(sut.error(), "tensor \"short\""));
  EXPECT_TRUE(has_detail(sut.error(), "tensor \"number\""));
  EXPECT_TRUE(has_detail(sut.error(), "tensor \"letters\""));
  EXPECT_TRUE(has_detail(sut.error(), "empty name"));
  EXPECT_EQ(sut.error().details.size(), 7U);
}

TEST(ManifestFile, NameThatStandsTwiceIsRefused) {
  // The JSON library keeps the last one: the first expectation would vanish unseen.
  const auto sut =
      parse_manifest(R"({"tensors":{"w":")" + kSha + R"(","w":")" + kOtherSha + R"("}})", "m.json");

  ASSERT_FALSE(sut);
  EXPECT_TRUE(has_detail(sut.error(), "\"w\" stands there twice"));
}

TEST(ManifestFile, NothingToCheckIsRefused) {
  for (const char* json : {"{}", R"({"engine":"e","module":"m","tensors":{}})"}) {
    const auto sut = parse_manifest(json, "m.json");
    ASSERT_FALSE(sut) << json;
    EXPECT_TRUE(has_detail(sut.error(), "nothing to check"));
  }
}

TEST(ManifestFile, EngineWithASlashIsRefused) {
  const auto sut = parse_manifest(
      R"({"engine":"a/b","module":"m","tensors":{"w":")" + kSha + R"("}})", "m.json");

  ASSERT_FALSE(sut);
  EXPECT_TRUE(has_detail(sut.error(), "\"a/b\""));
}

TEST(ManifestFile, WhatIsNoJsonObjectIsRefusedWithThePlace) {
  const auto broken = parse_manifest("{\"w\": \n oops}", "m.json");
  ASSERT_FALSE(broken);
  EXPECT_NE(broken.error().message.find("m.json is not JSON"), std::string::npos);
  EXPECT_NE(broken.error().message.find("line 2"), std::string::npos);

  for (const char* json : {"", "[]", "3", "null", "\"text\"", "[[[[", "{\"a\":\"\xff\"}"}) {
    const auto sut = parse_manifest(json, "m.json");
    ASSERT_FALSE(sut) << json;
    EXPECT_EQ(sut.error().code, Errc::bad_argument);
  }
}

TEST(ManifestFile, DeepNestingIsAnErrorAndNotACrash) {
  const auto sut = parse_manifest(
      R"({"tensors":{"w":)" + std::string(200'000, '[') + std::string(200'000, ']') + "}}",
      "m.json");

  ASSERT_FALSE(sut);
  EXPECT_TRUE(has_detail(sut.error(), "tensor \"w\""));
}

TEST(ManifestFile, DigestsOfAnotherLengthAreListed) {
  const auto sut =
      parse_manifest(R"({"long":")" + kSha + R"(","short":")" + kXxh3 + R"("})", "m.json");
  ASSERT_TRUE(sut) << sut.error().to_string();

  const auto as_sglang = check_digest_lengths(*sut, DigestKind::sglang, "m.json");
  const auto as_xxh3 = check_digest_lengths(*sut, DigestKind::xxh3, "m.json");

  ASSERT_FALSE(as_sglang);
  ASSERT_EQ(as_sglang.error().details.size(), 1U);
  EXPECT_TRUE(has_detail(as_sglang.error(), "\"short\" has 32 hex digits, sglang has 64"));
  EXPECT_NE(as_sglang.error().message.find("--kind"), std::string::npos);
  ASSERT_FALSE(as_xxh3);
  EXPECT_TRUE(has_detail(as_xxh3.error(), "\"long\""));
}

TEST(ManifestFile, FileIsReadWhole) {
  std::string path = testing::TempDir() + "refitctl-manifest-XXXXXX";
  const int fd = ::mkstemp(path.data());
  ASSERT_GE(fd, 0);
  ::close(fd);
  const std::string text(300'000, 'x');
  std::ofstream(path) << text;

  const auto sut = read_manifest_text(path);

  ASSERT_TRUE(sut) << sut.error().to_string();
  EXPECT_EQ(*sut, text);
  ::unlink(path.c_str());
}

TEST(ManifestFile, PathThatIsNoFileIsABadArgument) {
  for (const char* path : {"/nonexistent/m.json", "/"}) {
    const auto sut = read_manifest_text(path);
    ASSERT_FALSE(sut);
    EXPECT_EQ(sut.error().code, Errc::bad_argument);
    EXPECT_NE(sut.error().message.find(path), std::string::npos);
  }
}

}  // namespace
}  // namespace refit::ctl
