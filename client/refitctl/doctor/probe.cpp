// Finds out what this host can do, by doing it. One thread. Knows nothing of what the facts mean.
#include "refitctl/doctor/probe.hpp"

#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <sstream>

#include "ipc/handshake.hpp"
#include "ipc/segment.hpp"
#include "memory/copy_kernels.hpp"
#include "memory/device_survey.hpp"
#include "posix/unique_fd.hpp"
#include "refit/connection.hpp"
#include "refitctl/ask.hpp"
#include "refitctl/users.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif
#ifndef SO_PEERGROUPS
#define SO_PEERGROUPS 59
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace refit::ctl {
namespace {

constexpr const char* kSystemSocket = "/run/refitd/refitd.sock";

Tried outcome(bool worked) { return {worked ? 0 : errno}; }

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  std::string content = text.str();
  while (!content.empty() && content.back() == '\n') content.pop_back();
  return content;
}

std::optional<std::uint64_t> read_number(const std::string& path) {
  const std::string text = read_file(path);
  std::uint64_t value = 0;
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  if (text.empty() || parsed.ec != std::errc()) return std::nullopt;
  return value;
}

/// A mapping that is gone with the object.
class Pages {
 public:
  Pages(int fd, std::size_t bytes, int protection)
      : bytes_(bytes), address_(::mmap(nullptr, bytes, protection, MAP_SHARED, fd, 0)) {}
  ~Pages() {
    if (mapped()) ::munmap(address_, bytes_);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  [[nodiscard]] bool mapped() const noexcept { return address_ != MAP_FAILED; }
  [[nodiscard]] void* address() const noexcept { return address_; }

 private:
  std::size_t bytes_;
  void* address_;
};

UniqueFd probe_memfd(std::size_t bytes, Tried& made) {
  UniqueFd fd = UniqueFd::adopt(::memfd_create("refitctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  made = outcome(fd && ::ftruncate(fd.get(), static_cast<off_t>(bytes)) == 0);
  return fd;
}

void probe_seals(KernelFacts& kernel) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const UniqueFd fd = probe_memfd(page, kernel.memfd_seals);
  if (!kernel.memfd_seals.worked()) {
    kernel.future_write_seal = kernel.memfd_seals;
    return;
  }
  kernel.future_write_seal = outcome(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_FUTURE_WRITE) == 0);
  kernel.future_write_kept =
      kernel.future_write_seal.worked() && !Pages(fd.get(), page, PROT_READ | PROT_WRITE).mapped();
  kernel.memfd_seals =
      outcome(::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
}

void probe_pages(KernelFacts& kernel) {
  Tried made;
  const UniqueFd fd = probe_memfd(kHugePageBytes, made);
  if (!made.worked()) {
    kernel.populate_write = kernel.collapse = made;
    return;
  }
  // As regions are made: 2 MiB aligned, one page touched, the rest left to MADV_COLLAPSE.
  const Result<Mapping> mapping =
      Mapping::map(fd.get(), kHugePageBytes, Access::read_write, "refitctl-doctor");
  if (!mapping) {
    kernel.populate_write = kernel.collapse = {mapping.error().native};
    return;
  }
  kernel.populate_write = outcome(::madvise(mapping->data(), 1, MADV_POPULATE_WRITE) == 0);
  kernel.collapse = outcome(::madvise(mapping->data(), kHugePageBytes, MADV_COLLAPSE) == 0);
  kernel.huge_bytes = huge_bytes_at(read_file("/proc/self/smaps"),
                                    reinterpret_cast<std::uintptr_t>(mapping->data()));
}

void probe_peers(KernelFacts& kernel) {
  const UniqueFd pidfd =
      UniqueFd::adopt(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  kernel.pidfd_open = outcome(static_cast<bool>(pidfd));

  std::array<int, 2> pair{};
  if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair.data()) != 0) {
    kernel.peer_pidfd = kernel.peer_groups = {errno};
    return;
  }
  const UniqueFd here = UniqueFd::adopt(pair[0]);
  const UniqueFd there = UniqueFd::adopt(pair[1]);
  int peer = -1;
  socklen_t length = sizeof peer;
  kernel.peer_pidfd =
      outcome(::getsockopt(here.get(), SOL_SOCKET, SO_PEERPIDFD, &peer, &length) == 0);
  const UniqueFd peer_pidfd = UniqueFd::adopt(peer);
  std::vector<gid_t> groups(65'536);
  length = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
  kernel.peer_groups =
      outcome(::getsockopt(here.get(), SOL_SOCKET, SO_PEERGROUPS, groups.data(), &length) == 0);
}

KernelFacts probe_kernel() {
  KernelFacts kernel;
  utsname name{};
  if (::uname(&name) == 0) kernel.release = std::string(name.sysname) + " " + name.release;
  probe_seals(kernel);
  probe_pages(kernel);
  probe_peers(kernel);
  kernel.shmem_enabled = read_file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  return kernel;
}

/// The tightest limit of this process's cgroup and those above it.
void probe_cgroup(LimitFacts& limits) {
  std::string path = cgroup_path(read_file("/proc/self/cgroup"));
  if (path.empty()) {
    // Version 1 has a number even where there is no limit: one that no host has.
    const auto limit = read_number("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    if (limit && *limit < (std::uint64_t{1} << 60)) {
      limits.cgroup_limit_bytes = limit;
      limits.cgroup_used_bytes = read_number("/sys/fs/cgroup/memory/memory.usage_in_bytes");
    }
    return;
  }
  for (;;) {
    const std::string folder = "/sys/fs/cgroup" + (path == "/" ? "" : path);
    const auto limit = read_number(folder + "/memory.max");
    if (limit && (!limits.cgroup_limit_bytes || *limit < *limits.cgroup_limit_bytes)) {
      limits.cgroup_limit_bytes = limit;
      limits.cgroup_used_bytes = read_number(folder + "/memory.current");
    }
    if (path == "/" || path.empty()) return;
    path.resize(std::min(path.rfind('/'), path.size()));
    if (path.empty()) path = "/";
  }
}

LimitFacts probe_limits() {
  LimitFacts limits;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    limits.files_soft = limit.rlim_cur;
    limits.files_hard = limit.rlim_max;
  }
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
    limits.locked_bytes = limit.rlim_cur;
  limits.map_count = read_number("/proc/sys/vm/max_map_count");
  probe_cgroup(limits);
  return limits;
}

CpuFacts probe_cpu() {
  CpuFacts cpu;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (::sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    cpu.cores = static_cast<unsigned>(CPU_COUNT(&allowed));
  const CopyCandidates& candidates = copy_candidates();
  for (std::size_t i = 0; i < candidates.count; ++i)
    cpu.copy_loops += (i == 0 ? "" : ", ") + std::string(candidates.kernels[i]->name);
#if defined(__x86_64__)
  cpu.known = true;
  cpu.avx2 = __builtin_cpu_supports("avx2") != 0;
  cpu.avx512 = __builtin_cpu_supports("avx512f") != 0;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kShaBit = 1U << 29U;  // CPUID.(EAX=7,ECX=0):EBX
  cpu.sha_ni = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (ebx & kShaBit) != 0;
#endif
  return cpu;
}

bool is_member(gid_t group) {
  if (::getegid() == group) return true;
  std::vector<gid_t> groups(65'536);
  const int count = ::getgroups(static_cast<int>(groups.size()), groups.data());
  return count > 0 &&
         std::find(groups.begin(), groups.begin() + count, group) != groups.begin() + count;
}

std::string group_label(gid_t gid) {
  std::vector<char> buffer(std::size_t{64} * 1024);
  group entry{};
  group* found = nullptr;
  if (::getgrgid_r(gid, &entry, buffer.data(), buffer.size(), &found) != 0 || found == nullptr)
    return std::to_string(gid);
  return found->gr_name;
}

/// The kernel's word on whether this user may connect; whoever accepted sees the end at once.
Tried try_connect(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) return {ENAMETOOLONG};
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  const UniqueFd socket =
      UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return {errno};
  return outcome(
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
}

SocketFacts probe_socket(const std::string& path) {
  SocketFacts socket;
  socket.path = path;
  struct stat status {};
  socket.looked_at = outcome(::lstat(path.c_str(), &status) == 0);
  if (!socket.looked_at.worked()) return socket;
  socket.is_socket = S_ISSOCK(status.st_mode);
  socket.owner = status.st_uid;
  socket.group = status.st_gid;
  socket.mode = status.st_mode;
  socket.owner_label = user_label(status.st_uid);
  socket.group_name = group_label(status.st_gid);
  socket.in_group = is_member(status.st_gid);
  if (socket.is_socket) socket.connected = try_connect(path);
  return socket;
}

WellKnownFacts probe_well_known() {
  WellKnownFacts known;
  const auto exists = [](const std::string& path) { return ::access(path.c_str(), F_OK) == 0; };
  if (const char* value = std::getenv("REFIT_SOCKET"); value != nullptr) known.variable = value;
  if (const char* folder = std::getenv("XDG_RUNTIME_DIR"); folder != nullptr) {
    known.user_path = std::string(folder) + "/refit/refitd.sock";
    known.user_exists = exists(known.user_path);
  }
  known.choice = default_socket_path();
  known.system_path = kSystemSocket;
  known.system_exists = exists(known.system_path);
  return known;
}

DaemonFacts probe_daemon(const Options& options) {
  DaemonFacts daemon;
  const Deadline deadline = deadline_of(options);
  const auto without = [&daemon](const Error& error) {
    daemon.error_code = static_cast<int>(error.code);
    daemon.error_message = error.message;
    return daemon;
  };
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return without(observer.error().error);
  const Result<DaemonStatus> status = observer->status(deadline);
  if (!status) return without(status.error());
  daemon.answered = true;
  daemon.version = status->version;
  daemon.waiting = waiting_name(status->waiting);
  daemon.copy_kernel = status->copy_kernel;
  daemon.pid = status->pid;
  daemon.copy_threads = status->copy_threads;
  daemon.draining = status->draining;
  return daemon;
}

/// Two processes of one namespace have one inode behind this link.
std::string pid_namespace(const std::string& process) {
  std::array<char, 64> text{};
  const ssize_t bytes =
      ::readlink(("/proc/" + process + "/ns/pid").c_str(), text.data(), text.size());
  return bytes <= 0 ? std::string() : std::string(text.data(), static_cast<std::size_t>(bytes));
}

CudaFacts probe_cuda(const DaemonFacts& daemon) {
  CudaFacts facts;
  facts.survey = survey_devices();
  const char* const pipes = std::getenv("CUDA_MPS_PIPE_DIRECTORY");
  facts.mps = ::access(pipes != nullptr ? pipes : "/tmp/nvidia-mps/control", F_OK) == 0;
  if (!daemon.answered) return facts;
  struct stat status {};
  const std::string process = std::to_string(daemon.pid);
  facts.daemon_of_this_uid =
      ::stat(("/proc/" + process).c_str(), &status) == 0 && status.st_uid == ::geteuid();
  const std::string theirs = pid_namespace(process);
  if (!theirs.empty()) facts.same_pid_namespace = theirs == pid_namespace("self");
  return facts;
}

}  // namespace

std::string cgroup_path(const std::string& text) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("0::", 0) == 0) return line.substr(3);
  }
  return {};
}

