// What people and programs are shown of the daemon's answers. One thread.
#include "refitctl/format/views.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <nlohmann/json.hpp>

#include "refitctl/format/json.hpp"
#include "support/text.hpp"

namespace refit::ctl {
namespace {

using test::contains;

using Json = nlohmann::json;

Digest sha(char digit) { return *Digest::from_hex(std::string(64, digit)); }

DaemonStatus sample_status() {
  DaemonStatus status;
  status.version = "0.1.0";
  status.copy_kernel = "avx512-nt";
  status.socket = "/run/refitd/refitd.sock";
  status.pid = 4711;
  status.copy_threads = 2;
  status.uptime_us = 187'000'000;
  status.refits = 12;
  status.waiting = Waiting::adaptive;
  SessionStatus session;
  session.id = 3;
  session.role = Role::engine;
  session.name = "engine0";
  session.uid = 1000;
  session.pid = 99;
  session.modules = 2;
  session.regions = 4;
  session.registered_bytes = 3U << 20U;
  session.in_flight = 1;
  session.age_us = 65'000'000;
  status.sessions = {session};
  ModuleStatus refitted;
  refitted.engine = "engine0";
  refitted.module = "transformer";
  refitted.state = ModuleState::committed;
  refitted.version = 12;
  refitted.proven_version = 11;
  refitted.source = "trainer/transformer";
  refitted.transaction = {0x0123456789abcdefULL, 0xfedcba9876543210ULL};
  refitted.tensors = 825;
  refitted.bytes = 2'840'000'000;
  refitted.refits = 12;
  refitted.last_bytes = 2'840'000'000;
  refitted.last = {1.25F, 30.5F, 284'000.0F, 0.0F, 284'100.0F};
  refitted.populated = true;
  ModuleStatus fresh;
  fresh.engine = "engine0";
  fresh.module = "vae";
  fresh.state = ModuleState::initial;
  fresh.tensors = 2;
  fresh.bytes = 4096;
  status.modules = {refitted, fresh};
  return status;
}

CheckResult sample_check() {
  CheckResult result;
  result.target = {"engine0", "transformer"};
  result.expected = 2;
  result.report.verified = 2;
  result.report.state = ModuleState::committed;
  result.report.version = 12;
  result.report.proven_version = 12;
  result.tensors_live = 2;
  result.elapsed_us = 1500;
  return result;
}

TEST(Views, SessionsShowWhatEveryOneHolds) {
  const auto user_label = [](std::uint32_t uid) { return "alice (" + std::to_string(uid) + ")"; };

  EXPECT_EQ(sessions_text(sample_status(), user_label, Style{}),
            "ID  ROLE    NAME     USER          PID  MODULES  REGIONS      SIZE  IN FLIGHT  AGE\n"
            " 3  engine  engine0  alice (1000)   99        2        4  3.00 MiB          1"
            "  1 min 05 s\n");
}

// Goal: what the daemon does not tell of another user's engine is not shown as a zero.
TEST(Views, WhatIsAnotherUsersIsLeftOpen) {
  DaemonStatus status = sample_status();
  status.sessions[0].restricted = true;
  status.modules = {status.modules[1]};
  status.modules[0].restricted = true;

  EXPECT_EQ(sessions_text(
                status, [](std::uint32_t) { return "bob"; }, Style{}),
            "ID  ROLE    NAME     USER  PID  MODULES  REGIONS  SIZE  IN FLIGHT  AGE\n"
            " 3  engine  engine0  bob     -        -        -     -          -  -\n");
  EXPECT_EQ(modules_text(status, Style{}),
            "MODULE       STATE    VERSION  TENSORS  SIZE  REFITS  SOURCE  TRANSACTION\n"
            "engine0/vae  initial        0        -     -       -  -       -\n");
  EXPECT_EQ(Json::parse(status_json(status)).at("sessions").at(0).at("restricted"), true);
  EXPECT_EQ(Json::parse(status_json(status)).at("modules").at(0).at("restricted"), true);
}

TEST(Views, LinesOfAWatchHoldWhatChanges) {
  EXPECT_EQ(status_lines(sample_status(), "2026-01-02T03:04:05Z"),
            "2026-01-02T03:04:05Z refitd pid=4711 refits=12 sessions=1 modules=2 draining=no\n"
            "2026-01-02T03:04:05Z engine0/transformer state=committed version=12 refits=12"
            " last_total_us=284100\n"
            "2026-01-02T03:04:05Z engine0/vae state=initial version=0 refits=0\n");
}

TEST(Views, JsonOfATurnIsOneLine) {
  const std::string answer = status_json_line(sample_status(), "now", "");
  const std::string silence =
      silence_json_line(Error{Errc::daemon_gone, 0, "gone", {}}, "now", "looking");

  EXPECT_EQ(answer.find('\n'), answer.size() - 1);
  EXPECT_EQ(Json::parse(answer).at("daemon"),
            Json::parse(status_json(sample_status())).at("daemon"));
  EXPECT_TRUE(Json::parse(answer).at("note").is_null());
  EXPECT_EQ(Json::parse(silence),
            (Json{{"time", "now"},
                  {"note", "looking"},
                  {"error", {{"code", "daemon_gone"}, {"message", "gone"}}}}));
}

TEST(Views, StatusShowsDaemonModulesPhasesAndSessions) {
  EXPECT_EQ(status_text(sample_status(), Style{}),
            "refitd 0.1.0  pid 4711  up 3 min 07 s  serving\n"
            "  socket   /run/refitd/refitd.sock\n"
            "  waiting  adaptive\n"
            "  copy     avx512-nt, 2 threads\n"
            "  refits   12\n"
            "\n"
            "Modules\n"
            "  MODULE               STATE      VERSION  PROOF             SOURCE"
            "               TRANSACTION  REFITS  TENSORS      SIZE  PAGES\n"
            "  engine0/transformer  committed       12  1 version behind  trainer/transformer"
            "  01234567         12      825  2.64 GiB  populated\n"
            "  engine0/vae          initial          0  none              -"
            "                    -                 0        2  4.00 KiB  pending\n"
            "\n"
            "Last refit, in microseconds\n"
            "  MODULE               WAIT  GATE    COPY  CHECK   TOTAL      SIZE  COPY RATE\n"
            "  engine0/transformer   1.2  30.5  284000    0.0  284100  2.64 GiB  10.0 GB/s\n"
            "\n"
            "Sessions\n"
            "  ID  ROLE    NAME      UID  PID  MODULES\n"
            "   3  engine  engine0  1000   99        2\n");
}

TEST(Views, IdleDaemonSaysThatThereIsNothing) {
  DaemonStatus status;
  status.draining = true;

  const std::string text = status_text(status, Style{});

  EXPECT_TRUE(contains(text, "draining"));
  EXPECT_TRUE(contains(text, "no engine has registered one"));
  EXPECT_FALSE(contains(text, "Last refit"));
  EXPECT_TRUE(contains(modules_text(status, Style{}), "No module is registered"));
}

TEST(Views, OddNamesCannotReachTheTerminal) {
  // Goal: no byte that a peer chose acts on the terminal, wherever it is shown. Method: every name
  // holds an escape sequence, every view is searched for it.
  const std::string evil = "x\x1b[2J\n\x9b";
  DaemonStatus status = sample_status();
  status.version = status.copy_kernel = status.socket = evil;
  status.sessions[0].name = evil;
  status.modules[0].engine = status.modules[0].module = status.modules[0].source = evil;
  const Target target{evil, evil};
  TensorSpec tensor;
  tensor.name = evil;
  DigestReport digests;
  digests.tensors = {{evil, sha('a')}};
  CheckResult check = sample_check();
  check.target = target;
  check.report.missing = check.report.mismatched = {evil};

  for (const std::string& text :
       {status_text(status, Style{}), modules_text(status, Style{}),
        tensors_text(target, {tensor}, Style{}),
        digest_text(target, DigestKind::raw, digests, 1, Style{}), check_text(check, Style{}),
        status_json(status), modules_json(status), tensors_json(target, {tensor}),
        check_json(check)}) {
    EXPECT_TRUE(contains(text, "[2J")) << text;
    EXPECT_FALSE(contains(text, "\x1b")) << text;
    EXPECT_FALSE(contains(text, "\x9b")) << text;
  }
}

TEST(Views, PoisonedModuleIsShownAsSuch) {
  DaemonStatus status = sample_status();
  status.modules[0].state = ModuleState::poisoned;

  EXPECT_TRUE(contains(status_text(status, Style{}), "poisoned"));
  EXPECT_TRUE(contains(status_text(status, Style{true}), "\x1b[1;31mpoisoned\x1b[0m"));
  EXPECT_TRUE(contains(modules_text(status, Style{}), "poisoned"));
  EXPECT_EQ(Json::parse(modules_json(status))["modules"][0]["state"], "poisoned");
}

TEST(Views, StatusJsonHasItsKeys) {
  const Json root = Json::parse(status_json(sample_status()));

  const Json daemon = {{"version", "0.1.0"},
                       {"pid", 4711},
                       {"uptime_us", 187'000'000},
                       {"socket", "/run/refitd/refitd.sock"},
                       {"waiting", "adaptive"},
                       {"copy_kernel", "avx512-nt"},
                       {"copy_threads", 2},
                       {"draining", false},
                       {"refits", 12}};
  EXPECT_EQ(root.at("daemon"), daemon);
  const Json session = {{"id", 3},
                        {"role", "engine"},
                        {"name", "engine0"},
                        {"uid", 1000},
                        {"pid", 99},
                        {"modules", 2},
                        {"asleep", false},
                        {"regions", 4},
                        {"registered_bytes", 3 << 20},
                        {"in_flight", 1},
                        {"age_us", 65'000'000},
                        {"restricted", false}};
  EXPECT_EQ(root.at("sessions").at(0), session);
  EXPECT_EQ(Json::parse(sessions_json(sample_status())).at("sessions"), root.at("sessions"));
  const Json refitted = {{"engine", "engine0"},
                         {"module", "transformer"},
                         {"state", "committed"},
                         {"version", 12},
                         {"proven_version", 11},
                         {"source", "trainer/transformer"},
                         {"transaction", "0123456789abcdeffedcba9876543210"},
                         {"tensors", 825},
                         {"bytes", 2'840'000'000},
                         {"refits", 12},
                         {"populated", true},
                         {"asleep", false},
                         {"restricted", false},
                         {"last_refit",
                          {{"wait_us", 1.25},
                           {"gate_us", 30.5},
                           {"copy_us", 284'000.0},
                           {"check_us", 0.0},
                           {"total_us", 284'100.0},
                           {"bytes", 2'840'000'000}}}};
  EXPECT_EQ(root.at("modules").at(0), refitted);
  EXPECT_TRUE(root.at("modules").at(1).at("last_refit").is_null());
  EXPECT_TRUE(root.at("modules").at(1).at("source").is_null());
  EXPECT_TRUE(root.at("modules").at(1).at("proven_version").is_null());
  EXPECT_TRUE(root.at("modules").at(1).at("transaction").is_null());
  EXPECT_EQ(Json::parse(modules_json(sample_status())).at("modules"), root.at("modules"));
}

TEST(Views, PhasesThatAreNoNumbersStayJson) {
  DaemonStatus status = sample_status();
  status.modules[0].last.copy_us = std::numeric_limits<float>::quiet_NaN();

  const Json root = Json::parse(status_json(status));

  EXPECT_TRUE(root["modules"][0]["last_refit"]["copy_us"].is_null());
}

TEST(Views, TensorsShowWhereTheirBytesAre) {
  TensorSpec whole;
  whole.name = "proj.weight";
  whole.dtype = DType::bfloat16;
  whole.shape = {128, 64};
  whole.strides = {64, 1};
  whole.offset_bytes = 4096;
  TensorSpec scalar;
  scalar.name = "step";
  scalar.dtype = DType::int64;

  EXPECT_EQ(tensors_text({"e0", "dit"}, {whole, scalar}, Style{}),
            "e0/dit  2 tensors, 16.0 KiB\n"
            "TENSOR       DTYPE           SHAPE      STRIDES  REGION  OFFSET      SIZE\n"
            "proj.weight  torch.bfloat16  (128, 64)  (64, 1)       0    4096  16.0 KiB\n"
            "step         torch.int64     ()         -             0       0       8 B\n");

  const Json root = Json::parse(tensors_json({"e0", "dit"}, {whole, scalar}));
  EXPECT_EQ(root.at("engine"), "e0");
  EXPECT_EQ(root.at("module"), "dit");
  const Json expected = {{"name", "proj.weight"},
                         {"dtype", "torch.bfloat16"},
                         {"shape", {128, 64}},
                         {"strides", {64, 1}},
                         {"region", 0},
                         {"offset_bytes", 4096},
                         {"bytes", 16384},
                         {"global_shape", Json::array()},
                         {"box_offset", Json::array()}};
  EXPECT_EQ(root.at("tensors").at(0), expected);
  EXPECT_EQ(root.at("tensors").at(1).at("shape"), Json::array());
}

TEST(Views, PartOfALargerTensorShowsWhichPart) {
  TensorSpec shard;
  shard.name = "w";
  shard.shape = {4, 8};
  shard.global_shape = {16, 8};
  shard.box_offset = {4, 0};

  const std::string text = tensors_text({"e0", "dit"}, {shard}, Style{});

  EXPECT_TRUE(contains(text, "OF SHAPE"));
  EXPECT_TRUE(contains(text, "(16, 8)   (4, 0)")) << text;
}

TEST(Views, TensorBytesNeverWrap) {
  constexpr std::uint64_t kMax = std::numeric_limits<std::uint64_t>::max();
  TensorSpec tensor;
  tensor.shape = {1ULL << 40U, 1ULL << 40U};
  EXPECT_EQ(tensor_bytes(tensor), kMax);
  tensor.shape = {1ULL << 40U, 1ULL << 40U, 0};
  EXPECT_EQ(tensor_bytes(tensor), 0U);
  tensor.shape = {};
  EXPECT_EQ(tensor_bytes(tensor), 4U);
}

TEST(Views, DigestsAreListedBesideTheirNames) {
  DigestReport report;
  report.tensors = {{"a", sha('a')}, {"b", sha('b')}};
  report.state = ModuleState::committed;
  report.version = 3;

  EXPECT_EQ(digest_text({"e0", "dit"}, DigestKind::sglang, report, 12'300, Style{}),
            "e0/dit  version 3, committed  sglang of 2 tensors in 12.3 ms\n"
            "DIGEST" +
                std::string(60, ' ') + "TENSOR\n" + std::string(64, 'a') + "  a\n" +
                std::string(64, 'b') + "  b\n");

  report.module = sha('c');
  EXPECT_TRUE(contains(digest_text({"e0", "dit"}, DigestKind::sglang, report, 1, Style{}),
                       "Module digest  " + std::string(64, 'c') + "\n"));
}

TEST(Views, DigestsOfAMixAreCalledSo) {
  DigestReport report;
  report.tensors = {{"a", sha('a')}};
  report.state = ModuleState::poisoned;

  EXPECT_TRUE(contains(digest_text({"e0", "dit"}, DigestKind::sglang, report, 1, Style{}),
                       "the module is not whole"));
}

TEST(Views, NameThatJsonCannotCarryIsRefusedAndNotReplaced) {
  DigestReport report;
  report.tensors = {{"fine", sha('a')}, {"odd\xff", sha('b')}};

  const auto sut = digest_json({"e0", "dit"}, DigestKind::sglang, report);

  ASSERT_FALSE(sut);
  ASSERT_EQ(sut.error().details.size(), 1U);
  EXPECT_TRUE(contains(sut.error().details[0], "odd\xff"));
}

TEST(Views, CheckThatHoldsSaysSo) {
  const CheckResult sut = sample_check();

  EXPECT_TRUE(sut.ok());
  EXPECT_EQ(
      check_text(sut, Style{}),
      "engine0/transformer  version 12, committed  ok\n"
      "2 of 2 tensors verified by sglang in 1.50 ms; proof of the whole module: up to date\n");
  const Json expected = {{"engine", "engine0"},
                         {"module", "transformer"},
                         {"kind", "sglang"},
                         {"ok", true},
                         {"expected", 2},
                         {"equal", 2},
                         {"missing", Json::array()},
                         {"mismatched", Json::array()},
                         {"module_equal", nullptr},
                         {"tensors_live", 2},
                         {"state", "committed"},
                         {"version", 12},
                         {"proven_version", 12}};
  EXPECT_EQ(Json::parse(check_json(sut)), expected);
}

TEST(Views, CheckListsEveryNameThatFailed) {
  CheckResult sut = sample_check();
  sut.report.verified = 0;
  sut.report.mismatched = {"a"};
  sut.report.missing = {"b"};
  sut.report.proven_version.reset();

  EXPECT_FALSE(sut.ok());
  EXPECT_EQ(check_text(sut, Style{}),
            "engine0/transformer  version 12, committed  FAILED\n"
            "0 of 2 tensors verified by sglang in 1.50 ms; proof of the whole module: none\n"
            "mismatched 1\n"
            "  a\n"
            "missing 1\n"
            "  b\n");
  EXPECT_EQ(Json::parse(check_json(sut)).at("ok"), false);
  EXPECT_EQ(Json::parse(check_json(sut)).at("mismatched"), Json({"a"}));
  EXPECT_EQ(Json::parse(check_json(sut)).at("missing"), Json({"b"}));
}

TEST(Views, CheckOfAModuleThatIsNotWholeFailsWhateverItsBytes) {
  for (const ModuleState state : {ModuleState::poisoned, ModuleState::writing, ModuleState::none}) {
    CheckResult sut = sample_check();
    sut.report.state = state;
    EXPECT_FALSE(sut.ok());
    EXPECT_TRUE(contains(check_text(sut, Style{}), "FAILED"));
  }
}

TEST(Views, CheckThatVerifiedLessThanExpectedFails) {
  // A daemon that leaves names out of every list must not pass.
  CheckResult sut = sample_check();
  sut.report.verified = 1;

  EXPECT_FALSE(sut.ok());
}

TEST(Views, CheckOfTheModulesOwnDigestCounts) {
  CheckResult sut = sample_check();
  sut.module_equal = true;
  EXPECT_TRUE(sut.ok());
  sut.module_equal = false;
  EXPECT_FALSE(sut.ok());
  EXPECT_TRUE(contains(check_text(sut, Style{}), "module's digest differs"));
  EXPECT_EQ(Json::parse(check_json(sut)).at("module_equal"), false);
}

TEST(Views, CheckSaysWhatItDidNotLookAt) {
  CheckResult sut = sample_check();
  sut.tensors_live = 825;

  EXPECT_TRUE(contains(check_text(sut, Style{}), "823 tensors of the module not in the manifest"));
}

}  // namespace
}  // namespace refit::ctl
