// The bench as a whole, at tiny scale: it runs, verifies, and reports every key. No time is judged.
//
// Starts the real bench, which starts the real daemon. Must not depend on how fast anything is.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

namespace {

using nlohmann::json;

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
    const std::string command = "TMPDIR=" + (folder_ / "tmp").string() + " " + REFIT_BENCH_PROGRAM +
                                " --refitd " + refitd + " --json " +
                                (folder_ / "out.json").string() + " " + arguments + " >" +
                                (folder_ / "out.txt").string() + " 2>&1";
    const int status = std::system(command.c_str());
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
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

  std::filesystem::path folder_;
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
  std::string reasons;
  for (const json& entry : sut.at("skipped")) reasons += entry.at("key").get<std::string>() + "\n";
  for (const char* key : {"bytes",
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
                          "daemon_private_MiB",
                          "daemon_memfd_MiB",
                          "allocations_per_refit",
                          "page_faults_per_refit",
                          "syscalls_per_refit",
                          "yields_per_refit",
                          "opens_per_refit"}) {
    ASSERT_TRUE(sut.contains(key)) << key;
    const bool strace_figure = std::string(key).find("yields") == 0;
    const bool explained = reasons.find(strace_figure ? "syscalls" : key) != std::string::npos;
    EXPECT_TRUE(!sut.at(key).is_null() || explained) << key << " is null without a reason";
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

}  // namespace
