// Shared host memory that tensors live in.
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

class REFIT_API SharedMemory {
 public:
  /// Allocates `bytes` (rounded up to 2 MiB), zeroed and backed, so that exhaustion is an error
  /// here and never a SIGBUS later. Errors: Errc::os (ENOSPC, ENOMEM, EMFILE), Errc::bad_argument
  /// for 0 bytes.
  /// @param label  shows in /proc/PID/maps and in error messages.
  [[nodiscard]] static Result<std::shared_ptr<SharedMemory>> allocate(std::size_t bytes,
                                                                      const char* label = "refit");
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  [[nodiscard]] std::byte* data() const noexcept;
  [[nodiscard]] std::size_t bytes() const noexcept;
  /// The memfd; owned by this object.
  [[nodiscard]] int fd() const noexcept;
  /// True if [address, address + size) lies inside.
  [[nodiscard]] bool contains(const void* address, std::size_t size) const noexcept;

 private:
  struct REFIT_LOCAL State;
  explicit SharedMemory(std::unique_ptr<State> state) noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace refit
