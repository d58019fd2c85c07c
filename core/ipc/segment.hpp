// Sealed memfd segments and their mappings: what a session's regions and shared tensors are made
// of.
//
// No thread of its own. Mappings are Boost.Interprocess mapped_regions over the memfd, placed at 2
// MiB boundaries so that huge pages can back them. A memfd has no name to leak and its SHRINK seal
// makes truncation impossible.
#pragma once

#include <boost/interprocess/mapped_region.hpp>
#include <cstddef>
#include <cstdint>
#include <string>

#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit {

inline constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

enum class Access { read_only, read_write };

/// A mapped range of a memfd, page aligned, 2 MiB aligned where it is that large. Left out of core
/// dumps.
class Mapping {
 public:
  Mapping() = default;
  /// Maps [0, bytes) of `fd`, which may be closed afterwards. `label` names the object in errors.
  static Result<Mapping> map(int fd, std::size_t bytes, Access access, const std::string& label);

  [[nodiscard]] std::byte* data() const noexcept {
    return static_cast<std::byte*>(region_.get_address());
  }
  [[nodiscard]] std::size_t bytes() const noexcept { return region_.get_size(); }

 private:
  boost::interprocess::mapped_region region_;
};

/// Makes a memfd of `bytes` without seals and without pages.
Result<UniqueFd> make_memfd(const std::string& label, std::size_t bytes);

/// Gives a memfd without pages all of its memory now, so that exhaustion is ENOSPC here and not a
/// SIGBUS later: in huge pages as far as the host grants them. `writable` maps the whole of it.
Result<void> back_with_memory(int fd, const Mapping& writable, const std::string& label);

/// Adds seals; F_SEAL_* of fcntl(2).
Result<void> add_seals(int fd, int seals, const std::string& label);

/// What a memfd that a peer sent really is.
struct MemfdInfo {
  std::uint64_t bytes = 0;
  std::uint64_t backed_bytes = 0;  ///< what has memory behind it already
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  int seals = 0;
};

/// Checks that `fd` is a file on tmpfs that can be sealed, and reads its size and seals;
/// Errc::bad_region otherwise. Never blocks on a foreign filesystem.
Result<MemfdInfo> inspect_memfd(int fd, const std::string& label);

/// Faults in all pages now: MADV_POPULATE_WRITE or _READ by `access`. Blocks for as long as that
/// takes.
Result<void> populate(const Mapping& mapping, Access access, const std::string& label);

}  // namespace refit
