// Reads device memory through pinned memory, chunk by chunk: one is handed out while the next one
// is copied. For the checker.
//
// Used by one thread at a time, which does all of it; as many readers as there are threads. Knows
// addresses only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <type_traits>

#include "memory/cuda/device.hpp"
#include "refit/result.hpp"

namespace refit::cuda {

class DeviceReader {
 public:
  /// Reads what `context` can reach. `buffer` is pinned, stays the caller's and outlives the
  /// reader; each half of it holds one chunk, so that it is of two bytes or more. Errors:
  /// Errc::cuda. Blocks in the driver for milliseconds.
  [[nodiscard]] static Result<std::unique_ptr<DeviceReader>> create(
      std::shared_ptr<const Context> context, std::span<std::byte> buffer);
  ~DeviceReader();
  DeviceReader(const DeviceReader&) = delete;
  DeviceReader& operator=(const DeviceReader&) = delete;

  /// Hands out `bytes` bytes from `address` on, in order; `take` has each span only during its
  /// call. What it reads was written before by work that is done: it waits for no stream.
  ///
  /// Errors: Errc::cuda, with the CUresult; some of the bytes may have been handed out, and none is
  /// being copied any more, but where the error is sticky: the next read fails then, too. Blocks
  /// until all is read. Allocates nothing unless it fails.
  template <typename Take>
  [[nodiscard]] Result<void> read(CUdeviceptr address, std::uint64_t bytes, Take&& take) {
    return read_chunks(
        address, bytes,
        [](void* context, std::span<const std::byte> chunk) {
          (*static_cast<std::remove_reference_t<Take>*>(context))(chunk);
        },
        const_cast<void*>(static_cast<const void*>(std::addressof(take))));
  }

 private:
  using TakeChunk = void (*)(void* context, std::span<const std::byte> chunk);

  DeviceReader(std::shared_ptr<const Context> context, std::span<std::byte> buffer) noexcept;
  [[nodiscard]] Result<void> open();
  [[nodiscard]] Result<void> read_chunks(CUdeviceptr address, std::uint64_t bytes, TakeChunk take,
                                         void* context);
  /// The call that failed, or null.
  [[nodiscard]] const char* pump(CUdeviceptr address, std::uint64_t bytes, TakeChunk take,
                                 void* context, CUresult& code) noexcept;

  const std::shared_ptr<const Context> context_;
  const Driver& driver_;
  std::span<std::byte> buffer_;
  std::uint64_t chunk_bytes_;
  CUstream stream_ = nullptr;
  std::array<CUevent, 2> copied_{};  // of each half
  CUresult broken_ = CUDA_SUCCESS;
};

}  // namespace refit::cuda
