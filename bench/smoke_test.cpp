// The bench as a whole, at tiny scale: it runs, verifies, and reports every key. No time is judged.
//
// Starts the real bench, which starts the real daemon. Must not depend on how fast anything is.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>

#ifdef REFIT_BENCH_FAKE_CUDA
#include "support/fake_cuda/fake_cuda.hpp"
#endif

namespace {

using nlohmann::json;

/// Every documented figure of any kind of memory.
constexpr const char* kFigures[] = {"bytes",
                                    "page_bytes",
                                    "refit_s",
                                    "memcpy_s",
                                    "refit_over_memcpy",
                                    "first_refit_over_memcpy",
                                    "fixed_overhead_us",
                                    "register_ms",
                                    "populate_ms_per_GB",
                                    "check_s",
                                    "check_GBps",
                                    "sha256_one_stream_GBps",
                                    "check_xxh3_GBps",
                                    "read_GBps",
                                    "ring_rtt_ns",
                                    "reconnect_ms",
                                    "proof",
                                    "daemon_private_MiB",
                                    "daemon_memfd_MiB",
                                    "allocations_per_refit",
                                    "page_faults_per_refit",
                                    "syscalls_per_refit",
                                    "yields_per_refit",
                                    "opens_per_refit",
                                    "driver_calls_per_refit"};

class BenchSmoke : public testing::Test {
 protected:
  void SetUp() override {
    std::string name =
        (std::filesystem::temp_directory_path() / "refit-bench-test-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;

    std::filesystem::create_directory(folder_ / "tmp");
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  int run(const std::string& arguments, const std::string& refitd = REFIT_BENCH_REFITD) {
    const std::string command = environment_ + "TMPDIR=" + (folder_ / "tmp").string() + " " +
                                REFIT_BENCH_PROGRAM + " --refitd " + refitd + " --json " +
                                (folder_ / "out.json").string() + " " + arguments + " >" +
                                (folder_ / "out.txt").string() + " 2>&1";
    const int status = std::system(command.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  /// Why `key` was not measured stands among what was skipped.
  static bool is_explained(const json& sut, const std::string& key) {
    // Yields come from the run that counts system calls.
    const std::string wanted = key == "yields_per_refit" ? "syscalls_per_refit" : key;
    for (const json& entry : sut.at("skipped")) {
      if (entry.at("key").get<std::string>().find(wanted) == 0) return true;
    }
    return false;
  }
  static std::string manifest(const std::string& name) {
    return std::string(REFIT_BENCH_MANIFESTS) + "/" + name;
  }
  std::string output() const {
    std::ifstream stream(folder_ / "out.txt");
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  }
  json figures() const {
    std::ifstream stream(folder_ / "out.json");
    return json::parse(stream, nullptr, false);
  }

  /// Whatever has this name in front of all others is the driver.
  void take_driver_from(const std::filesystem::path& folder) {
    environment_ += "LD_LIBRARY_PATH=" + folder.string() + " ";
  }

  std::filesystem::path folder_;
  std::string environment_;  ///< assignments for the shell
};

// Goal: every documented key is there, with a value or with a reason why not, and every digest was
// verified. Method: a whole quick run over a renaming manifest with dimensions cut to a fiftieth.
TEST_F(BenchSmoke, WholeRunVerifiesEveryTensorAndReportsEveryKey) {
  ASSERT_EQ(run("--quick --steps 3 --scale 0.02 --manifest " + manifest("wan2.1-t2v-1.3b.json")), 0)
      << output();
  const json sut = figures();
  ASSERT_TRUE(sut.is_object()) << output();
  EXPECT_EQ(sut.at("model"), "wan2.1-t2v-1.3b");
  EXPECT_EQ(sut.at("tensors"), 825);
  EXPECT_EQ(sut.at("digests_verified"), 825);
  for (const char* key : kFigures) {
    ASSERT_TRUE(sut.contains(key)) << key;
    EXPECT_TRUE(!sut.at(key).is_null() || is_explained(sut, key)) << key;
  }
  for (const char* key : {"p50", "p99", "min", "max"})
    EXPECT_GT(sut.at("refit_s").at(key), 0) << key;
  for (const char* key : {"p50", "min", "winner"})
    EXPECT_TRUE(sut.at("memcpy_s").contains(key)) << key;
  EXPECT_EQ(sut.at("refit_over_memcpy_pairs").at("count"), 3);
  for (const char* size : {"small", "full"})
    EXPECT_GT(sut.at("reconnect_ms").at(size).at("max"), 0) << size;
}

// Goal: fused targets are verified too. Method: the fused manifest at a hundredth, only the parts
// that move bytes.
TEST_F(BenchSmoke, FusedTargetsAreVerified) {
  ASSERT_EQ(run("--quick --steps 2 --scale 0.01 --only attach,refit --manifest " +
                manifest("qwen-image.json")),
            0)
      << output();
  EXPECT_EQ(figures().at("tensors"), 1693);
  EXPECT_EQ(figures().at("digests_verified"), 1693);
}

// Goal: no driver is not a pass, and not a failure either. Method: what the loader finds is no
// library; a build without CUDA's headers does not look.
TEST_F(BenchSmoke, WithoutADriverDeviceMemoryIsSkippedWithAStatusOfItsOwn) {
  std::ofstream(folder_ / "libcuda.so.1") << "";
  take_driver_from(folder_);
  for (const char* kind : {"cuda", "cuda-vmm", "offload"}) {
    EXPECT_EQ(run("--quick --memory " + std::string(kind) + " --manifest " +
                  manifest("flux2-klein-4b.json")),
              3);
    EXPECT_NE(output().find(kind), std::string::npos) << output();
    EXPECT_NE(output().find("skipped, which is not passed"), std::string::npos) << output();
  }
}

TEST_F(BenchSmoke, NothingIsLeftBehind) {
  ASSERT_EQ(run("--quick --only ring --manifest " + manifest("flux2-klein-4b.json")), 0)
      << output();
  EXPECT_TRUE(std::filesystem::is_empty(folder_ / "tmp"));
}

TEST_F(BenchSmoke, MissingManifestIsRefusedByName) {
  EXPECT_EQ(run("--manifest /nonexistent.json"), 2);
  EXPECT_NE(output().find("/nonexistent.json"), std::string::npos);
}

// Goal: a daemon that cannot start is an error that shows what it wrote. Method: a program that
// only prints and fails.
TEST_F(BenchSmoke, DaemonThatDoesNotStartIsAnErrorThatQuotesIt) {
  const auto broken = folder_ / "broken";
  std::ofstream(broken) << "#!/bin/sh\necho no such luck >&2\nexit 3\n";
  std::filesystem::permissions(broken, std::filesystem::perms::owner_all);
  EXPECT_EQ(
      run("--quick --only ring --manifest " + manifest("flux2-klein-4b.json"), broken.string()), 1);
  EXPECT_NE(output().find("no such luck"), std::string::npos) << output();
}

#ifdef REFIT_BENCH_FAKE_CUDA

class BenchOnFakeDriver : public BenchSmoke {
 protected:
  void SetUp() override {
    BenchSmoke::SetUp();
    std::string name = "/dev/shm/refit-bench-test-XXXXXX";
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    devices_ = name;
    take_driver_from(REFIT_BENCH_FAKE_CUDA);
    environment_ += "FAKECUDA_DIR=" + devices_.string() + " ";
  }
  void TearDown() override {
    std::filesystem::remove_all(devices_);
    BenchSmoke::TearDown();
  }

  /// Calls of `name` by all daemons of the run, as the driver itself has counted them: who asks for
  /// batches is a daemon.
  double counted_by_driver(const std::string& name) const {
    std::uint64_t sum = 0;
    for (const auto& entry : std::filesystem::directory_iterator(devices_)) {
      const std::string file = entry.path().filename().string();
      if (file.rfind("p-", 0) != 0) continue;
      const auto report =
          fakecuda::ProcessReport::open(devices_.string(), std::stoi(file.substr(2)));
      if (report && (*report)->calls_of("cuMemcpyBatchAsync") > 0) sum += (*report)->calls_of(name);
    }
    return static_cast<double>(sum);
  }
  /// A steady refit opens, allocates and registers nothing, and copies as often for 825 tensors of
  /// 64 bytes as for the same ones at another size.
  void expect_steady_calls(const json& sut, double copies) {
    for (const char* size : {"small", "full"}) {
      const std::string key = std::string("driver_calls_per_refit.") + size;
#ifdef REFIT_BENCH_COUNTS_DRIVER_CALLS
      EXPECT_EQ(sut.at("driver_opens_per_refit").at(size), 0) << size;
      EXPECT_EQ(sut.at("driver_copies_per_refit").at(size), copies) << size;
      EXPECT_FALSE(is_explained(sut, key));
      const json& by_name = sut.at("driver_calls_by_name").at(size);
      const std::set<std::string> allowed{
          "cuCtxPushCurrent", "cuCtxPopCurrent", "cuStreamWaitEvent", "cuMemcpyBatchAsync",
          "cuEventQuery",     "cuEventRecord",   "cuEventSynchronize"};
      double sum = 0;
      for (const auto& [name, count] : by_name.items()) {
        EXPECT_EQ(allowed.count(name), 1U) << name;
        sum += count.get<double>();
      }
      EXPECT_EQ(sut.at("driver_calls_per_refit").at(size), sum);
      EXPECT_EQ(counted_by_driver("cuStreamWaitEvent") / counted_by_driver("cuMemcpyBatchAsync"),
                by_name.at("cuStreamWaitEvent").get<double>() / copies)
          << "the driver has counted otherwise";
#else
      (void)copies;
      EXPECT_TRUE(is_explained(sut, key));
#endif
    }
  }
  /// The report says of each time that it is of the fake driver, and of no count.
  void expect_marks(const json& sut) {
    EXPECT_EQ(sut.at("driver").at("kind"), "fake");
    const auto listed = sut.at("not_of_hardware").get<std::set<std::string>>();
    std::stringstream lines(output());
    std::map<std::string, std::string> line_of;
    for (std::string line; std::getline(lines, line);)
      line_of[line.substr(0, line.find(' '))] = line;
    for (const char* key : {"refit_s", "memcpy_s", "refit_over_memcpy", "check_GBps"}) {
      EXPECT_NE(line_of[key].find("fake driver"), std::string::npos) << key << ": " << line_of[key];
      EXPECT_EQ(listed.count(key), 1U) << key;
    }
    for (const char* key : {"tensors", "digests_verified"}) {
      EXPECT_EQ(line_of[key].find("fake driver"), std::string::npos) << line_of[key];
      EXPECT_EQ(listed.count(key), 0U) << key;
    }
  }

  std::filesystem::path devices_;
};

TEST_F(BenchOnFakeDriver, LegacyMemoryIsRefittedInOneCopyAndEveryTimeIsMarked) {
  ASSERT_EQ(run("--quick --steps 2 --scale 0.01 --only refit,counts --memory cuda --manifest " +
                manifest("wan2.1-t2v-1.3b.json")),
            0)
      << output();
  const json sut = figures();
  EXPECT_EQ(sut.at("memory"), "cuda");
  EXPECT_EQ(sut.at("digests_verified"), 825);
  EXPECT_EQ(sut.at("memcpy_s").at("winner"), "cuMemcpyDtoD");
  expect_steady_calls(sut, 1);
  expect_marks(sut);
}

TEST_F(BenchOnFakeDriver, VmmMemoryIsRefittedInOneCopy) {
  ASSERT_EQ(run("--quick --steps 2 --scale 0.01 --only refit,counts --memory cuda-vmm --manifest " +
                manifest("wan2.1-t2v-1.3b.json")),
            0)
      << output();
  EXPECT_EQ(figures().at("digests_verified"), 825);
  expect_steady_calls(figures(), 1);
}

// One copy to the host, and one to the 15 resident ones of 30 layers, which lie where the engine
// has put them.
TEST_F(BenchOnFakeDriver, OffloadedModelIsRefittedInOneCopyToTheHostAndOneToItsResidentLayers) {
  ASSERT_EQ(run("--quick --steps 2 --scale 0.01 --only refit,counts --memory offload --manifest " +
                manifest("wan2.1-t2v-1.3b.json")),
            0)
      << output();
  EXPECT_EQ(figures().at("digests_verified"), 825);
  expect_steady_calls(figures(), 2);
}

// Goal: all parts run on devices, with tensors that are fused. Method: as the whole run on host
// memory, and what has no meaning there has a reason.
TEST_F(BenchOnFakeDriver, WholeRunReportsEveryKey) {
  ASSERT_EQ(run("--quick --steps 2 --scale 0.01 --memory offload --manifest " +
                manifest("qwen-image.json")),
            0)
      << output();
  const json sut = figures();
  EXPECT_EQ(sut.at("digests_verified"), 1693);
  for (const char* key : kFigures) {
    ASSERT_TRUE(sut.contains(key)) << key;
    EXPECT_TRUE(!sut.at(key).is_null() || is_explained(sut, key)) << key;
  }
}

TEST_F(BenchOnFakeDriver, OffloadWithoutLayersIsRefusedByWhatItNeeds) {
  std::ofstream(folder_ / "flat.json") << R"({"model": "flat", "dtype": "bfloat16",
      "source": [["a", [64]], ["b", [64]]], "target": "same as source"})";
  EXPECT_EQ(
      run("--quick --only refit --memory offload --manifest " + (folder_ / "flat.json").string()),
      1);
  EXPECT_NE(output().find("layer_lists"), std::string::npos) << output();
}

#endif

}  // namespace
