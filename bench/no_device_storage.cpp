// What stands behind device_storage.hpp where CUDA's headers were not found.
#include "device_storage.hpp"

namespace refit::bench {

Result<std::unique_ptr<MemoryKind>> make_device_kind(const std::string& name) {
  return fail(Errc::unsupported, "--memory " + name +
                                     ": this build is for host memory only: it was configured "
                                     "without CUDA's headers");
}

}  // namespace refit::bench
