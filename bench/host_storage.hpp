// Host memory: what tensors live in, and another process's mapping of it.
//
// One thread.
#pragma once

#include <optional>

#include "storage.hpp"

namespace refit::bench {

/// A mapping of a memfd at a 2 MiB boundary, where huge pages can be mapped as such.
class AlignedMapping {
 public:
  static Result<AlignedMapping> map(int fd, std::size_t bytes, int protection);
  ~AlignedMapping();
  AlignedMapping(AlignedMapping&& other) noexcept;
  AlignedMapping& operator=(AlignedMapping&& other) noexcept;
  [[nodiscard]] std::byte* data() const noexcept { return data_; }

 private:
  AlignedMapping(void* reserved, std::size_t reserved_bytes, std::byte* data)
      : reserved_(reserved), reserved_bytes_(reserved_bytes), data_(data) {}
  void* reserved_;
  std::size_t reserved_bytes_;
  std::byte* data_;
};

/// Seconds of one MADV_POPULATE for `protection` on a fresh mapping.
[[nodiscard]] Result<double> populate_fresh(int fd, std::size_t bytes, int protection);

/// Shared host memory: allocated here, or mapped and populated from what another process allocated.
class HostBytes {
 public:
  static Result<HostBytes> allocate(std::uint64_t bytes);
  static Result<HostBytes> map(const nlohmann::json& how, UniqueFd fd);

  [[nodiscard]] std::byte* data() const noexcept;
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] int fd() const noexcept;
  /// Null of what was mapped.
  [[nodiscard]] const std::shared_ptr<SharedMemory>& region() const noexcept { return memory_; }
  [[nodiscard]] Storage::Address share() const { return {{{"bytes", bytes_}}, fd()}; }

 private:
  std::shared_ptr<SharedMemory> memory_;
  std::optional<AlignedMapping> mapping_;
  UniqueFd fd_;
  std::uint64_t bytes_ = 0;
};

[[nodiscard]] std::unique_ptr<MemoryKind> make_host_kind();

}  // namespace refit::bench
