// Settings: what the daemon runs with, as plain values.
//
// Any thread, by value. Where a value came from is not known here (config/configuration.hpp), nor
// what it may be (config/option.hpp).
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "refit/types.hpp"

namespace refit::daemon {

/// What one uid may use of the daemon at once.
struct Limits {
  std::uint64_t sessions_per_uid = 0;
  std::uint64_t requests_per_uid = 0;
  std::uint64_t regions_per_uid = 0;
  std::uint64_t registered_bytes_per_uid = 0;
  std::uint64_t unclaimed_fds_per_uid = 0;
  std::uint64_t tensors_per_uid = 0;
  std::uint64_t tensors_per_module = 0;
};

/// Who besides an engine's own uid may use engines of that name.
struct EngineRule {
  std::string name;            ///< glob, as fnmatch(3) reads it
  std::optional<uid_t> owner;  ///< the engine's uid; any if there is none
  std::vector<uid_t> uids;
  std::vector<gid_t> gids;
  friend bool operator==(const EngineRule&, const EngineRule&) = default;
};

struct CudaSettings {
  bool legacy_across_uids = false;
};

struct Settings {
  /// The built-in values, from the option table.
  Settings();

  Waiting waiting = Waiting::adaptive;
  unsigned copy_threads = 0;   ///< 0: one for each CPU this process may use
  unsigned check_threads = 0;  ///< likewise
  unsigned proof_threads = 0;  ///< 0: no proof in the background
  std::uint64_t drain_timeout_ms = 0;
  std::uint64_t hello_timeout_ms = 0;
  std::uint64_t fd_timeout_ms = 0;
  bool verbose = false;
  CudaSettings cuda;
  Limits limits;
  std::vector<EngineRule> engines;
};

}  // namespace refit::daemon
