// What stands behind a Residency: where every layer buffer is, the words that say so to the daemon,
// and the lock that makes layers hold still in a gate.
//
// Any thread. Knows no session: whoever calls speak() makes sure that the words stay mapped.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <vector>

#include "ipc/residency_word.hpp"
#include "ipc/shared_word.hpp"
#include "refit/residency.hpp"

namespace refit {

class Residency::State {
 public:
  void add_buffer(std::uint64_t bytes);
  void add_pool(std::uint32_t region, std::shared_ptr<Memory> memory);

  /// Says everything in `words` from now on, and nothing any more where it did before. Null:
  /// nowhere.
  void speak(SharedWord<std::uint64_t>* words);
  /// No Move is under way when it returns, and none begins before thaw().
  void freeze();
  void thaw();

  void begin_move();
  void end_move();
  void set_absent(std::uint32_t buffer);
  Result<void> set_resident(std::uint32_t buffer, const void* address);

 private:
  struct Buffer {
    std::uint64_t bytes = 0;
    ResidencyWord word{ResidencyState::absent, 0, 0, 0};
  };
  struct Pool {
    std::uint32_t region = 0;
    std::shared_ptr<Memory> memory;
  };
  void set(std::size_t buffer, ResidencyState state, std::uint32_t region, std::uint64_t offset);

  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned moving_ = 0;
  bool frozen_ = false;
  std::vector<Buffer> buffers_;
  std::vector<Pool> pools_;
  SharedWord<std::uint64_t>* words_ = nullptr;
};

}  // namespace refit
