// Exit codes, advice and the text of failures. One thread.
#include "refitctl/failure.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <nlohmann/json.hpp>

#include "support/text.hpp"

namespace refit::ctl {
namespace {

using test::contains;

Error os_error(int native) { return {Errc::os, native, "connect to /run/x.sock failed", {}}; }

TEST(Failure, ExitCodesAreThoseOfTheHelp) {
  EXPECT_EQ(static_cast<int>(exit_code_for(os_error(ENOENT), Stage::connect)), 1);
  EXPECT_EQ(static_cast<int>(exit_code_for({Errc::no_such_engine, 0, "", {}}, Stage::ask)), 1);
  EXPECT_EQ(static_cast<int>(exit_code_for({Errc::bad_argument, 0, "", {}}, Stage::manifest)), 2);
  EXPECT_EQ(static_cast<int>(exit_code_for(os_error(EACCES), Stage::connect)), 4);
  EXPECT_EQ(static_cast<int>(exit_code_for(os_error(EPERM), Stage::connect)), 4);
  EXPECT_EQ(static_cast<int>(exit_code_for({Errc::permission, 0, "", {}}, Stage::ask)), 4);
  EXPECT_EQ(static_cast<int>(exit_code_for(os_error(EACCES), Stage::manifest)), 4);
  EXPECT_EQ(static_cast<int>(exit_code_for({Errc::unsupported, 0, "", {}}, Stage::ask)), 5);
  EXPECT_EQ(static_cast<int>(exit_code_for({Errc::bad_argument, 0, "", {}}, Stage::configuration)),
            6);
}

TEST(Failure, NothingFailedIsNeverSuccess) {
  // Goal: no failure ends with status 0, whatever code a peer sent. Method: every number that fits.
  for (unsigned code = 1; code <= 0xFFFF; ++code) {
    const Error error{static_cast<Errc>(code), 0, "", {}};
    ASSERT_NE(exit_code_for(error, Stage::ask), ExitCode::ok) << code;
  }
}

TEST(Failure, MissingDaemonSaysHowToNameAnother) {
  const Failure sut = explain(os_error(ECONNREFUSED), Stage::connect, {"/run/x.sock", 10});

  EXPECT_EQ(sut.exit, ExitCode::failure);
  EXPECT_TRUE(contains(sut.advice, "--socket PATH"));
  EXPECT_TRUE(contains(sut.advice, "REFIT_SOCKET"));
}

TEST(Failure, PathThatIsNoSocketIsTheFaultOfWhoGaveIt) {
  const Error error{Errc::bad_argument, 0, "/etc/passwd is not a socket", {}};

  EXPECT_EQ(explain(error, Stage::connect, {"/etc/passwd", 10, true}).exit,
            ExitCode::bad_arguments);
  EXPECT_EQ(explain(error, Stage::connect, {"/etc/passwd", 10, false}).exit,
            ExitCode::bad_configuration);
}

TEST(Failure, DeniedSocketSaysWhereToLook) {
  const Failure sut = explain(os_error(EACCES), Stage::connect, {"/run/my socket", 10});

  EXPECT_EQ(sut.exit, ExitCode::permission);
  EXPECT_TRUE(contains(sut.advice, "`ls -l '/run/my socket'`")) << sut.advice;
}

TEST(Failure, DeadlineNamesTheTimeout) {
  const Failure sut = explain({Errc::deadline, 0, "", {}}, Stage::ask, {"/run/x.sock", 2.5});

  EXPECT_TRUE(contains(sut.advice, "2.5 s"));
  EXPECT_TRUE(contains(sut.advice, "--timeout"));
}

TEST(Failure, TextHasEveryDetailAndNoControlCharacter) {
  const Failure sut{ExitCode::failure,
                    {Errc::manifest_mismatch, 0, "does not fit\x1b[2J", {"tensor \"a\nb\"", "two"}},
                    "do this"};

  EXPECT_EQ(failure_text(sut, Style{}),
            "refitctl: error: does not fit\\x1b[2J [manifest_mismatch]\n"
            "  tensor \"a\\nb\"\n"
            "  two\n"
            "  do this\n");
}

TEST(Failure, JsonHasEveryKeyAndTakesAnyBytes) {
  const Failure sut = explain({Errc::os, ENOENT, "bytes \xff", {"d"}}, Stage::connect, {"/s", 1});

  const nlohmann::json json = nlohmann::json::parse(failure_json(sut)).at("error");

  EXPECT_EQ(json.at("code"), "os");
  EXPECT_EQ(json.at("native"), ENOENT);
  EXPECT_EQ(json.at("exit"), 1);
  EXPECT_EQ(json.at("message"), "bytes \ufffd");
  EXPECT_EQ(json.at("details"), nlohmann::json({"d"}));
  EXPECT_TRUE(contains(json.at("advice"), "REFIT_SOCKET"));
}

}  // namespace
}  // namespace refit::ctl
