// What the driver table says of a host, from none to a whole driver: each in a process of its own,
// because a process has one driver.

#include "memory/cuda/driver.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "unit/cuda/exporter.hpp"
#include "unit/fake_cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

namespace fs = std::filesystem;

struct Seen {
  DriverState state{};
  Errc code{};
  bool batch_12080 = false;
  bool batch_13000 = false;
  std::string message;
};

/// Lets another process look, with `library` as the first libcuda.so.1 in its way.
Seen look(const fs::path& library, Environment environment = {},
          const std::string& word = "state") {
  const fs::path folder = fakecuda::test::directory() + "-library";
  fs::create_directory(folder);
  fs::remove(folder / "libcuda.so.1");
  fs::create_symlink(library, folder / "libcuda.so.1");
  environment["LD_LIBRARY_PATH"] = folder;
  int ends[2] = {-1, -1};
  if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
  const pid_t pid = start_program({word}, environment, ends[1]);
  ::close(ends[1]);
  char text[1024] = {};
  std::size_t length = 0;
  while (length < sizeof text - 1) {
    const ssize_t got = ::read(ends[0], text + length, sizeof text - 1 - length);
    if (got <= 0) break;
    length += static_cast<std::size_t>(got);
  }
  ::close(ends[0]);
  int status = -1;
  ::waitpid(pid, &status, 0);
  EXPECT_EQ(status, 0);
  fs::remove_all(folder);
  int state = -1;
  int code = -1;
  int batch[2] = {};
  int used = 0;
  EXPECT_EQ(std::sscanf(text, "%d %d %d %d %n", &state, &code, &batch[0], &batch[1], &used), 4)
      << text;
  return {static_cast<DriverState>(state), static_cast<Errc>(code), batch[0] != 0, batch[1] != 0,
          text + used};
}

bool says(const Seen& seen, const char* words) {
  return seen.message.find(words) != std::string::npos;
}

// A file that is no library stands in the way of any driver that this host may have.
TEST(DriverState, NoLibraryIsUnsupported) {
  const fs::path none = fakecuda::test::directory() + "/no-library";
  std::ofstream(none) << "not a library";
  const Seen seen = look(none);
  EXPECT_EQ(seen.state, DriverState::no_library);
  EXPECT_EQ(seen.code, Errc::unsupported);
  EXPECT_TRUE(says(seen, "no CUDA driver on this host")) << seen.message;
}

// Drivers are loaded and devices appear after a daemon has started.
TEST(DriverState, WhatMayPassIsLookedAtAgain) {
  const Environment once{{"FAKECUDA_FAULT", "cuInit#1=100"}};
  const Seen first = look(FAKE_CUDA_PATH, once);
  EXPECT_EQ(first.state, DriverState::no_device);
  EXPECT_EQ(first.code, Errc::ok) << "asked once more: " << first.message;
  EXPECT_EQ(look(FAKE_CUDA_PATH, once, "state again").state, DriverState::ready);
}

TEST(DriverState, TheToolkitsStubIsToldFromADriver) {
  for (const char* stub : {REFIT_TINY_STUB_PATH, "/usr/local/cuda/lib64/stubs/libcuda.so"}) {
    if (!fs::exists(stub)) continue;  // the toolkit need not be there; the tiny one is
    const Seen seen = look(stub);
    EXPECT_EQ(seen.state, DriverState::stub) << stub;
    EXPECT_EQ(seen.code, Errc::unsupported) << stub;
    EXPECT_TRUE(says(seen, "LD_LIBRARY_PATH")) << seen.message;
  }
}

TEST(DriverState, NoDeviceIsUnsupported) {
  const Seen seen = look(FAKE_CUDA_PATH, {{"CUDA_VISIBLE_DEVICES", ""},
                                          {"FAKECUDA_DIR", fakecuda::test::directory()}});
  EXPECT_EQ(seen.state, DriverState::no_device);
  EXPECT_EQ(seen.code, Errc::unsupported);
  EXPECT_TRUE(says(seen, "sees no GPU")) << seen.message;
}

TEST(DriverState, ATooOldDriverIsToldWithItsVersion) {
  const Seen seen = look(FAKE_CUDA_PATH, {{"FAKECUDA_DRIVER_VERSION", "11030"},
                                          {"FAKECUDA_DIR", fakecuda::test::directory()}});
  EXPECT_EQ(seen.state, DriverState::too_old);
  EXPECT_EQ(seen.code, Errc::unsupported);
  EXPECT_TRUE(says(seen, "11.3")) << seen.message;
}

TEST(DriverState, AFailureToStartIsToldWithItsCode) {
  const Seen seen = look(FAKE_CUDA_PATH, {{"FAKECUDA_FAULT", "cuInit=999"},
                                          {"FAKECUDA_DIR", fakecuda::test::directory()}});
  EXPECT_EQ(seen.state, DriverState::failed);
  EXPECT_EQ(seen.code, Errc::cuda);
  EXPECT_TRUE(says(seen, "cuInit")) << seen.message;
}

// Both ABIs of the batch copy have one name: asked for by version, none is taken for the other.
TEST(DriverState, EachDriverHasTheBatchCopiesOfItsVersion) {
  for (const int version : {12000, 12080, 13000}) {
    const Seen seen = look(FAKE_CUDA_PATH, {{"FAKECUDA_DRIVER_VERSION", std::to_string(version)},
                                            {"FAKECUDA_DIR", fakecuda::test::directory()}});
    EXPECT_EQ(seen.state, DriverState::ready) << seen.message;
    EXPECT_EQ(seen.batch_12080, version >= 12080) << version;
    EXPECT_EQ(seen.batch_13000, version >= 13000) << version;
  }
}

}  // namespace
}  // namespace refit::cuda::test
