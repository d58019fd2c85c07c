// Legacy IPC: handles that name a file in FAKECUDA_DIR.

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

/// What the 64 bytes say, scrambled by a salt in front of them: nobody may read them, and two
/// handles of one allocation differ.
struct HandleBytes {
  std::uint64_t salt;
  std::uint64_t kind;
  std::int64_t pid;
  std::uint64_t instance;
  std::uint64_t file;
  std::uint64_t nonce;
  std::uint64_t zeros[2];
};
static_assert(sizeof(HandleBytes) == CU_IPC_HANDLE_SIZE);
constexpr std::uint64_t kMemoryHandle = 0x6d;
constexpr std::uint64_t kEventHandle = 0x65;

void apply_salt(HandleBytes& bytes) {
  std::uint64_t words[sizeof bytes / sizeof(std::uint64_t)];
  std::memcpy(words, &bytes, sizeof bytes);
  for (std::size_t i = 1; i < std::size(words); ++i) words[i] ^= scramble(words[0] + i);
  std::memcpy(&bytes, words, sizeof bytes);
}

template <typename Handle>
void write_handle(Handle& handle, std::uint64_t kind, std::uint64_t file, std::uint64_t nonce) {
  static std::uint64_t written = 0;
  const ProcessId self = driver().process.id();
  HandleBytes bytes{
      scramble(self.instance + ++written), kind, self.pid, self.instance, file, nonce, {}};
  apply_salt(bytes);
  std::memcpy(handle.reserved, &bytes, sizeof bytes);
}

template <typename Handle>
std::optional<HandleBytes> read_handle(const Handle& handle, std::uint64_t kind) {
  HandleBytes bytes{};
  std::memcpy(&bytes, handle.reserved, sizeof bytes);
  apply_salt(bytes);
  const bool is_right = bytes.kind == kind && bytes.zeros[0] == 0 && bytes.zeros[1] == 0;
  return is_right ? std::optional(bytes) : std::nullopt;
}

/// Which of these the driver returns for a handle that it cannot follow is not documented.
CUresult cannot_follow() {
  return driver().one_of(
      {CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_MAP_FAILED});
}

bool may_open(std::uint32_t exporter_uid) {
  return driver().configuration.foreign_uid || exporter_uid == ::geteuid();
}

/// Puts this process onto the list of those that have the allocation open.
void enlist(MemoryPage& page) {
  const ProcessId self = driver().process.id();
  for (MemoryPage::Importer& importer : page.importers) {
    std::int64_t held_by = importer.pid.load();
    const bool is_free =
        held_by == 0 || !driver().process.is_alive({held_by, importer.instance.load()});
    if (!is_free || !importer.pid.compare_exchange_strong(held_by, self.pid)) continue;
    importer.instance.store(self.instance);
    return;
  }
}

void strike_off(MemoryPage& page) {
  const ProcessId self = driver().process.id();
  for (MemoryPage::Importer& importer : page.importers) {
    if (importer.pid.load() == self.pid && importer.instance.load() == self.instance) {
      importer.instance.store(0);
      importer.pid.store(0);
      return;
    }
  }
}

Range* find_import(std::uint64_t nonce) {
  Range* found = nullptr;
  driver().ranges.for_each([&](Range& range) {
    if (range.kind == RangeKind::import && range.context == Driver::current() &&
        range.backing->page().nonce == nonce)
      found = &range;
  });
  return found;
}

}  // namespace

CUresult ipc_get_mem_handle(CUipcMemHandle* handle, CUdeviceptr pointer) {
  Driver& driver = fakecuda::driver();
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (!driver.device(Driver::current()->device).ipc) return CUDA_ERROR_NOT_SUPPORTED;
  // Any pointer into the allocation gives a handle of the whole: measured on hardware by others.
  const Range* range = driver.ranges.find(pointer);
  if (range == nullptr || range->kind != RangeKind::allocation) return CUDA_ERROR_INVALID_VALUE;
  write_handle(*handle, kMemoryHandle, range->file, range->backing->page().nonce);
  return CUDA_SUCCESS;
}

