// Host memory that devices copy from and to without a detour: page-locked by the driver.
//
// Pinning is per process and takes as long as faulting the pages in; whole regions at once, on a
// thread that may block. Seal a memfd before: its pages stay locked where they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "ipc/segment.hpp"
#include "memory/cuda/device.hpp"

namespace refit::cuda {

class PinnedRange {
 public:
  /// Drivers refuse half a TiB in one call.
  static constexpr std::size_t kCallBytesMax = std::size_t{256} << 30;

  /// Pins [data, data + bytes), page aligned and mapped, for all devices of this process; of
  /// nothing, nothing. Unmapping it is for after this object. Errors: Errc::unsupported for a
  /// read-only mapping on a device that cannot take one; Errc::bad_argument for what is pinned
  /// already, or not page aligned; Errc::cuda. Nothing stays pinned then.
  /// @param access          of the mapping.
  /// @param call_bytes_max  for one call of the driver; rounded down to 2 MiB, at least that.
  [[nodiscard]] static Result<PinnedRange> pin(std::shared_ptr<const Context> context,
                                               std::byte* data, std::size_t bytes, Access access,
                                               const std::string& label,
                                               std::size_t call_bytes_max = kCallBytesMax);
  PinnedRange(PinnedRange&& other) noexcept
      : context_(std::move(other.context_)),
        data_(other.data_),
        bytes_(std::exchange(other.bytes_, 0)),
        part_bytes_(other.part_bytes_) {}
  PinnedRange& operator=(PinnedRange&&) = delete;
  /// Unpins; no copy may use it any more.
  ~PinnedRange();

  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  /// It is pinned in parts of so many bytes, the last one shorter. One copy must not cross from
  /// one part to the next: to the driver they are two allocations.
  [[nodiscard]] std::size_t part_bytes() const noexcept { return part_bytes_; }

 private:
  PinnedRange(std::shared_ptr<const Context> context, std::byte* data,
              std::size_t part_bytes) noexcept
      : context_(std::move(context)), data_(data), part_bytes_(part_bytes) {}

  std::shared_ptr<const Context> context_;
  std::byte* data_;
  std::size_t bytes_ = 0;  ///< that are pinned, from data_ on
  std::size_t part_bytes_;
};

/// Memory of this process that is pinned for as long as this lives.
class PinnedBuffer {
 public:
  /// At least `bytes`, rounded up to pages, zeroed. Errors: those of PinnedRange::pin(), Errc::os
  /// (ENOMEM).
  [[nodiscard]] static Result<std::unique_ptr<PinnedBuffer>> allocate(
      std::shared_ptr<const Context> context, std::size_t bytes, const std::string& label);
  [[nodiscard]] std::byte* data() const noexcept { return memory_.get(); }

 private:
  struct Unmap {
    std::size_t bytes = 0;
    void operator()(std::byte* memory) const noexcept;
  };
  PinnedBuffer(std::unique_ptr<std::byte[], Unmap> memory, PinnedRange&& range) noexcept
      : memory_(std::move(memory)), range_(std::move(range)) {}

  std::unique_ptr<std::byte[], Unmap> memory_;
  PinnedRange range_;
};

}  // namespace refit::cuda
