#include "server/layer_reading.hpp"

#include "ipc/residency_word.hpp"

namespace refit::daemon {

Result<LayerPlace> LayerReading::look() {
  seen_ = word_.load();
  const bool unsaid = ResidencyWord::unpack(seen_).state == ResidencyState::unsaid;
  if (unsaid || ++attempts_ > kAttemptsMax) return LayerPlace{};
  return read_place(manifest_, buffer_, seen_);
}

bool LayerReading::held_still() const noexcept {
  // The load is not made before the bytes are read.
  std::atomic_thread_fence(std::memory_order_acquire);
  return word_.load() == seen_;
}

}  // namespace refit::daemon
