// main() of tests that need a CUDA driver: runs them with the fake one found under its real name,
// and with a directory for it that is gone with them.
//
// REFIT_TEST_REAL_CUDA=1 leaves the loader's own driver in place.
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "support/cuda/device_storage.hpp"
#include "support/cuda/exporter.hpp"

namespace {

constexpr const char* kInside = "REFIT_TEST_FAKE_CUDA";

/// The loader reads LD_LIBRARY_PATH once, so the program starts again.
[[noreturn]] void start_inside(char** argv) {
  const char* const old_path = std::getenv("LD_LIBRARY_PATH");
  ::setenv(
      "LD_LIBRARY_PATH",
      (std::string(FAKE_CUDA_FOLDER) + (old_path == nullptr ? "" : ":" + std::string(old_path)))
          .c_str(),
      1);
  ::setenv("FAKECUDA_KERNELS", FAKE_CUDA_KERNELS, 0);
  // Small segments: what is not of the suite's interest is not filled either.
  ::setenv("FAKECUDA_DEVICE_0", "granularity=64K", 0);
  ::setenv("FAKECUDA_DEVICE_1", "granularity=64K", 0);
  ::setenv(kInside, "1", 1);
  ::execv("/proc/self/exe", argv);
  std::_Exit(127);
}

int run_with_fake_driver(char** argv) {
  std::string directory = "/dev/shm/refit-fakecuda-XXXXXX";
  if (::mkdtemp(directory.data()) == nullptr) {
    std::perror(directory.c_str());
    return 1;
  }
  ::chmod(directory.c_str(), 0777);  // also for other users' processes
  ::setenv("FAKECUDA_DIR", directory.c_str(), 1);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    start_inside(argv);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  std::error_code ignored;
  std::filesystem::remove_all(directory, ignored);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

}  // namespace

int main(int argc, char** argv) {
  if (std::getenv(kInside) == nullptr && std::getenv("REFIT_TEST_REAL_CUDA") == nullptr)
    return run_with_fake_driver(argv);
  if (refit::test::is_exporter()) refit::test::export_until_told();
  ::testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  refit::test::DeviceStorage::free_retired();
  refit::test::cuda::release_contexts();
  return result;
}
