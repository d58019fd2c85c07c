// The kernels of kernels/strided_copy.cu, loaded onto a device.
#pragma once

#include <array>
#include <memory>
#include <utility>

#include "memory/cast.hpp"
#include "memory/cuda/device.hpp"
#include "memory/cuda/kernels/strided_copy.hpp"

namespace refit::cuda {

/// Thread safe once loaded; unloaded when this ends, which is after the last launch.
class Kernels {
 public:
  /// Blocks in the driver, for as long as its compiler takes where no code fits the device and it
  /// has to make some. Errors: Errc::unsupported where this build has no kernels, the driver no
  /// call for them, or the device no use of pinned memory's own addresses; Errc::cuda with the
  /// code.
  [[nodiscard]] static Result<std::unique_ptr<Kernels>> load(
      const std::shared_ptr<const Context>& context);
  ~Kernels();
  Kernels(const Kernels&) = delete;
  Kernels& operator=(const Kernels&) = delete;

  /// Cast::none copies as it is.
  [[nodiscard]] CUfunction of(Cast cast) const noexcept {
    return functions_[static_cast<std::size_t>(cast)];
  }
  /// Queues one launch over a table on the device; `table` is copied before it returns. The
  /// context is current.
  [[nodiscard]] static CUresult launch(const Driver& driver, CUfunction kernel,
                                       StridedCopyTable table, CUstream stream) noexcept;

 private:
  explicit Kernels(std::shared_ptr<const Context> context) noexcept
      : context_(std::move(context)) {}

  std::shared_ptr<const Context> context_;
  CUmodule module_ = nullptr;
  std::array<CUfunction, kCastCount> functions_{};
};

}  // namespace refit::cuda
