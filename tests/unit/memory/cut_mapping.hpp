// CutMapping: mapped pages of an unsealed memfd whose second half was cut off, so that it faults.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>

namespace refit::test {

class CutMapping {
 public:
  static std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

  /// Two pages unless more are wanted; filled with 1.
  explicit CutMapping(std::size_t bytes = 2 * page_bytes()) : bytes_(bytes) {
    fd_ = memfd_create("cut-mapping", MFD_CLOEXEC);
    EXPECT_EQ(ftruncate(fd_, static_cast<off_t>(bytes)), 0);
    base_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    EXPECT_NE(base_, MAP_FAILED);
    std::memset(base_, 1, bytes);
    EXPECT_EQ(ftruncate(fd_, static_cast<off_t>(bytes / 2)), 0);
  }
  ~CutMapping() {
    munmap(base_, bytes_);
    close(fd_);
  }
  CutMapping(const CutMapping&) = delete;
  CutMapping& operator=(const CutMapping&) = delete;

  [[nodiscard]] std::byte* data() const { return static_cast<std::byte*>(base_); }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  [[nodiscard]] char* whole_page() const { return static_cast<char*>(base_); }
  [[nodiscard]] char* lost_page() const { return whole_page() + bytes_ / 2; }

 private:
  std::size_t bytes_;
  int fd_ = -1;
  void* base_ = nullptr;
};

}  // namespace refit::test
