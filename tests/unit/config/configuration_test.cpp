// Files and settings: every option of the table through the file, every error at its place, and
// what a reload takes over.

#include "config/configuration.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace refit::daemon {
namespace {

Configuration parsed(const std::string& text) {
  Configuration configuration;
  const auto outcome = apply_text(text, configuration);
  EXPECT_TRUE(outcome) << outcome.error().to_string() << "\n" << text;
  return configuration;
}

std::vector<std::string> errors_of(const std::string& text) {
  Configuration configuration;
  configuration.file = "F";
  const auto outcome = apply_text(text, configuration);
  if (outcome) return {};
  EXPECT_EQ(outcome.error().code, Errc::bad_configuration);
  return outcome.error().details;
}

/// "limits.x" as a file has it.
std::string line_for(const Option& option, const std::string& value) {
  return std::string(option.key) + " = " + value + "\n";
}

void expect_has(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
}

TEST(OptionTable, KeysAreUniqueAndDefaultsLieInTheirBounds) {
  std::vector<std::string_view> keys;
  for (const Option& option : options()) {
    keys.push_back(option.key);
    EXPECT_GE(option.fallback, option.min) << option.key;
    EXPECT_LE(option.fallback, option.max) << option.key;
    EXPECT_EQ(option.get(Settings{}), option.fallback) << option.key;
    EXPECT_FALSE(option.help.empty()) << option.key;
  }
  std::sort(keys.begin(), keys.end());
  EXPECT_EQ(std::adjacent_find(keys.begin(), keys.end()), keys.end());
}

// Goal: no option of the table is forgotten by the file, and none lands in another's field.
// Method: each option alone, at both of its bounds; all others must keep their defaults.
TEST(ConfigurationFile, TakesEveryOptionAtItsBounds) {
  for (const Option& option : options()) {
    for (const std::uint64_t value : {option.min, option.max}) {
      const Configuration sut = parsed(line_for(option, value_text(option, value)));
      for (const Option& other : options()) {
        EXPECT_EQ(other.get(sut.settings), &other == &option ? value : other.fallback)
            << other.key << " after " << option.key;
      }
    }
  }
}

TEST(ConfigurationFile, RefusesEveryOptionOutsideItsBoundsAndOfAnotherType) {
  for (const Option& option : options()) {
    std::vector<std::string> wrong{"[1]", "1.5", "2026-01-01", "{}", "\"no\"", "-1"};
    if (option.type == OptionType::integer || option.type == OptionType::bytes) {
      wrong.push_back(std::to_string(option.max + 1));
      if (option.min > 0) wrong.push_back(std::to_string(option.min - 1));
      wrong.emplace_back("true");
      wrong.emplace_back("9223372036854775807");
    }
    for (const std::string& value : wrong) {
      const auto errors = errors_of(line_for(option, value));
      ASSERT_EQ(errors.size(), 1U) << option.key << " = " << value;
      expect_has(errors.front(), "F:1:");
      expect_has(errors.front(), std::string(option.key) + " is " + allowed_text(option));
    }
  }
}

TEST(ConfigurationFile, TakesBytesAsNumberAndAsText) {
  for (const char* text : {"1099511627776", "\"1 TiB\"", "\"1024GiB\"", "\"1099511627776\""}) {
    const Configuration sut =
        parsed(std::string("limits.registered_bytes_per_uid = ") + text + "\n");
    EXPECT_EQ(sut.settings.limits.registered_bytes_per_uid, std::uint64_t{1} << 40) << text;
  }
  EXPECT_EQ(errors_of("limits.registered_bytes_per_uid = \"99999999999999 TiB\"").size(), 1U);
  EXPECT_EQ(errors_of("limits.registered_bytes_per_uid = \"1 TB\"").size(), 1U);
}

// Goal: one look at the message is enough to mend the whole file.
TEST(ConfigurationFile, ListsAllErrorsInTheOrderOfTheFile) {
  const auto errors = errors_of(
      "waiting = \"sometimes\"\n"
      "copy_thread = 3\n"
      "\n"
      "[limits]\n"
      "sessions_per_uid = 0\n"
      "sesions_per_uid = 5\n"
      "[nonsense]\n"
      "[[engine]]\n"
      "allow_users = [\"no-such-user-here\", 7]\n"
      "alow_uids = [1]\n");
  ASSERT_EQ(errors.size(), 8U) << ::testing::PrintToString(errors);
  expect_has(errors[0], "F:1:11: waiting is \"off\", \"adaptive\" or \"always\"");
  expect_has(errors[1], "F:2:1: unknown key 'copy_thread'; did you mean copy_threads?");
  expect_has(errors[2], "F:5:20: limits.sessions_per_uid is an integer from 1 to 4096, and not 0");
  expect_has(errors[3],
             "F:6:1: unknown key 'limits.sesions_per_uid'; did you mean limits.sessions_per_uid?");
  expect_has(errors[4], "F:7:2: unknown key 'nonsense'; known keys: ");
  expect_has(errors[5], "F:9:16: engine.allow_users: there is no user 'no-such-user-here'");
  expect_has(errors[6], "F:9:37: engine.allow_users takes names of users, and not 7");
  expect_has(errors[7], "F:10:1: unknown key 'alow_uids'; did you mean allow_uids?");
}

TEST(ConfigurationFile, SyntaxErrorsNameTheirPlace) {
  for (const char* text :
       {"a = \n", "[limits\n", "waiting = \"off\"\nwaiting = \"off\"\n", "\xff\xfe = 1\n"}) {
    const auto errors = errors_of(text);
    ASSERT_EQ(errors.size(), 1U) << text;
    expect_has(errors.front(), "F:");
  }
}

TEST(ConfigurationFile, ReadsRulesAndLooksNamesUp) {
  const Configuration sut = parsed(
      "[[engine]]\n"
      "name = \"flux*\"\n"
      "owner = \"root\"\n"
      "allow_uids = [1001, 1000, 1001]\n"
      "allow_users = [\"root\"]\n"
      "allow_gids = [7]\n"
      "allow_groups = [\"root\"]\n"
      "[[engine]]\n"
      "name = \"wan\"\n"
      "owner = 1002\n");
  ASSERT_EQ(sut.settings.engines.size(), 2U);
  EXPECT_EQ(sut.settings.engines[0], (EngineRule{"flux*", uid_t{0}, {0, 1000, 1001}, {0, 7}}));
  EXPECT_EQ(sut.settings.engines[1], (EngineRule{"wan", uid_t{1002}, {}, {}}));
  expect_has(sut.rule_origins[1], ":8");
}

TEST(ConfigurationFile, RefusesRulesThatAreNone) {
  for (const char* text :
       {"engine = 1", "engine = [1]", "[engine]\nname = \"x\"", "[[engine]]\nowner = 0",
        "[[engine]]\nname = \"\"", "[[engine]]\nname = \"x\"\nowner = -1",
        "[[engine]]\nname = \"x\"\nallow_uids = 7",
        "[[engine]]\nname = \"x\"\nallow_uids = [4294967295]",
        "[[engine]]\nname = \"x\"\nallow_groups = [\"no-such-group-here\"]", "limits = 3"}) {
    EXPECT_EQ(errors_of(text).size(), 1U) << text;
  }
}

// Goal: what --print-config shows is the configuration. Method: print an odd one and read it again.
TEST(PrintedConfiguration, IsAFileThatGivesTheSame) {
  Configuration odd = parsed(
      "waiting = \"off\"\nverbose = true\ncopy_threads = 3\n"
      "[limits]\nregistered_bytes_per_uid = 4097\nsessions_per_uid = 9\n"
      "[[engine]]\nname = \"a\\\"b\\\\*\\u0007\"\nallow_uids = [5, 6]\n"
      "[[engine]]\nname = \"b\"\nowner = 3\nallow_gids = [5]\n");
  const Configuration sut = parsed(print(odd));
  for (const Option& option : options())
    EXPECT_EQ(option.get(sut.settings), option.get(odd.settings)) << option.key;
  EXPECT_EQ(sut.settings.engines, odd.settings.engines);
  expect_has(print(odd), "# " + odd.file + ":3");
  expect_has(print(odd), "# built in");
}

TEST(Reload, TakesLiveKeysAndNamesThoseThatNeedARestart) {
  Configuration running = parsed("");
  Configuration loaded = parsed(
      "waiting = \"off\"\ncopy_threads = 3\nverbose = true\n[limits]\nsessions_per_uid = 9\n"
      "[[engine]]\nname = \"x\"\n");
  const Changes sut = take_over(running, loaded);
  EXPECT_EQ(sut.changed,
            (std::vector<std::string>{"verbose", "limits.sessions_per_uid", "engine"}));
  EXPECT_EQ(sut.needs_restart, (std::vector<std::string>{"waiting", "copy_threads"}));
  EXPECT_EQ(running.settings.waiting, Waiting::adaptive);
  EXPECT_EQ(running.settings.copy_threads, 0U);
  EXPECT_TRUE(running.settings.verbose);
  EXPECT_EQ(running.settings.limits.sessions_per_uid, 9U);
  EXPECT_EQ(running.settings.engines.size(), 1U);
  // They are named as long as they differ.
  const Changes again = take_over(running, loaded);
  EXPECT_TRUE(again.changed.empty());
  EXPECT_EQ(again.needs_restart, sut.needs_restart);
}

// Goal: no text of a file crashes the parser or is taken with a value outside its bounds. Method: a
// file that uses everything, with seeded cuts, swaps and overwritten bytes; run under the
// sanitizers too.
TEST(ConfigurationFile, SpoiledFilesAreRefusedOrInBounds) {
  const std::string good =
      "waiting = \"off\"\ncopy_threads = 3 # c\n[limits]\nregistered_bytes_per_uid = \"3 GiB\"\n"
      "[[engine]]\nname = 'flux*'\nowner = \"root\"\nallow_uids = [1, 0x10, 1_000]\n"
      "allow_users = [\"root\"]\nallow_gids = [{a=1}, [2], 1.5e3, inf, 1979-05-27T07:32:00Z]\n";
  const std::string letters = "=[]{}\"'\\\n#.,-_0919aetTZ:\x80\xff\x01 ";
  std::mt19937 random(7);
  const auto pick = [&](std::size_t below) { return random() % below; };
  for (int round = 0; round < 4'000; ++round) {
    std::string text = good;
    for (std::size_t i = 1 + pick(4); i > 0 && !text.empty(); --i) {
      const std::size_t at = pick(text.size());
      switch (pick(4)) {
        case 0:
          text.erase(at, 1 + pick(20));
          break;
        case 1:
          text.insert(at, 1 + pick(40), letters[pick(letters.size())]);
          break;
        case 2:
          text[at] = letters[pick(letters.size())];
          break;
        default:
          text.insert(at, text.substr(pick(text.size()), pick(30)));
      }
    }
    Configuration sut;
    if (!apply_text(text, sut)) continue;
    for (const Option& option : options()) {
      EXPECT_GE(option.get(sut.settings), option.min) << text;
      EXPECT_LE(option.get(sut.settings), option.max) << text;
    }
  }
}

TEST(Nearest, FindsATypoAndNothingFarAway) {
  constexpr std::string_view kWords[] = {"copy_threads", "check_threads", "waiting"};
  EXPECT_EQ(nearest("wating", kWords), "waiting");
  EXPECT_EQ(nearest("copy-threads", kWords), "copy_threads");
  EXPECT_FALSE(nearest("zzz", kWords));
  EXPECT_FALSE(nearest(std::string(100'000, 'w'), kWords));
}

}  // namespace
}  // namespace refit::daemon
