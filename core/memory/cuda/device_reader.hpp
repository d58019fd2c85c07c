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

  /// Begins to read `bytes` bytes from `address` on, and gives up what it read before. What it
  /// reads was written before by work that is done: it waits for no stream of others.
  ///
  /// Errors: Errc::cuda, with the CUresult. None of the bytes is being copied any more then, but
  /// where the error is sticky: the next call fails then, too.
  [[nodiscard]] Result<void> begin(CUdeviceptr address, std::uint64_t bytes);

  /// The next of them, in order, in a span that lives until the next call; none behind the last.
  /// Errors as of begin(), which is what may be called then. Blocks until they are there. Allocates
  /// nothing unless it fails.
  [[nodiscard]] Result<std::span<const std::byte>> next();

  /// Gives up what is being read, so that nothing writes to the buffer any more. Errors as of
  /// begin().
  [[nodiscard]] Result<void> stop();

 private:
  DeviceReader(std::shared_ptr<const Context> context, std::span<std::byte> buffer) noexcept;
  [[nodiscard]] Result<void> open();
  [[nodiscard]] std::span<std::byte> half(std::uint64_t chunk) const noexcept;
  /// Calls `body` in the context; it returns the driver call that failed, or null.
  template <typename Body>
  [[nodiscard]] Result<void> drive(Body&& body);
  [[nodiscard]] const char* copy_next(CUresult& code) noexcept;

  const std::shared_ptr<const Context> context_;
  const Driver& driver_;
  std::span<std::byte> buffer_;
  std::uint64_t chunk_bytes_;
  CUstream stream_ = nullptr;
  std::array<CUevent, 2> copied_{};  // of each half

  CUdeviceptr address_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t chunks_ = 0;
  std::uint64_t begun_ = 0;       // chunks whose copies were begun
  std::uint64_t handed_out_ = 0;  // the last of them may still be in use
  CUresult broken_ = CUDA_SUCCESS;
};

}  // namespace refit::cuda
