#include "refit/result.hpp"

#include <cstring>

namespace refit {

Unexpected fail_os(const std::string& what, int native) {
  return Unexpected(Error{Errc::os, native, what + ": " + std::strerror(native), {}});
}

}  // namespace refit
