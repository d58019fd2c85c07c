#include "support/fake_cuda/shared_file.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <ctime>
#include <utility>

namespace fakecuda {

std::optional<SharedFile> SharedFile::adopt(int fd) {
  SharedFile file;
  file.fd_ = fd;
  struct stat status {};
  if (fd < 0 || ::fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  file.bytes_ = static_cast<std::size_t>(status.st_size);
  if (file.bytes_ < kPage || file.bytes_ % kPage != 0) return std::nullopt;
  void* tail = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd,
                      static_cast<off_t>(file.bytes_ - kPage));
  if (tail == MAP_FAILED) return std::nullopt;
  file.tail_ = tail;
  return file;
}

std::optional<SharedFile> SharedFile::create(const std::string& path, std::size_t bytes) {
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0) return std::nullopt;
  if (::fchmod(fd, 0666) != 0 || ::ftruncate(fd, static_cast<off_t>(bytes)) != 0) {
    ::close(fd);
    return std::nullopt;
  }
  return adopt(fd);
}

std::optional<SharedFile> SharedFile::create_memfd(std::size_t bytes) {
  const int fd = ::memfd_create("fakecuda", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return std::nullopt;
  // An fd of the real driver cannot be resized by who holds it.
  if (::ftruncate(fd, static_cast<off_t>(bytes)) != 0 ||
      ::fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    ::close(fd);
    return std::nullopt;
  }
  return adopt(fd);
}

std::optional<SharedFile> SharedFile::open(const std::string& path) {
  return adopt(::open(path.c_str(), O_RDWR | O_CLOEXEC));
}

SharedFile::~SharedFile() {
  if (tail_ != nullptr) ::munmap(tail_, kPage);
  if (fd_ >= 0) ::close(fd_);
}

SharedFile::SharedFile(SharedFile&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      bytes_(std::exchange(other.bytes_, 0)),
      tail_(std::exchange(other.tail_, nullptr)) {}

SharedFile& SharedFile::operator=(SharedFile&& other) noexcept {
  std::swap(fd_, other.fd_);
  std::swap(bytes_, other.bytes_);
  std::swap(tail_, other.tail_);
  return *this;
}

bool Doorbell::open(const std::string& directory) {
  const int fd = ::open((directory + "/doorbell").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return false;
  // Only its owner may change the mode; for the others it is already as it should be.
  if (::fchmod(fd, 0666) != 0 && errno != EPERM) {
    ::close(fd);
    return false;
  }
  void* page = MAP_FAILED;
  if (::ftruncate(fd, kPage) == 0)
    page = ::mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (page == MAP_FAILED) return false;
  word_ = static_cast<std::atomic<std::uint32_t>*>(page);
  return true;
}

void Doorbell::ring() {
  word_->fetch_add(1);
  ::syscall(SYS_futex, word_, FUTEX_WAKE, 0x7fff'ffff, nullptr, nullptr, 0);
}

void Doorbell::wait(std::uint32_t observed, bool may_die) const {
  // Nothing is decided by this bound: who wakes looks at the same conditions again. It is there
  // because a killed process rings no bell, and its flock has nobody who could be told.
  const timespec bound{0, 20'000'000};
  ::syscall(SYS_futex, word_, FUTEX_WAIT, observed, may_die ? &bound : nullptr, nullptr, 0);
}

}  // namespace fakecuda
