// eventually: waits for something that another process or thread brings about.
//
// The bound only ends a test that hangs; nothing is asserted about how long it took.
#pragma once

#include <chrono>
#include <thread>

namespace refit::test {

template <typename Condition>
bool eventually(Condition&& condition, std::chrono::milliseconds bound = std::chrono::seconds(20)) {
  const auto end = std::chrono::steady_clock::now() + bound;
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return condition();
}

}  // namespace refit::test
