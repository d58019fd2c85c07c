// libtorch's cast of one tensor, for the benchmark beside it. C++17, and nothing of libtorch in
// sight: its headers are for one translation unit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "refit/types.hpp"

namespace refit::bench {

class TorchCast {
 public:
  /// A source of random numbers and a target of zeros. `from` and `to` are float dtypes.
  TorchCast(DType from, DType to, std::int64_t elements);
  ~TorchCast();
  TorchCast(const TorchCast&) = delete;
  TorchCast& operator=(const TorchCast&) = delete;

  /// For all casts of this process.
  static void use_threads(int threads);

  /// copy_ of the source to the target.
  void run();

  [[nodiscard]] const std::byte* source() const;
  [[nodiscard]] const std::byte* target() const;

 private:
  struct Tensors;
  std::unique_ptr<Tensors> tensors_;
};

}  // namespace refit::bench
