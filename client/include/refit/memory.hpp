// Memory that a daemon can reach, and shared host memory that tensors live in.
//
// A SharedMemory is a sealed memfd mapped at a 2 MiB boundary with huge pages asked for. The
// optimizer writes there and the engine reads there, so that a refit copies once. Threads: none of
// its own; the bytes are the caller's to order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "refit/api.hpp"
#include "refit/result.hpp"

namespace refit {

/// A range of memory that a module's tensors may lie in.
class REFIT_API Memory {
 public:
  virtual ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /// Of device memory an address of the device's, which a CPU cannot follow.
  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }
  /// True if [address, address + size) lies inside.
  [[nodiscard]] bool contains(const void* address, std::size_t size) const noexcept;

 protected:
  Memory(std::byte* data, std::size_t bytes) noexcept : data_(data), bytes_(bytes) {}

 private:
  std::byte* data_;
  std::size_t bytes_;
};

class REFIT_API SharedMemory final : public Memory {
 public:
  /// Allocates `bytes` (rounded up to 2 MiB, below 2 MiB to a page), zeroed and backed, so that
  /// exhaustion is an error here and never a SIGBUS later. Errors: Errc::os (ENOSPC, ENOMEM,
  /// EMFILE), Errc::bad_argument for 0 bytes.
  /// @param label  shows in /proc/PID/maps and in error messages.
  [[nodiscard]] static Result<std::shared_ptr<SharedMemory>> allocate(std::size_t bytes,
                                                                      const char* label = "refit");
  ~SharedMemory() override;

  /// The memfd; owned by this object.
  [[nodiscard]] int fd() const noexcept;

 private:
  struct REFIT_LOCAL State;
  explicit SharedMemory(std::unique_ptr<State> state) noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace refit
