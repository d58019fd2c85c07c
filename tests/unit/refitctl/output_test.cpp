// Writing text to file descriptors that may be gone, slow or full. One thread and one reader.
#include "refitctl/output.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>
#include <string>
#include <thread>

namespace refit::ctl {
namespace {

class OutputTest : public testing::Test {
 protected:
  void SetUp() override {
    std::signal(SIGPIPE, SIG_IGN);
    ASSERT_EQ(::pipe2(fds_.data(), O_CLOEXEC), 0);
  }
  void TearDown() override {
    close_end(0);
    close_end(1);
    std::signal(SIGPIPE, SIG_DFL);
  }
  void close_end(std::size_t end) {
    if (fds_[end] >= 0) ::close(fds_[end]);
    fds_[end] = -1;
  }

  std::array<int, 2> fds_{-1, -1};
};

TEST_F(OutputTest, TextLargerThanANonBlockingPipeArrivesWhole) {
  ASSERT_EQ(::fcntl(fds_[1], F_SETFL, O_NONBLOCK), 0);
  std::string text;
  for (int i = 0; i < 100'000; ++i) text += std::to_string(i) + "\n";
  std::string read_back;
  std::thread reader([&] {
    std::array<char, 4096> buffer{};
    for (ssize_t count = 0; (count = ::read(fds_[0], buffer.data(), buffer.size())) > 0;) {
      read_back.append(buffer.data(), static_cast<std::size_t>(count));
    }
  });

  const auto sut = write_all(fds_[1], text);
  close_end(1);
  reader.join();

  EXPECT_TRUE(sut);
  EXPECT_EQ(read_back, text);
}

TEST_F(OutputTest, ReaderThatWentAwayIsNoError) {
  close_end(0);

  EXPECT_TRUE(write_all(fds_[1], "text"));
}

TEST_F(OutputTest, FullDeviceIsAnError) {
  const int full = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(full, 0);

  const auto sut = write_all(full, "text");
  ::close(full);

  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::os);
  EXPECT_EQ(sut.error().native, ENOSPC);
}

}  // namespace
}  // namespace refit::ctl
