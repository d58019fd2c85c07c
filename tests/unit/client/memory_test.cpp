// SharedMemory: how large it is, where it lies, that its size is sealed, and what cannot be had.

#include "refit/memory.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <limits>

namespace refit {
namespace {

constexpr std::size_t kHuge = std::size_t{2} << 20;

std::size_t page() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

TEST(SharedMemoryTest, IsOfWholePagesAndFromTwoMebibytesOnOfWholeHugePages) {
  const struct {
    std::size_t asked;
    std::size_t given;
  } kCases[] = {{1, page()},        {page(), page()}, {page() + 1, 2 * page()},
                {kHuge - 1, kHuge}, {kHuge, kHuge},   {kHuge + 1, 2 * kHuge}};
  for (const auto& [asked, given] : kCases) {
    const auto memory = SharedMemory::allocate(asked, "weights");
    ASSERT_TRUE(memory) << asked << ": " << memory.error().to_string();
    EXPECT_EQ((*memory)->bytes(), given) << asked;
    struct stat file {};
    ASSERT_EQ(::fstat((*memory)->fd(), &file), 0);
    EXPECT_EQ(static_cast<std::size_t>(file.st_size), given) << asked;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>((*memory)->data()) % kHuge, 0U) << asked;
  }
}

TEST(SharedMemoryTest, KeepsItsSizeWhoeverHoldsIt) {
  const auto memory = SharedMemory::allocate(page(), "weights");
  ASSERT_TRUE(memory) << memory.error().to_string();
  EXPECT_EQ(::fcntl((*memory)->fd(), F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
  EXPECT_NE(::ftruncate((*memory)->fd(), 0), 0);
}

TEST(SharedMemoryTest, OfNoBytesOrMoreThanThereAreIsRefusedByName) {
  for (const std::size_t asked : {std::size_t{0}, std::numeric_limits<std::size_t>::max()}) {
    const auto memory = SharedMemory::allocate(asked, "weights");
    ASSERT_FALSE(memory) << asked;
    EXPECT_EQ(memory.error().code, Errc::bad_argument) << asked;
    EXPECT_NE(memory.error().message.find("weights"), std::string::npos)
        << memory.error().to_string();
  }
}

}  // namespace
}  // namespace refit
