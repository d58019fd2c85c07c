#include "refit/memory.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "ipc/segment.hpp"

namespace refit {

struct SharedMemory::State {
  UniqueFd fd;
  Mapping mapping;
};

Memory::~Memory() = default;

SharedMemory::SharedMemory(std::unique_ptr<State> state) noexcept
    : Memory(state->mapping.data(), state->mapping.bytes()), state_(std::move(state)) {}
SharedMemory::~SharedMemory() = default;

Result<std::shared_ptr<SharedMemory>> SharedMemory::allocate(std::size_t bytes, const char* label) {
  if (bytes == 0)
    return fail(Errc::bad_argument,
                std::string(label) + ": cannot allocate zero bytes of shared memory");
  // A last huge page that is part empty costs less than small pages do; in small memory it is most
  // of what there is.
  const std::size_t unit =
      bytes < kHugePageBytes ? static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)) : kHugePageBytes;
  const std::size_t rounded = (bytes + unit - 1) & ~(unit - 1);
  if (rounded < bytes) return fail(Errc::bad_argument, std::string(label) + ": the size overflows");
  auto state = std::make_unique<State>();
  REFIT_TRY_ASSIGN(state->fd, make_memfd(label, rounded));
  REFIT_TRY(add_seals(state->fd.get(), F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL, label));
  REFIT_TRY_ASSIGN(state->mapping,
                   Mapping::map(state->fd.get(), rounded, Access::read_write, label));
  REFIT_TRY(back_with_memory(state->fd.get(), state->mapping, label));
  return std::shared_ptr<SharedMemory>(new SharedMemory(std::move(state)));
}

int SharedMemory::fd() const noexcept { return state_->fd.get(); }

bool Memory::contains(const void* address, std::size_t size) const noexcept {
  const auto start = reinterpret_cast<std::uintptr_t>(data());
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  return first >= start && first - start <= bytes() && size <= bytes() - (first - start);
}

}  // namespace refit
