#include "memory/cuda/pinned.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace refit::cuda {

Result<PinnedRange> PinnedRange::pin(std::shared_ptr<const Context> context, std::byte* data,
                                     std::size_t bytes, Access access, const std::string& label,
                                     std::size_t call_bytes_max) {
  const std::size_t part =
      std::max(call_bytes_max / kHugePageBytes, std::size_t{1}) * kHugePageBytes;
  PinnedRange range(std::move(context), data, part);
  if (bytes == 0) return range;
  const Device& device = range.context_->device();
  const Driver& driver = range.context_->driver();
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  if (reinterpret_cast<std::uintptr_t>(data) % page != 0)
    return fail(Errc::bad_argument, label + ": only whole pages are pinned");
  // Kernels read and write it where it is, too.
  unsigned int flags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP;
  if (access == Access::read_only) {
    if (!device.read_only_host_register)
      return fail(Errc::unsupported, label + ": device " + device.label() +
                                         " pins no memory that is mapped read-only");
    flags |= CU_MEMHOSTREGISTER_READ_ONLY;
  }
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*range.context_));
  while (range.bytes_ < bytes) {
    const std::size_t next = std::min(part, bytes - range.bytes_);
    const CUresult code = driver.mem_host_register(data + range.bytes_, next, flags);
    if (code != CUDA_SUCCESS) {
      Unexpected error = fail_cuda(driver,
                                   label + ": pinning " + std::to_string(next) + " bytes from " +
                                       std::to_string(range.bytes_) + " on (cuMemHostRegister)",
                                   code);
      if (code == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED) {
        error.value().code = Errc::bad_argument;
        error.value().native = 0;
      }
      return error;
    }
    range.bytes_ += next;
  }
  return range;
}

PinnedRange::~PinnedRange() {
  if (bytes_ == 0) return;
  const auto current = Current::enter(*context_);
  if (!current) return;
  for (std::size_t at = 0; at < bytes_; at += part_bytes_)
    static_cast<void>(context_->driver().mem_host_unregister(data_ + at));
}

Result<std::unique_ptr<PinnedBuffer>> PinnedBuffer::allocate(std::shared_ptr<const Context> context,
                                                             std::size_t bytes,
                                                             const std::string& label) {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t whole = std::max((bytes + page - 1) / page, std::size_t{1}) * page;
  // Pages of the kernel's are zeroed, and faulted in by what pins them.
  void* const mapped =
      ::mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED)
    return fail_os(label + ": mapping " + std::to_string(whole) + " bytes", errno);
  std::unique_ptr<std::byte[], Unmap> memory(static_cast<std::byte*>(mapped), {whole});
  // Tensors pass through it, and a crash report must not carry them.
  ::madvise(mapped, whole, MADV_DONTDUMP);
  REFIT_TRY_ASSIGN(auto range, PinnedRange::pin(std::move(context), memory.get(), whole,
                                                Access::read_write, label));
  return std::unique_ptr<PinnedBuffer>(new PinnedBuffer(std::move(memory), std::move(range)));
}

void PinnedBuffer::Unmap::operator()(std::byte* memory) const noexcept { ::munmap(memory, bytes); }

}  // namespace refit::cuda
