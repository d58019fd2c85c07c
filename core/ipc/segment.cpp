#include "ipc/segment.hpp"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <algorithm>
#include <cerrno>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace refit {
namespace {

namespace bip = boost::interprocess;

/// What mapped_region asks of a memory-mappable object.
struct BorrowedFd {
  int fd;
  [[nodiscard]] bip::mapping_handle_t get_mapping_handle() const noexcept {
    bip::mapping_handle_t handle{};
    handle.handle = fd;
    handle.is_xsi = false;
    return handle;
  }
};

/// Reserves address space of exactly `bytes` at a 2 MiB boundary; nullptr on failure.
void* reserve_aligned(std::size_t bytes) noexcept {
  const std::size_t padded = bytes + kHugePageBytes;
  void* base =
      ::mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  auto* const first = static_cast<std::byte*>(base);
  const std::size_t beyond = reinterpret_cast<std::uintptr_t>(base) % kHugePageBytes;
  const std::size_t lead = beyond == 0 ? 0 : kHugePageBytes - beyond;
  if (lead > 0) ::munmap(first, lead);
  ::munmap(first + lead + bytes, kHugePageBytes - lead);
  return first + lead;
}

/// Only a wish: a host that grants no huge page populates more slowly and is otherwise the same.
void collapse_to_huge_pages(const Mapping& mapping) noexcept {
  ::madvise(mapping.data(), mapping.bytes(), MADV_HUGEPAGE);
  // A range without any page is refused (EINVAL), a range full of small pages is copied at 3 s a
  // GiB (measured, Linux 6.18); one page in each 2 MiB makes the kernel fill the rest with zeros at
  // 0.05 s a GiB.
  for (std::size_t offset = 0; offset + kHugePageBytes <= mapping.bytes();
       offset += kHugePageBytes) {
    std::byte* start = mapping.data() + offset;
    if (::madvise(start, 1, MADV_POPULATE_WRITE) != 0) return;
    ::madvise(start, kHugePageBytes, MADV_COLLAPSE);
  }
}

}  // namespace

Result<Mapping> Mapping::map(int fd, std::size_t bytes, Access access, const std::string& label) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  if (bytes == 0) return fail(Errc::bad_region, label + ": cannot map zero bytes");
  const std::size_t rounded = (bytes + page - 1) & ~(page - 1);
  if (rounded < bytes) return fail(Errc::bad_region, label + ": the size overflows");
  void* address = reserve_aligned(rounded);
  if (address == nullptr) return fail_os(label + ": reserving address space", errno);
  try {
    Mapping mapping;
    // MAP_FIXED replaces our own reservation and nothing else; from here the region owns exactly
    // that range.
    mapping.region_ = bip::mapped_region(
        BorrowedFd{fd}, access == Access::read_only ? bip::read_only : bip::read_write, 0, bytes,
        address, MAP_SHARED | MAP_FIXED);
    // Tensor contents are user data; a crash report must not carry them.
    ::madvise(address, rounded, MADV_DONTDUMP);
    return mapping;
  } catch (const bip::interprocess_exception& error) {
    ::munmap(address, rounded);
    return fail_os(label + ": mapping " + std::to_string(bytes) + " bytes",
                   error.get_native_error());
  }
}

Result<UniqueFd> make_memfd(const std::string& label, std::size_t bytes) {
  UniqueFd fd = UniqueFd::adopt(::memfd_create(label.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return fail_os(label + ": memfd_create", errno);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return fail_os(label + ": sizing a memfd to " + std::to_string(bytes) + " bytes", errno);
  }
  return fd;
}

Result<void> back_with_memory(int fd, const Mapping& writable, const std::string& label) {
  collapse_to_huge_pages(writable);
  const std::size_t bytes = writable.bytes();
  const int code = ::posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  if (code != 0) return fail_os(label + ": allocating " + std::to_string(bytes) + " bytes", code);
  return {};
}

Result<void> add_seals(int fd, int seals, const std::string& label) {
  if (::fcntl(fd, F_ADD_SEALS, seals) != 0) return fail_os(label + ": F_ADD_SEALS", errno);
  return {};
}

Result<MemfdInfo> inspect_memfd(int fd, const std::string& label) {
  MemfdInfo info;
  // First the question that only the kernel's memory filesystems answer: fstat of a FUSE file would
  // ask whoever serves it, and wait.
  info.seals = ::fcntl(fd, F_GET_SEALS);
  if (info.seals < 0) {
    return fail(Errc::bad_region, label + ": the fd is no memfd on tmpfs; use refit::SharedMemory");
  }
  struct statfs filesystem {};
  if (::fstatfs(fd, &filesystem) != 0) return fail_os(label + ": fstatfs", errno);
  if (filesystem.f_type != TMPFS_MAGIC) {
    return fail(Errc::bad_region,
                label + ": the fd is not on tmpfs (hugetlb is not taken); use refit::SharedMemory");
  }
  struct stat status {};
  if (::fstat(fd, &status) != 0) return fail_os(label + ": fstat", errno);
  info.bytes = static_cast<std::uint64_t>(status.st_size);
  info.backed_bytes = static_cast<std::uint64_t>(status.st_blocks) * 512;
  info.device = status.st_dev;
  info.inode = status.st_ino;
  return info;
}

Result<void> populate(const Mapping& mapping, Access access, const std::string& label) {
  const int advice = access == Access::read_only ? MADV_POPULATE_READ : MADV_POPULATE_WRITE;
  // In steps, so that a signal that interrupts one costs little, and a huge region does not hold
  // the mmap lock for long.
  constexpr std::size_t kStepBytes = std::size_t{1} << 30;
  for (std::size_t offset = 0; offset < mapping.bytes();) {
    const std::size_t step = std::min(kStepBytes, mapping.bytes() - offset);
    if (::madvise(mapping.data() + offset, step, advice) == 0) {
      offset += step;
    } else if (errno != EINTR && errno != EAGAIN) {
      return fail_os(label + ": populating pages", errno);
    }
  }
  return {};
}

}  // namespace refit
