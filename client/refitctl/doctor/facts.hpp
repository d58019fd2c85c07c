// What doctor finds out about this host, before it is judged.
//
// Plain values; any thread. Knows nothing of how they are found out and of what they mean.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "memory/device_survey.hpp"

namespace refit::ctl {

/// Whether something that was tried worked: 0, or the errno that it failed with.
struct Tried {
  int error = 0;
  [[nodiscard]] bool worked() const noexcept { return error == 0; }
};

struct KernelFacts {
  std::string release;
  Tried memfd_seals;               ///< memfd_create, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL
  Tried future_write_seal;         ///< F_SEAL_FUTURE_WRITE
  bool future_write_kept = false;  ///< a new writable mapping was refused after it
  Tried populate_write;            ///< MADV_POPULATE_WRITE of a memfd's pages
  Tried collapse;                  ///< MADV_COLLAPSE of 2 MiB of a memfd
  std::uint64_t huge_bytes = 0;    ///< of those, mapped by huge pages afterwards
  std::string shmem_enabled;       ///< the setting's file as it is; empty if it cannot be read
  Tried pidfd_open;
  Tried peer_pidfd;   ///< SO_PEERPIDFD
  Tried peer_groups;  ///< SO_PEERGROUPS
};

struct LimitFacts {
  std::uint64_t files_soft = 0, files_hard = 0;
  std::optional<std::uint64_t> locked_bytes;  ///< nothing: unlimited
  std::optional<std::uint64_t> map_count;     ///< vm.max_map_count
  std::optional<std::uint64_t> cgroup_limit_bytes, cgroup_used_bytes;
};

struct CpuFacts {
  unsigned cores = 0;  ///< that this process may use
  bool known = false;  ///< below is about an x86
  bool sha_ni = false, avx2 = false, avx512 = false;
  std::string copy_loops;  ///< those of which the daemon chooses one by trying
};

struct SocketFacts {
  std::string path;
  Tried looked_at;  ///< lstat
  bool is_socket = false;
  std::uint32_t owner = 0, group = 0, mode = 0;
  std::string owner_label, group_name;
  bool in_group = false;  ///< this process is of `group`
  Tried connected;        ///< a connection, closed at once
};

struct WellKnownFacts {
  std::string choice;     ///< what a client takes that is told nothing
  std::string variable;   ///< REFIT_SOCKET's value; empty if it is unset
  std::string user_path;  ///< empty if XDG_RUNTIME_DIR is unset
  bool user_exists = false;
  std::string system_path;
  bool system_exists = false;
};

struct DaemonFacts {
  bool answered = false;
  int error_code = 0;  ///< an Errc, if it did not
  std::string error_message;
  std::string version, waiting, copy_kernel;
  std::uint32_t pid = 0, copy_threads = 0;
  bool draining = false;
};

/// What CUDA memory needs beside the driver.
struct CudaFacts {
  DeviceSurvey survey;
  bool mps = false;  ///< the Multi-Process Service seems to run
  bool daemon_of_this_uid = false;
  std::optional<bool> same_pid_namespace;  ///< as the daemon; nothing if it cannot be told
};

struct HostFacts {
  std::uint32_t uid = 0;
  std::string own_version;
  std::uint32_t own_protocol = 0;
  std::uint64_t own_layout = 0;
  KernelFacts kernel;
  LimitFacts limits;
  CpuFacts cpu;
  SocketFacts socket;  ///< the one that these options name
  bool socket_given = false;
  WellKnownFacts well_known;
  DaemonFacts daemon;
  CudaFacts cuda;
};

}  // namespace refit::ctl
