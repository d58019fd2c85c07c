// Files that are replaced whole. One thread.
#include "refitctl/textfile.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>

namespace refit::ctl {
namespace {

class TextfileTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string path = "/tmp/refitctl-textfile-XXXXXX";
    ASSERT_NE(::mkdtemp(path.data()), nullptr);
    folder_ = path;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static std::string read(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }
  [[nodiscard]] std::size_t files() const {
    std::size_t count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_)) ++count;
    return count;
  }

  std::string folder_;
};

TEST_F(TextfileTest, TextReplacesTheOldOneWithItsMode) {
  const std::string path = folder_ + "/refit.prom";
  const mode_t mask = ::umask(0077);

  ASSERT_TRUE(replace_file(path, "old, and longer\n"));
  ASSERT_TRUE(replace_file(path, "new\n"));
  ::umask(mask);

  EXPECT_EQ(read(path), "new\n");
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777U, 0644U);
  EXPECT_EQ(files(), 1U);
}

TEST_F(TextfileTest, ReaderOfTheOldTextKeepsAllOfIt) {
  // Goal: no moment shows half of a text. Method: whoever opened the old file before the change
  // reads the old text after it, because another file took the name.
  const std::string path = folder_ + "/refit.prom";
  ASSERT_TRUE(replace_file(path, "old\n"));
  std::ifstream reader(path);

  ASSERT_TRUE(replace_file(path, "new\n"));

  std::ostringstream text;
  text << reader.rdbuf();
  EXPECT_EQ(text.str(), "old\n");
}

TEST_F(TextfileTest, FailureLeavesTheOldTextAndNothingElse) {
  // A folder cannot be replaced by a file.
  const std::string path = folder_ + "/refit.prom";
  ASSERT_EQ(::mkdir(path.c_str(), 0755), 0);

  const auto sut = replace_file(path, "new\n");

  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().native, EISDIR);
  EXPECT_NE(sut.error().message.find(path), std::string::npos);
  EXPECT_EQ(files(), 1U);
}

TEST_F(TextfileTest, MissingFolderIsNamed) {
  const auto sut = replace_file(folder_ + "/nowhere/refit.prom", "new\n");

  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().native, ENOENT);
  EXPECT_NE(sut.error().message.find("nowhere"), std::string::npos);
}

TEST_F(TextfileTest, PathWithoutANameIsRefused) {
  EXPECT_EQ(replace_file(folder_ + "/", "new\n").error().code, Errc::bad_argument);
}

}  // namespace
}  // namespace refit::ctl
