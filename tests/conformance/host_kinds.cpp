#include "conformance/memory_kinds.hpp"

namespace refit::test {

std::vector<MemoryKind> memory_kinds() { return {MemoryKind::host}; }

std::shared_ptr<ModelStorage> make_storage(MemoryKind, const std::vector<std::uint64_t>& bytes,
                                           int) {
  return std::make_shared<HostStorage>(bytes);
}

bool can_cast(MemoryKind) { return true; }

void end_of_test() {}

}  // namespace refit::test
