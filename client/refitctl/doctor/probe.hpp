// Finds out what this host can do, by doing it: each probe is small and leaves nothing behind.
//
// One thread; asks the kernel, /proc, /sys and the daemon. Knows nothing of what the facts mean.
#pragma once

#include "refitctl/doctor/facts.hpp"
#include "refitctl/options.hpp"

namespace refit::ctl {

[[nodiscard]] HostFacts probe_host(const Options& options);

/// Of the text of /proc/self/cgroup: the path below the v2 hierarchy; empty if there is none.
[[nodiscard]] std::string cgroup_path(const std::string& text);

/// Of the text of /proc/self/smaps: bytes that huge pages map of the mapping that starts at
/// `address`.
[[nodiscard]] std::uint64_t huge_bytes_at(const std::string& smaps, std::uintptr_t address);

}  // namespace refit::ctl
