#include "support/fake_cuda/memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "support/fake_cuda/process.hpp"

namespace fakecuda {
namespace {

constexpr std::uint64_t round_up(std::uint64_t bytes, std::uint64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

void* reserve(std::size_t bytes) {
  return ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}

}  // namespace

std::size_t Backing::file_bytes(std::uint64_t bytes) { return round_up(bytes, kPage) + kPage; }

std::shared_ptr<Backing> Backing::create(SharedFile file, std::uint64_t bytes, int device,
                                         unsigned int handle_types, ProcessId exporter,
                                         std::uint64_t nonce) {
  std::shared_ptr<Backing> backing(new Backing(std::move(file)));
  MemoryPage& page = backing->page();
  page.bytes = bytes;
  page.device = device;
  page.handle_types = handle_types;
  page.exporter_pid = exporter.pid;
  page.exporter_instance = exporter.instance;
  page.exporter_uid = ::geteuid();
  page.nonce = nonce;
  page.magic = MemoryPage::kMagic;
  // Taken now: a full file system would be a SIGBUS later.
  if (::posix_fallocate(backing->fd(), 0, static_cast<off_t>(backing->filled_bytes())) != 0)
    return nullptr;
  backing->fill(kFresh);
  return backing;
}

std::shared_ptr<Backing> Backing::adopt(SharedFile file) {
  const auto* page = file.tail<MemoryPage>();
  if (page->magic != MemoryPage::kMagic || file_bytes(page->bytes) != file.bytes()) return nullptr;
  return std::shared_ptr<Backing>(new Backing(std::move(file)));
}

bool Backing::map_at(void* where) const {
  return ::mmap(where, round_up(bytes(), kPage), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
                file_.fd(), 0) != MAP_FAILED;
}

std::size_t Backing::filled_bytes() const {
  constexpr std::uint64_t kFilledMax = std::uint64_t{64} << 20;
  return std::min(bytes(), kFilledMax);
}

void Backing::fill(unsigned char value) const {
  const std::size_t filled = filled_bytes();
  void* bytes =
      ::mmap(nullptr, round_up(filled, kPage), PROT_READ | PROT_WRITE, MAP_SHARED, file_.fd(), 0);
  if (bytes == MAP_FAILED) return;
  std::memset(bytes, value, filled);
  ::munmap(bytes, round_up(filled, kPage));
}

bool Arena::open() {
  void* device = reserve(kBytes);
  void* cpu = reserve(kBytes);
  if (device == MAP_FAILED || cpu == MAP_FAILED) return false;
  // Both begin on the same page offset of the largest alignment that anybody asks for.
  device_ = round_up(reinterpret_cast<std::uint64_t>(device), kAlignment);
  cpu_ = static_cast<std::byte*>(cpu);
  return true;
}

std::uint64_t Arena::take(std::uint64_t bytes, std::uint64_t alignment) {
  // Every range is followed by addresses that belong to none.
  const std::uint64_t padded = round_up(bytes, alignment) + alignment;
  for (auto [found, end] = free_.equal_range(padded); found != end; ++found) {
    const std::uint64_t base = found->second;
    if (base % alignment != 0) continue;
    free_.erase(found);
    taken_[base] = padded;
    return base;
  }
  const std::uint64_t offset = round_up(used_, alignment);
  if (bytes > kUsable || offset + padded > kUsable) return 0;
  used_ = offset + padded;
  taken_[device_ + offset] = padded;
  return device_ + offset;
}

std::byte* Arena::cpu(std::uint64_t address) const { return cpu_ + (address - device_); }

bool Arena::contains(std::uint64_t address) const {
  return address >= device_ && address < device_ + kUsable;
}

void Arena::unmap(std::uint64_t base, std::uint64_t bytes) {
  ::mmap(cpu(base), round_up(bytes, kPage), PROT_NONE,
         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
}

void Arena::give_back(std::uint64_t base, std::uint64_t bytes, bool reuse) {
  unmap(base, bytes);
  const auto found = taken_.find(base);
  if (found == taken_.end()) return;
  if (reuse) free_.emplace(found->second, base);
  taken_.erase(found);
}

Range& Ranges::add(Range range) {
  range.id = next_id_++;
  ++counts_[index(range.kind)];
  bytes_[index(range.kind)] += range.bytes;
  freed_.erase(range.base);
  return ranges_[range.base] = std::move(range);
}

void Ranges::erase(std::uint64_t base) {
  const auto found = ranges_.find(base);
  --counts_[index(found->second.kind)];
  bytes_[index(found->second.kind)] -= found->second.bytes;
  freed_[base] = found->second.bytes;
  ranges_.erase(found);
}

Range* Ranges::find(std::uint64_t address) { return overlapping(address, 1); }

Range* Ranges::overlapping(std::uint64_t address, std::uint64_t bytes) {
  auto next = ranges_.lower_bound(address + bytes);
  if (next == ranges_.begin()) return nullptr;
  Range& range = std::prev(next)->second;
  return range.end() > address ? &range : nullptr;
}

std::optional<std::string> Ranges::complaint(std::uint64_t address, std::uint64_t bytes, bool write,
                                             int device) {
  const std::uint64_t end = address + bytes;
  if (end < address) return text("a range that wraps around at ", Hex{address});
  for (std::uint64_t at = address; at < end;) {
    const Range* range = find(at);
    if (range == nullptr) {
      if (at != address)
        return text(Hex{address}, " + ", bytes, " bytes: past the end of the allocation at ",
                    Hex{at});
      auto freed = freed_.upper_bound(at);
      const bool known =
          freed != freed_.begin() && std::prev(freed)->first + std::prev(freed)->second > at;
      return text(Hex{at}, known ? " was freed" : " is in no allocation of this process");
    }
    if (range->kind == RangeKind::vmm) {
      const unsigned int access = range->access[static_cast<std::size_t>(device)];
      if (access == 0) return text(Hex{at}, " is mapped, but cuMemSetAccess gave no access");
      if (write && (access & 2) == 0) return text("a write to ", Hex{at}, ", which is PROT_READ");
    }
    if (write && range->read_only)
      return text("a write to ", Hex{at}, ", which is registered READ_ONLY");
    at = range->end();
  }
  return std::nullopt;
}

}  // namespace fakecuda
