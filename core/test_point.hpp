// Named points where a test build dies, stops or misbehaves on purpose. Nothing at all in a release
// build.
//
// A point is armed by REFIT_POINT="name=action" in the environment: kill (SIGKILL itself), stop
// (SIGSTOP itself, once), hang (the calling thread never goes on) or skip (test_point returns true:
// the caller leaves its next act out). A test proves that a point was hit by the process's death or
// stop, or by the wrong bytes.
#pragma once

#ifdef REFIT_TEST_POINTS

#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <string_view>

namespace refit {

inline bool test_point(std::string_view name) {
  static const char* const armed = std::getenv("REFIT_POINT");
  static bool stopped = false;
  if (armed == nullptr) return false;
  const std::string_view text(armed);
  const auto equals = text.find('=');
  if (text.substr(0, equals) != name || equals == std::string_view::npos) return false;
  const std::string_view action = text.substr(equals + 1);
  if (action == "kill") std::raise(SIGKILL);
  if (action == "stop" && !stopped) {
    stopped = true;
    ::kill(::getpid(), SIGSTOP);
  }
  while (action == "hang") ::pause();
  return action == "skip";
}

}  // namespace refit

#else

namespace refit {
constexpr bool test_point(const char*) noexcept { return false; }
}  // namespace refit

#endif
