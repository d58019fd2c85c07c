// What the facts about a host mean. Pure; any thread. Knows nothing of how they are found out.
#include "refitctl/doctor/judge.hpp"

#include <cerrno>
#include <cstdio>
#include <cstring>

#include "refit/errc.hpp"
#include "refitctl/format/units.hpp"

namespace refit::ctl {
namespace {

constexpr std::uint64_t kHugePageBytes = std::uint64_t{2} << 20;
/// A session needs about ten; 64 sessions and what a process has anyway.
constexpr std::uint64_t kFilesMin = 4096;
/// A region is one mapping; 64 regions in each of 64 sessions, and what a process has anyway.
constexpr std::uint64_t kMapCountMin = 16'384;
/// The two segments of a session are charged to the daemon, the regions to who made them.
constexpr std::uint64_t kCgroupMin = std::uint64_t{1} << 30;

std::string because(const Tried& tried) {
  return tried.worked() ? std::string("works")
                        : std::string("fails: ") + std::strerror(tried.error);
}

std::string hex(std::uint64_t value) {
  char text[32];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

Finding tried(const char* id, const char* title, const Tried& what, Verdict otherwise,
              const char* advice) {
  return {id, title, what.worked() ? Verdict::ok : otherwise, because(what),
          what.worked() ? "" : advice};
}

Finding judge_future_write(const KernelFacts& kernel) {
  Finding finding =
      tried("future_write_seal", "F_SEAL_FUTURE_WRITE", kernel.future_write_seal, Verdict::fail,
            "clients could write the daemon's words: needs Linux 5.1 or newer");
  if (kernel.future_write_seal.worked() && !kernel.future_write_kept) {
    finding.verdict = Verdict::fail;
    finding.found = "is taken and not kept";
    finding.advice =
        "a writable mapping was allowed after the seal; this kernel is not Linux's own";
  }
  return finding;
}

Finding judge_huge_pages(const KernelFacts& kernel) {
  Finding finding{"huge_pages", "huge pages of shared memory", Verdict::ok, "", ""};
  finding.found = "MADV_COLLAPSE " + because(kernel.collapse);
  if (kernel.collapse.worked()) {
    finding.found = format_bytes(kernel.huge_bytes) + " of " + format_bytes(kHugePageBytes) +
                    " by MADV_COLLAPSE";
  }
  if (!kernel.shmem_enabled.empty()) finding.found += "; shmem_enabled " + kernel.shmem_enabled;
  if (kernel.collapse.worked() && kernel.huge_bytes >= kHugePageBytes) return finding;
  finding.verdict = Verdict::warn;
  finding.advice =
      "registering costs hundreds of milliseconds a GiB instead of one: needs Linux 6.1 or newer "
      "with CONFIG_TRANSPARENT_HUGEPAGE, or `echo advise > "
      "/sys/kernel/mm/transparent_hugepage/shmem_enabled` as root";
  return finding;
}

Finding judge_files(const LimitFacts& limits) {
  Finding finding{
      "open_files", "RLIMIT_NOFILE", Verdict::ok,
      std::to_string(limits.files_soft) + " (hard " + std::to_string(limits.files_hard) + ")", ""};
  if (limits.files_hard < kFilesMin) {
    finding.verdict = Verdict::warn;
    finding.advice =
        "a daemon started from here runs out of file descriptors with many sessions: "
        "raise the hard limit to " +
        std::to_string(kFilesMin) + " or more (`ulimit -Hn`, LimitNOFILE=)";
  }
  return finding;
}

Finding judge_locked(const LimitFacts& limits) {
  return {"locked_memory", "RLIMIT_MEMLOCK", Verdict::ok,
          limits.locked_bytes ? format_bytes(*limits.locked_bytes) : "unlimited",
          "refit locks no memory but through the CUDA driver, which asks for no limit: any value "
          "will do"};
}

Finding judge_map_count(const LimitFacts& limits) {
  Finding finding{"map_count", "vm.max_map_count", Verdict::ok,
                  limits.map_count ? std::to_string(*limits.map_count) : "cannot be read", ""};
  if (limits.map_count && *limits.map_count < kMapCountMin) {
    finding.verdict = Verdict::warn;
    finding.advice = "many regions will not be mapped: `sysctl -w vm.max_map_count=65530`";
  }
  return finding;
}

Finding judge_cgroup(const LimitFacts& limits) {
  Finding finding{"cgroup_memory", "memory limit of the cgroup", Verdict::ok, "none", ""};
  if (!limits.cgroup_limit_bytes) return finding;
  finding.found = format_bytes(*limits.cgroup_limit_bytes);
  std::uint64_t left = *limits.cgroup_limit_bytes;
  if (limits.cgroup_used_bytes) {
    finding.found += ", " + format_bytes(*limits.cgroup_used_bytes) + " used";
    left = left > *limits.cgroup_used_bytes ? left - *limits.cgroup_used_bytes : 0;
  }
  if (left < kCgroupMin) {
    finding.verdict = Verdict::warn;
    finding.advice =
        "shared memory is charged to the cgroup that first touches it, so a trainer or "
        "engine started here holds less than 1 GiB of weights: raise MemoryMax=, or "
        "the container's limit";
  }
  return finding;
}

Finding judge_sha(const CpuFacts& cpu) {
  Finding finding{"sha_ni", "SHA-256 by the CPU", Verdict::ok, cpu.sha_ni ? "SHA-NI" : "no SHA-NI",
                  ""};
  if (!cpu.known) {
    finding.found = "not asked: not an x86";
  } else if (!cpu.sha_ni) {
    finding.verdict = Verdict::warn;
    finding.advice = "digests and checks take several times as long on this CPU";
  }
  return finding;
}

Finding judge_copies(const HostFacts& facts) {
  const CpuFacts& cpu = facts.cpu;
  Finding finding{"copy_kernel", "copies", Verdict::ok, "", ""};
  finding.found = facts.daemon.answered ? facts.daemon.copy_kernel + " by the daemon's trial, of "
                                        : "one by the daemon's trial, of ";
  finding.found += cpu.copy_loops;
  if (cpu.known) {
    finding.found += std::string(" (AVX2 ") + (cpu.avx2 ? "yes" : "no") + ", AVX-512 " +
                     (cpu.avx512 ? "yes" : "no") + ")";
  }
  if (cpu.known && !cpu.avx2) {
    finding.verdict = Verdict::warn;
    finding.advice = "without AVX2 copies fill the caches and read the target first";
  }
  return finding;
}

Finding judge_waiting(const HostFacts& facts) {
  Finding finding{"waiting", "cores and waiting", Verdict::ok,
                  std::to_string(facts.cpu.cores) + (facts.cpu.cores == 1 ? " core" : " cores"),
                  ""};
  if (facts.daemon.answered) finding.found += ", the daemon waits " + facts.daemon.waiting;
  if (facts.cpu.cores < 2) {
    finding.verdict = Verdict::warn;
    finding.advice = "trainer, engine and daemon take turns on one core: use waiting `off`";
  } else if (facts.daemon.answered && facts.daemon.waiting == "always" && facts.cpu.cores < 4) {
    finding.verdict = Verdict::warn;
    finding.advice =
        "`always` keeps a core for the daemon and one for each spinning client: with "
        "fewer than 4 cores `adaptive` is faster";
  }
  return finding;
}

Finding judge_well_known(const HostFacts& facts) {
  const WellKnownFacts& known = facts.well_known;
  Finding finding{"socket_choice", "socket that clients choose", Verdict::ok, known.choice, ""};
  if (!known.variable.empty()) {
    finding.found += " (REFIT_SOCKET)";
  } else {
    finding.found += known.user_exists ? " (this user's own)" : " (the system's)";
  }
  if (known.choice != facts.socket.path) {
    finding.verdict = Verdict::warn;
    finding.advice = "what follows is about " + facts.socket.path +
                     ", as --socket says: clients of this shell look elsewhere";
  }
  if (known.user_exists && known.system_exists) {
    finding.verdict = Verdict::warn;
    finding.advice += std::string(finding.advice.empty() ? "" : "; ") + "there are two sockets, " +
                      known.user_path + " and " + known.system_path +
                      ": trainer and engine must use the same one, REFIT_SOCKET names it";
  }
  return finding;
}

Finding judge_socket(const HostFacts& facts) {
  const SocketFacts& socket = facts.socket;
  Finding finding{"socket", "socket", Verdict::ok, "", ""};
  if (!socket.looked_at.worked()) {
    finding.found = socket.path + ": " + std::strerror(socket.looked_at.error);
    const bool absent = socket.looked_at.error == ENOENT;
    finding.verdict = absent ? Verdict::warn : Verdict::fail;
    finding.advice = absent
                         ? "no daemon has been started there: `systemctl start refitd.socket`, or "
                           "`refitd --socket " +
                               socket.path + "`"
                         : "look at the rights of its folders with `namei -l " + socket.path + "`";
    return finding;
  }
  char mode[16];
  std::snprintf(mode, sizeof mode, "%04o", socket.mode & 07777U);
  finding.found = socket.path + ": owner " + socket.owner_label + ", group " + socket.group_name +
                  ", mode " + mode;
  if (!socket.is_socket) {
    finding.verdict = Verdict::fail;
    finding.advice = "this is no socket: remove it, or name another";
  } else if (socket.owner != 0 && socket.owner != facts.uid) {
    finding.verdict = Verdict::fail;
    finding.advice =
        "clients trust a socket of root or of their own user and of nobody else: start "
        "the daemon as one of them";
  } else if (socket.connected.error == EACCES || socket.connected.error == EPERM) {
    finding.verdict = Verdict::fail;
    finding.advice =
        socket.in_group
            ? "the group may not write to it: `chmod g+rw`, or look at the folders' "
              "rights with `namei -l`"
            : "join the group: `sudo usermod -aG " + socket.group_name + " $USER`, and log in anew";
  }
  return finding;
}

Finding judge_daemon(const HostFacts& facts) {
  const DaemonFacts& daemon = facts.daemon;
  Finding finding{"daemon", "daemon", Verdict::ok, "", ""};
  if (daemon.answered) {
    finding.found = "refitd " + daemon.version + ", pid " + std::to_string(daemon.pid) + ", " +
                    std::to_string(daemon.copy_threads) + " copy threads";
    if (daemon.draining) {
      finding.verdict = Verdict::warn;
      finding.found += ", draining";
      finding.advice = "it takes no new work and ends by itself";
    }
    return finding;
  }
  finding.found = daemon.error_message;
  const auto code = static_cast<Errc>(daemon.error_code);
  const bool nobody =
      facts.socket.looked_at.error == ENOENT || facts.socket.connected.error == ECONNREFUSED;
  // What keeps one from answering is told by the socket's finding.
  finding.verdict = nobody || code == Errc::shutting_down ? Verdict::warn : Verdict::fail;
  finding.advice = nobody ? "start it; without one the findings above are of this host alone"
                   : code == Errc::permission ? "see the socket's finding"
                                              : "read its log: `journalctl -u refitd`";
  return finding;
}

Finding judge_release(const HostFacts& facts) {
  const DaemonFacts& daemon = facts.daemon;
  Finding finding{"release", "release", Verdict::ok,
                  "refitctl " + facts.own_version + ", protocol " +
                      std::to_string(facts.own_protocol) + ", layout " + hex(facts.own_layout),
                  ""};
  if (!daemon.answered && static_cast<Errc>(daemon.error_code) == Errc::protocol_version) {
    finding.verdict = Verdict::fail;
    finding.advice =
        "the daemon is of a release that this one cannot talk to: install both from "
        "one, and restart refitd";
  } else if (daemon.answered && daemon.version != facts.own_version) {
    finding.verdict = Verdict::warn;
    finding.found += "; the daemon " + daemon.version + " with the same protocol and layout";
    finding.advice = "restart refitd after an update";
  } else if (daemon.answered) {
    finding.found += ", as the daemon";
  }
  return finding;
}

void judge_cuda(const HostFacts& facts, std::vector<Finding>& findings) {
  const CudaFacts& cuda = facts.cuda;
  const DeviceSurvey& survey = cuda.survey;
  if (!survey.driver_there) {
    // A host for host memory is nothing to mend.
    findings.push_back({"cuda", "CUDA", Verdict::ok, "none: " + survey.why_not, ""});
    return;
  }
  findings.push_back({"cuda", "CUDA", Verdict::ok,
                      "driver " + std::to_string(survey.driver_version / 1000) + "." +
                          std::to_string(survey.driver_version % 1000 / 10) + ", " +
                          std::to_string(survey.devices.size()) +
                          (survey.devices.size() == 1 ? " device" : " devices"),
                      ""});
  for (std::size_t i = 0; i < survey.devices.size(); ++i) {
    const SurveyedDevice& device = survey.devices[i];
    Finding finding{"cuda_device_" + std::to_string(i), "GPU " + std::to_string(i), Verdict::ok,
                    device.label + ", " + format_bytes(device.memory_bytes) + ", legacy IPC " +
                        (device.legacy_ipc ? "yes" : "no") + ", VMM fds " +
                        (device.vmm_fds ? "yes" : "no"),
                    ""};
    if (!device.legacy_ipc && !device.vmm_fds) {
      finding.verdict = Verdict::warn;
      finding.advice = "its memory cannot be shared between processes (a MIG instance?)";
    } else if (device.one_process_only) {
      finding.verdict = Verdict::fail;
      finding.advice =
          "its compute mode lets one process in, and a refit needs three: "
          "`nvidia-smi -c DEFAULT` as root";
    }
    findings.push_back(std::move(finding));
  }
  Finding legacy{"cuda_legacy", "legacy CUDA IPC", Verdict::ok, "", ""};
  if (!facts.daemon.answered) {
    legacy.found = "no daemon to share with";
  } else if (cuda.same_pid_namespace == false) {
    legacy.found = "the daemon is in another pid namespace";
    legacy.verdict = Verdict::warn;
    legacy.advice =
        "legacy handles do not cross it: run the container with the host's pids, or use "
        "VMM memory (PyTorch: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True)";
  } else if (!cuda.daemon_of_this_uid) {
    legacy.found = "the daemon runs as another user";
    legacy.verdict = Verdict::warn;
    legacy.advice =
        "legacy handles are refused across users unless cuda.legacy_across_uids is set, and "
        "drivers may refuse them anyway: use the user unit, or VMM memory";
  } else {
    legacy.found = "the daemon runs as this user";
  }
  findings.push_back(std::move(legacy));
  findings.push_back({"cuda_mps", "CUDA MPS", cuda.mps ? Verdict::warn : Verdict::ok,
                      cuda.mps ? "seems to run" : "not seen",
                      cuda.mps
                          ? "handles between processes inside and outside of MPS are untested: "
                            "run trainer, engine and daemon on the same side"
                          : ""});
}

}  // namespace

std::vector<Finding> judge(const HostFacts& facts) {
  const KernelFacts& kernel = facts.kernel;
  std::vector<Finding> findings;
  findings.push_back({"kernel", "kernel", Verdict::ok, kernel.release, ""});
  findings.push_back(tried("memfd_seals", "sealed memfd", kernel.memfd_seals, Verdict::fail,
                           "nothing can be shared safely: needs memfd_create and file seals"));
  findings.push_back(judge_future_write(kernel));
  findings.push_back(tried("populate_write", "MADV_POPULATE_WRITE", kernel.populate_write,
                           Verdict::fail,
                           "regions cannot be registered: needs Linux 5.14 or newer"));
  findings.push_back(judge_huge_pages(kernel));
  findings.push_back(tried("pidfd_open", "pidfd_open", kernel.pidfd_open, Verdict::fail,
                           "a dead peer could not be told from a slow one: needs Linux 5.3 or "
                           "newer, and a sandbox that allows it"));
  findings.push_back(tried("peer_pidfd", "SO_PEERPIDFD", kernel.peer_pidfd, Verdict::warn,
                           "a client's process is opened by its number, which another may have "
                           "taken by then: Linux 6.5 closes that gap"));
  findings.push_back(tried("peer_groups", "SO_PEERGROUPS", kernel.peer_groups, Verdict::warn,
                           "the groups of a client cannot be asked: allow users and not groups"));
  findings.push_back(judge_files(facts.limits));
  findings.push_back(judge_locked(facts.limits));
  findings.push_back(judge_map_count(facts.limits));
  findings.push_back(judge_cgroup(facts.limits));
  findings.push_back(judge_sha(facts.cpu));
  findings.push_back(judge_copies(facts));
  findings.push_back(judge_waiting(facts));
  findings.push_back(judge_well_known(facts));
  findings.push_back(judge_socket(facts));
  findings.push_back(judge_daemon(facts));
  findings.push_back(judge_release(facts));
  judge_cuda(facts, findings);
  return findings;
}

}  // namespace refit::ctl
