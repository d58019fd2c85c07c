// What the operator reads: lines with a priority where there is no journal, a catalog entry for
// each event.

#include "log.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <set>

namespace refit::daemon {
namespace {

class Log : public ::testing::Test {
 protected:
  void TearDown() override { ::unsetenv("JOURNAL_STREAM"); }

  static std::string line(LogEvent event, const std::string& message) {
    ::testing::internal::CaptureStderr();
    log(event, message, {.client_pid = 7, .errc = Errc::quota});
    return ::testing::internal::GetCapturedStderr();
  }
};

TEST_F(Log, LineCarriesThePriorityWhereNobodyReadsFields) {
  ::unsetenv("JOURNAL_STREAM");
  EXPECT_EQ(line(LogEvent::client_refused, "no room"), "<4>refitd: no room\n");
  EXPECT_EQ(line(LogEvent::started, "serving"), "<6>refitd: serving\n");
  EXPECT_EQ(line(LogEvent::failed, "no socket"), "<3>refitd: no socket\n");
}

// A daemon that systemd started, but whose stderr was redirected since, speaks to whoever reads it.
TEST_F(Log, JournalOfAnotherStreamIsNotOurs) {
  for (const char* stream : {"1:1", "", "no numbers"}) {
    ::setenv("JOURNAL_STREAM", stream, 1);
    EXPECT_EQ(line(LogEvent::started, "serving"), "<6>refitd: serving\n") << stream;
  }
}

// Goal: an operator finds every event explained, and no explanation of what does not exist.
TEST(LogCatalog, HasEachEventOnce) {
  std::multiset<std::string> expected{
#define REFIT_X(name, priority, id) id,
      REFIT_LOG_EVENTS(REFIT_X)
#undef REFIT_X
  };
  std::multiset<std::string> found;
  std::ifstream catalog(REFIT_SOURCE_DIR "/systemd/refitd.catalog");
  for (std::string line; std::getline(catalog, line);) {
    if (line.rfind("-- ", 0) == 0) found.insert(line.substr(3));
  }
  EXPECT_EQ(found, expected);
  for (const std::string& id : expected) EXPECT_EQ(expected.count(id), 1U) << id;
}

}  // namespace
}  // namespace refit::daemon
