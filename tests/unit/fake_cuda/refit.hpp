// The refit in miniature that the table of seeds runs: a source process writes weights on its
// stream and records an event, a sink process copies them into memory of its own and on to the
// host, on two streams that an event orders. Each mistake leaves one wait out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "unit/fake_cuda/cuda_api.hpp"

namespace fakecuda::test {

enum class Mistake : std::uint64_t { none, no_wait_for_source, no_event_between_streams, no_sync };

inline constexpr std::size_t kWeightPieces = 5;
inline constexpr std::size_t kPieceBytes = 5000;
inline constexpr std::size_t kWeightBytes = kWeightPieces * kPieceBytes;

inline unsigned char weight(std::uint64_t seed, std::size_t i) {
  return static_cast<unsigned char>(1 + (seed * 31 + i * 7 + i / 256) % 200);
}

/// The 13.0 and the 12.8 ABI in turn.
inline CUresult batch_copy(CUdeviceptr to, CUdeviceptr from, std::uint64_t seed, CUstream stream) {
  std::vector<CUdeviceptr> tos;
  std::vector<CUdeviceptr> froms;
  std::vector<std::size_t> bytes(kWeightPieces, kPieceBytes);
  for (std::size_t i = 0; i < kWeightPieces; ++i) {
    tos.push_back(to + i * kPieceBytes);
    froms.push_back(from + i * kPieceBytes);
  }
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  std::size_t first = 0;
  std::size_t failed = 0;
  return seed % 2 == 0 ? cuda().batch_13000(tos.data(), froms.data(), bytes.data(), kWeightPieces,
                                            &attributes, &first, 1, stream)
                       : cuda().batch_12080(tos.data(), froms.data(), bytes.data(), kWeightPieces,
                                            &attributes, &first, 1, &failed, stream);
}

}  // namespace fakecuda::test
