// See memcpy_clock.hpp.

#include "dit/memcpy_clock.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <latch>
#include <thread>
#include <vector>

namespace dit {
namespace {

constexpr int kRounds = 5;

double copy_once(std::byte* target, const std::byte* source, std::size_t bytes, unsigned threads) {
  std::latch begin(1);
  std::vector<std::thread> copiers;
  for (unsigned i = 0; i < threads; ++i) {
    const std::size_t from = bytes * i / threads;
    const std::size_t to = bytes * (i + 1) / threads;
    copiers.emplace_back([&begin, target, source, from, to] {
      begin.wait();
      std::memcpy(target + from, source + from, to - from);
    });
  }
  const auto start = std::chrono::steady_clock::now();
  begin.count_down();
  for (std::thread& copier : copiers) copier.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

MemcpyTime best_memcpy(std::byte* target, const std::byte* source, std::size_t bytes) {
  MemcpyTime best;
  const unsigned cores = std::max(1U, std::thread::hardware_concurrency());
  for (unsigned threads = 1; threads <= cores; threads *= 2) {
    for (int round = 0; round < kRounds; ++round) {
      const double seconds = copy_once(target, source, bytes, threads);
      if (best.threads == 0 || seconds < best.seconds) best = {seconds, threads};
    }
  }
  return best;
}

}  // namespace dit
