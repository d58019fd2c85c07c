#include "bound_engines.hpp"

#include <algorithm>

namespace refit {

std::vector<BoundEngine*>& bound_engines() {
  thread_local std::vector<BoundEngine*> engines;
  return engines;
}

bool BoundEnginesPump::pump() {
  bool any = false;
  for (BoundEngine* engine : bound_engines()) any |= engine->pump();
  return any;
}

bool BoundEnginesPump::due() const {
  const auto& engines = bound_engines();
  return std::any_of(engines.begin(), engines.end(),
                     [](const BoundEngine* engine) { return engine->due(); });
}

void BoundEnginesPump::append_fds(std::vector<pollfd>& fds) const {
  for (const BoundEngine* engine : bound_engines()) engine->append_fds(fds);
}

}  // namespace refit
