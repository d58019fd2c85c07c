// Host memory and its floor. See host_storage.hpp.
//
// One thread; the floor's copies run on a team of their own.
#include "host_storage.hpp"

#include <sys/mman.h>

#include <cerrno>

#include "floor.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

constexpr std::size_t kHugeBytes = std::size_t{2} << 20;

class HostFloor final : public Floor {
 public:
  HostFloor(std::byte* to, const std::byte* from, std::uint64_t bytes)
      : to_(to), from_(from), bytes_(bytes) {}

  Result<Calibration> calibrate(int rounds) override {
    const CopyTeam::Calibration found = team_.calibrate(to_, from_, bytes_, rounds);
    winner_ = found.winner;
    return Calibration{winner_.to_string(), found.best_s, found.medians_s};
  }
  Result<double> copy() override { return team_.copy(winner_, to_, from_, bytes_); }

 private:
  std::byte* to_;
  const std::byte* from_;
  std::uint64_t bytes_;
  CopyTeam team_;
  CopyMethod winner_;
};

class HostStorage final : public Storage {
 public:
  HostStorage(Side side, HostBytes bytes) : Storage(std::move(side)), bytes_(std::move(bytes)) {
    lie_at(bytes_.data(), bytes_.data());
    register_in(bytes_.region());
  }

  Result<Address> share() override { return bytes_.share(); }
  Result<std::unique_ptr<Floor>> floor_from(const Storage& source, std::uint64_t bytes) override {
    return std::make_unique<HostFloor>(address(), source.address(), bytes);
  }
  Result<std::pair<double, std::uint64_t>> populate_fresh(int protection) const override {
    REFIT_TRY_ASSIGN(const double seconds,
                     bench::populate_fresh(bytes_.fd(), bytes_.bytes(), protection));
    return std::pair(seconds, bytes_.bytes());
  }

 private:
  HostBytes bytes_;
};

class HostKind final : public MemoryKind {
 public:
  Result<std::unique_ptr<Storage>> source(Side side) override { return allocate(std::move(side)); }
  Result<std::unique_ptr<Storage>> target(Side side) override { return allocate(std::move(side)); }
  Result<std::unique_ptr<Storage>> map_target(Side side, const nlohmann::json& how,
                                              UniqueFd fd) override {
    REFIT_TRY_ASSIGN(HostBytes bytes, HostBytes::map(how, std::move(fd)));
    return std::make_unique<HostStorage>(std::move(side), std::move(bytes));
  }

 private:
  static Result<std::unique_ptr<Storage>> allocate(Side side) {
    REFIT_TRY_ASSIGN(HostBytes bytes, HostBytes::allocate(side.layout.bytes));
    return std::make_unique<HostStorage>(std::move(side), std::move(bytes));
  }
};

}  // namespace

Result<AlignedMapping> AlignedMapping::map(int fd, std::size_t bytes, int protection) {
  void* reserved = ::mmap(nullptr, bytes + kHugeBytes, PROT_NONE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) return fail_os("mmap", errno);
  auto* begin = static_cast<std::byte*>(reserved);
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(begin) % kHugeBytes;
  std::byte* aligned = begin + (misaligned == 0 ? 0 : kHugeBytes - misaligned);
  AlignedMapping mapping(begin, bytes + kHugeBytes, aligned);
  if (::mmap(aligned, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
    return fail_os("mmap", errno);
  return mapping;
}

AlignedMapping::~AlignedMapping() {
  if (reserved_ != nullptr) ::munmap(reserved_, reserved_bytes_);
}

AlignedMapping::AlignedMapping(AlignedMapping&& other) noexcept
    : reserved_(std::exchange(other.reserved_, nullptr)),
      reserved_bytes_(other.reserved_bytes_),
      data_(other.data_) {}

AlignedMapping& AlignedMapping::operator=(AlignedMapping&& other) noexcept {
  std::swap(reserved_, other.reserved_);
  std::swap(reserved_bytes_, other.reserved_bytes_);
  std::swap(data_, other.data_);
  return *this;
}

Result<double> populate_fresh(int fd, std::size_t bytes, int protection) {
  REFIT_TRY_ASSIGN(const auto mapping, AlignedMapping::map(fd, bytes, protection));
  const int advice = (protection & PROT_WRITE) != 0 ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
  int result = 0;
  const double seconds = seconds_of([&] { result = ::madvise(mapping.data(), bytes, advice); });
  if (result != 0) return fail_os("madvise(MADV_POPULATE)", errno);
  return seconds;
}

Result<HostBytes> HostBytes::allocate(std::uint64_t bytes) {
  HostBytes made;
  REFIT_TRY_ASSIGN(made.memory_, SharedMemory::allocate(bytes, kTensorLabel));
  made.bytes_ = made.memory_->bytes();
  return made;
}

Result<HostBytes> HostBytes::map(const nlohmann::json& how, UniqueFd fd) {
  HostBytes made;
  made.bytes_ = how.at("bytes").get<std::uint64_t>();
  REFIT_TRY_ASSIGN(made.mapping_,
                   AlignedMapping::map(fd.get(), made.bytes_, PROT_READ | PROT_WRITE));
  made.fd_ = std::move(fd);
  if (::madvise(made.data(), made.bytes_, MADV_POPULATE_WRITE) != 0)
    return fail_os("madvise(MADV_POPULATE_WRITE)", errno);
  return made;
}

std::byte* HostBytes::data() const noexcept {
  return memory_ != nullptr ? memory_->data() : mapping_->data();
}

int HostBytes::fd() const noexcept { return memory_ != nullptr ? memory_->fd() : fd_.get(); }

std::unique_ptr<MemoryKind> make_host_kind() { return std::make_unique<HostKind>(); }

}  // namespace refit::bench