CUresult ipc_open_mem_handle(CUdeviceptr* pointer, CUipcMemHandle handle, unsigned int flags) {
  Driver& driver = fakecuda::driver();
  if (pointer == nullptr || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
    return CUDA_ERROR_INVALID_VALUE;
  const auto bytes = read_handle(handle, kMemoryHandle);
  if (!bytes) return cannot_follow();
  const ProcessId exporter{bytes->pid, bytes->instance};
  if (driver.process.is_self(exporter)) return CUDA_ERROR_INVALID_CONTEXT;
  if (Range* range = find_import(bytes->nonce)) {
    ++range->opens;
    *pointer = range->base;
    return CUDA_SUCCESS;
  }
  auto file = SharedFile::open(driver.file_path("m-", exporter, bytes->file));
  auto backing = file ? Backing::adopt(std::move(*file)) : nullptr;
  if (backing == nullptr || backing->page().nonce != bytes->nonce ||
      backing->page().freed.load() != 0 || !driver.process.is_alive(exporter) ||
      !may_open(backing->page().exporter_uid))
    return cannot_follow();
  const int device = backing->device();
  if (device < 0 || static_cast<std::size_t>(device) >= driver.configuration.devices.size() ||
      driver.configuration.absent[static_cast<std::size_t>(device)])
    return CUDA_ERROR_INVALID_DEVICE;
  Range range;
  range.bytes = backing->bytes();
  range.base = driver.arena.take(range.bytes, std::uint64_t{2} << 20);
  if (range.base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  range.cpu = driver.arena.cpu(range.base);
  if (!backing->map_at(range.cpu)) return CUDA_ERROR_MAP_FAILED;
  enlist(backing->page());
  range.kind = RangeKind::import;
  range.device = device;
  range.context = Driver::current();
  range.backing = std::move(backing);
  range.opens = 1;
  *pointer = range.base;
  driver.ranges.add(std::move(range));
  return CUDA_SUCCESS;
}

CUresult ipc_close_mem_handle(CUdeviceptr pointer) {
  Driver& driver = fakecuda::driver();
  Range* range = driver.ranges.find(pointer);
  if (range == nullptr || range->base != pointer || range->kind != RangeKind::import)
    return driver.one_of({CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_HANDLE});
  if (range->opens > 1) {
    --range->opens;
    return CUDA_SUCCESS;
  }
  if (driver.engine.is_pending(range->base, range->bytes))
    driver.violation(text("cuIpcCloseMemHandle of ", Hex{pointer}, " while work on it is pending"));
  strike_off(range->backing->page());
  driver.release_range(pointer);
  return CUDA_SUCCESS;
}

CUresult ipc_get_event_handle(CUipcEventHandle* handle, CUevent event_handle) {
  const auto event = driver().events.find(event_handle);
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (!event->is_shared() || event->imported)
    return driver().one_of({CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_INVALID_VALUE});
  write_handle(*handle, kEventHandle, event->number, event->page().nonce);
  return CUDA_SUCCESS;
}

CUresult ipc_open_event_handle(CUevent* event_handle, CUipcEventHandle handle) {
  Driver& driver = fakecuda::driver();
  if (event_handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto bytes = read_handle(handle, kEventHandle);
  if (!bytes) return cannot_follow();
  const ProcessId creator{bytes->pid, bytes->instance};
  if (driver.process.is_self(creator)) return CUDA_ERROR_INVALID_CONTEXT;
  auto file = SharedFile::open(driver.file_path("e-", creator, bytes->file));
  auto event = file ? Event::import(Driver::current(), std::move(*file)) : nullptr;
  if (event == nullptr || event->page().nonce != bytes->nonce ||
      event->page().destroyed.load() != 0 || !driver.process.is_alive(creator) ||
      !may_open(event->page().creator_uid))
    return cannot_follow();
  *event_handle = driver.events.add(std::move(event));
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
