// What doctor makes of the facts about a host. One thread.
#include "refitctl/doctor/judge.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>

#include "refit/errc.hpp"
#include "refitctl/doctor/probe.hpp"
#include "refitctl/doctor/report.hpp"

namespace refit::ctl {
namespace {

constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;

HostFacts good_host() {
  HostFacts facts;
  facts.uid = 1000;
  facts.own_version = "0.1.0";
  facts.own_protocol = 1;
  facts.kernel.release = "Linux 6.18.0";
  facts.kernel.future_write_kept = true;
  facts.kernel.huge_bytes = 2U << 20U;
  facts.kernel.shmem_enabled = "always [advise] never";
  facts.limits.files_soft = 1024;
  facts.limits.files_hard = 524'288;
  facts.limits.map_count = 65'530;
  facts.cpu.cores = 8;
  facts.cpu.known = facts.cpu.sha_ni = facts.cpu.avx2 = facts.cpu.avx512 = true;
  facts.cpu.copy_loops = "nt_avx512, rep_movsb";
  facts.socket.path = "/run/refitd/refitd.sock";
  facts.socket.is_socket = true;
  facts.socket.owner_label = "root (0)";
  facts.socket.group_name = "refit";
  facts.socket.mode = 0660;
  facts.socket.in_group = true;
  facts.well_known.choice = facts.well_known.system_path = facts.socket.path;
  facts.well_known.user_path = "/run/user/1000/refit/refitd.sock";
  facts.well_known.system_exists = true;
  facts.cuda.survey.driver_there = true;
  facts.cuda.survey.driver_version = 13'000;
  facts.cuda.survey.devices = {{"GPU-0 (H100)", std::uint64_t{80} << 30, false, true, true}};
  facts.cuda.daemon_of_this_uid = true;
  facts.cuda.same_pid_namespace = true;
  facts.daemon.answered = true;
  facts.daemon.version = "0.1.0";
  facts.daemon.waiting = "adaptive";
  return facts;
}

Finding finding_of(const HostFacts& facts, const std::string& id) {
  for (const Finding& finding : judge(facts)) {
    if (finding.id == id) return finding;
  }
  ADD_FAILURE() << "no finding " << id;
  return {};
}

TEST(Judge, GoodHostHasNothingToChange) {
  for (const Finding& sut : judge(good_host()))
    EXPECT_EQ(sut.verdict, Verdict::ok) << sut.id << ": " << sut.found << ": " << sut.advice;
}

TEST(Judge, EveryFindingHasItsOwnIdAndWhatWasFound) {
  std::set<std::string> ids;
  for (const Finding& sut : judge(good_host())) {
    EXPECT_TRUE(ids.insert(sut.id).second) << sut.id;
    EXPECT_NE(sut.title, "");
    EXPECT_NE(sut.found, "") << sut.id;
  }
}

// Goal: each thing that can be wrong is found, weighed and explained, and nothing else is blamed
// for it. Method: a good host with one change.
TEST(Judge, EachTroubleIsFoundWeighedAndExplained) {
  struct Case {
    std::string id;
    Verdict verdict;
    std::string part;  ///< of the finding's texts
    std::function<void(HostFacts&)> change;
  };
  const std::vector<Case> cases{
      {"memfd_seals", Verdict::fail, "memfd",
       [](HostFacts& f) { f.kernel.memfd_seals = {ENOSYS}; }},
      {"future_write_seal", Verdict::fail, "5.1",
       [](HostFacts& f) { f.kernel.future_write_seal = {EINVAL}; }},
      {"future_write_seal", Verdict::fail, "not kept",
       [](HostFacts& f) { f.kernel.future_write_kept = false; }},
      {"populate_write", Verdict::fail, "5.14",
       [](HostFacts& f) { f.kernel.populate_write = {EINVAL}; }},
      {"huge_pages", Verdict::warn, "shmem_enabled",
       [](HostFacts& f) { f.kernel.collapse = {EINVAL}; }},
      {"huge_pages", Verdict::warn, "0 B of 2.00 MiB",
       [](HostFacts& f) { f.kernel.huge_bytes = 0; }},
      {"pidfd_open", Verdict::fail, "5.3", [](HostFacts& f) { f.kernel.pidfd_open = {ENOSYS}; }},
      {"peer_pidfd", Verdict::warn, "6.5",
       [](HostFacts& f) { f.kernel.peer_pidfd = {ENOPROTOOPT}; }},
      {"peer_groups", Verdict::warn, "groups",
       [](HostFacts& f) { f.kernel.peer_groups = {ENOPROTOOPT}; }},
      {"open_files", Verdict::warn,
       "LimitNOFILE=", [](HostFacts& f) { f.limits.files_hard = 1024; }},
      {"map_count", Verdict::warn, "sysctl", [](HostFacts& f) { f.limits.map_count = 1000; }},
      {"cgroup_memory", Verdict::warn, "MemoryMax=",
       [](HostFacts& f) {
         f.limits.cgroup_limit_bytes = 4 * kGiB;
         f.limits.cgroup_used_bytes = 4 * kGiB - 1;
       }},
      {"sha_ni", Verdict::warn, "no SHA-NI", [](HostFacts& f) { f.cpu.sha_ni = false; }},
      {"copy_kernel", Verdict::warn, "AVX2", [](HostFacts& f) { f.cpu.avx2 = false; }},
      {"waiting", Verdict::warn, "1 core", [](HostFacts& f) { f.cpu.cores = 1; }},
      {"waiting", Verdict::warn, "always",
       [](HostFacts& f) {
         f.cpu.cores = 2;
         f.daemon.waiting = "always";
       }},
      {"socket_choice", Verdict::warn, "REFIT_SOCKET",
       [](HostFacts& f) { f.well_known.user_exists = true; }},
      {"socket_choice", Verdict::warn, "/tmp/other.sock",
       [](HostFacts& f) { f.socket.path = "/tmp/other.sock"; }},
      {"socket", Verdict::fail, "no socket", [](HostFacts& f) { f.socket.is_socket = false; }},
      {"socket", Verdict::fail, "root or of their own user",
       [](HostFacts& f) { f.socket.owner = 1001; }},
      {"socket", Verdict::fail, "usermod -aG refit",
       [](HostFacts& f) {
         f.socket.in_group = false;
         f.socket.connected = {EACCES};
       }},
      {"socket", Verdict::fail, "namei", [](HostFacts& f) { f.socket.looked_at = {EACCES}; }},
      {"cuda_device_0", Verdict::fail, "nvidia-smi -c DEFAULT",
       [](HostFacts& f) { f.cuda.survey.devices[0].one_process_only = true; }},
      {"cuda_device_0", Verdict::warn, "MIG",
       [](HostFacts& f) {
         f.cuda.survey.devices[0].legacy_ipc = f.cuda.survey.devices[0].vmm_fds = false;
       }},
      {"cuda_legacy", Verdict::warn, "expandable_segments",
       [](HostFacts& f) { f.cuda.same_pid_namespace = false; }},
      {"cuda_legacy", Verdict::warn, "cuda.legacy_across_uids",
       [](HostFacts& f) { f.cuda.daemon_of_this_uid = false; }},
      {"cuda_mps", Verdict::warn, "same side", [](HostFacts& f) { f.cuda.mps = true; }},
      {"daemon", Verdict::warn, "draining", [](HostFacts& f) { f.daemon.draining = true; }},
      {"release", Verdict::warn, "restart", [](HostFacts& f) { f.daemon.version = "0.0.9"; }},
  };
  for (const Case& one : cases) {
    HostFacts facts = good_host();
    one.change(facts);

    const Finding sut = finding_of(facts, one.id);

    EXPECT_EQ(sut.verdict, one.verdict) << one.id << ": " << sut.found;
    EXPECT_NE(sut.advice, "") << one.id;
    EXPECT_NE((sut.found + sut.advice).find(one.part), std::string::npos)
        << one.id << ": " << sut.found << ": " << sut.advice;
    for (const Finding& other : judge(facts)) {
      if (other.id != one.id) {
        EXPECT_EQ(other.verdict, Verdict::ok) << other.id << " for " << one.id;
      }
    }
  }
}

TEST(Judge, HostWithoutAGpuHasNothingToChange) {
  HostFacts facts = good_host();
  facts.cuda = {};
  facts.cuda.survey.why_not = "no CUDA driver on this host";

  const Finding sut = finding_of(facts, "cuda");

  EXPECT_EQ(sut.verdict, Verdict::ok);
  EXPECT_EQ(sut.found, "none: no CUDA driver on this host");
  EXPECT_EQ(sut.advice, "");
}

TEST(Judge, AbsentDaemonIsNoFailure) {
  HostFacts facts = good_host();
  facts.socket.looked_at = {ENOENT};
  facts.daemon = {};
  facts.daemon.error_code = static_cast<int>(Errc::os);
  facts.daemon.error_message = "no daemon there";

  EXPECT_FALSE(any_failed(judge(facts)));
  EXPECT_EQ(finding_of(facts, "daemon").verdict, Verdict::warn);
  EXPECT_EQ(finding_of(facts, "socket").verdict, Verdict::warn);
}

TEST(Judge, DaemonThatIsThereAndDoesNotAnswerIsAFailure) {
  HostFacts facts = good_host();
  facts.daemon = {};
  facts.daemon.error_code = static_cast<int>(Errc::deadline);
  EXPECT_EQ(finding_of(facts, "daemon").verdict, Verdict::fail);

  facts.daemon.error_code = static_cast<int>(Errc::protocol_version);
  EXPECT_EQ(finding_of(facts, "release").verdict, Verdict::fail);
}

TEST(Judge, OtherCpusAreNotBlamedForWhatTheyLack) {
  HostFacts facts = good_host();
  facts.cpu = {};
  facts.cpu.cores = 4;
  facts.cpu.copy_loops = "memcpy";

  EXPECT_EQ(finding_of(facts, "sha_ni").verdict, Verdict::ok);
  EXPECT_EQ(finding_of(facts, "copy_kernel").verdict, Verdict::ok);
}

TEST(DoctorReport, TextHasATableAndThenWhatToChange) {
  const std::vector<Finding> findings{{"a", "first", Verdict::ok, "works", ""},
                                      {"b", "second", Verdict::warn, "is slow", "make it fast"},
                                      {"c", "third", Verdict::fail, "is broken\x1b", "mend it"}};

  EXPECT_EQ(doctor_text(findings, Style{}),
            "      CHECK   FOUND\n"
            "ok    first   works\n"
            "warn  second  is slow\n"
            "fail  third   is broken\\x1b\n"
            "\n"
            "fail  third\n"
            "      mend it\n"
            "\n"
            "warn  second\n"
            "      make it fast\n"
            "\n"
            "1 ok, 1 to look at, 1 failed\n");
  EXPECT_TRUE(any_failed(findings));
}

TEST(DoctorReport, JsonHasWhatTheTableHas) {
  const auto root = nlohmann::json::parse(doctor_json(
      {{"a", "first", Verdict::ok, "works", ""}, {"b", "second", Verdict::warn, "x", "y"}}));

  EXPECT_EQ(root.at("ok"), true);
  EXPECT_EQ(root.at("checks").at(0), (nlohmann::json{{"id", "a"},
                                                     {"title", "first"},
                                                     {"verdict", "ok"},
                                                     {"found", "works"},
                                                     {"advice", nullptr}}));
  EXPECT_EQ(root.at("checks").at(1).at("advice"), "y");
}

TEST(DoctorProbe, CgroupPathIsThatOfTheSecondVersion) {
  EXPECT_EQ(cgroup_path("0::/user.slice/job"), "/user.slice/job");
  EXPECT_EQ(cgroup_path("12:memory:/old\n0::/"), "/");
  EXPECT_EQ(cgroup_path("12:memory:/old"), "");
}

TEST(DoctorProbe, HugeBytesAreThoseOfTheMappingAsked) {
  const std::string smaps =
      "7f0000000000-7f0000200000 rw-s 00000000 00:01 1 /memfd:a (deleted)\n"
      "Size:               2048 kB\n"
      "ShmemPmdMapped:        0 kB\n"
      "7f0000400000-7f0000600000 rw-s 00000000 00:01 2 /memfd:b (deleted)\n"
      "ShmemPmdMapped:     2048 kB\n";

  EXPECT_EQ(huge_bytes_at(smaps, 0x7f0000000000), 0U);
  EXPECT_EQ(huge_bytes_at(smaps, 0x7f0000400000), 2U << 20U);
  EXPECT_EQ(huge_bytes_at(smaps, 0x7f0000800000), 0U);
}

}  // namespace
}  // namespace refit::ctl