std::uint64_t huge_bytes_at(const std::string& smaps, std::uintptr_t address) {
  std::istringstream lines(smaps);
  bool inside = false;
  for (std::string line; std::getline(lines, line);) {
    std::uintptr_t start = 0;
    const auto parsed = std::from_chars(line.data(), line.data() + line.size(), start, 16);
    if (parsed.ec == std::errc() && parsed.ptr != line.data() + line.size() && *parsed.ptr == '-') {
      inside = start == address;
      continue;
    }
    constexpr std::string_view kKey = "ShmemPmdMapped:";
    if (!inside || line.rfind(kKey, 0) != 0) continue;
    return std::strtoull(line.c_str() + kKey.size(), nullptr, 10) * 1024;
  }
  return 0;
}

HostFacts probe_host(const Options& options) {
  HostFacts facts;
  facts.uid = ::geteuid();
  facts.own_version = REFITCTL_VERSION;
  facts.own_protocol = kProtocolVersion;
  facts.own_layout = kLayoutHash;
  facts.kernel = probe_kernel();
  facts.limits = probe_limits();
  facts.cpu = probe_cpu();
  facts.socket = probe_socket(options.socket_path);
  facts.socket_given = options.socket_given;
  facts.well_known = probe_well_known();
  facts.daemon = probe_daemon(options);
  facts.cuda = probe_cuda(facts.daemon);
  return facts;
}

}  // namespace refit::ctl
