// Memory: every range of addresses that a device may touch, and the bytes behind it.
//
// Device addresses lie in an arena without access rights: a CPU that follows one gets SIGSEGV, as
// it should. The bytes are mapped in a second arena at the same offset, so that neighbouring
// mappings of one reservation are one piece there too. Nothing is mapped at a fixed address, which
// the sanitizers would not bear. All of this is used under the driver's lock.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "support/fake_cuda/configuration.hpp"
#include "support/fake_cuda/shared_file.hpp"

namespace fakecuda {

struct Context;

/// What an uninitialised allocation, and what freed memory reads as.
inline constexpr unsigned char kFresh = 0xfb;
inline constexpr unsigned char kGone = 0xdd;

/// The bytes of one device allocation: a file with a MemoryPage behind them.
class Backing {
 public:
  /// Writes the page; `file` has room for bytes and page. Null if the file system has none.
  static std::shared_ptr<Backing> create(SharedFile file, std::uint64_t bytes, int device,
                                         unsigned int handle_types, ProcessId exporter,
                                         std::uint64_t nonce);
  /// Of another process, or of this one again. Null if it is no device memory.
  static std::shared_ptr<Backing> adopt(SharedFile file);
  static std::size_t file_bytes(std::uint64_t bytes);

  [[nodiscard]] MemoryPage& page() const { return *file_.tail<MemoryPage>(); }
  [[nodiscard]] std::uint64_t bytes() const { return page().bytes; }
  [[nodiscard]] int device() const { return page().device; }
  [[nodiscard]] int fd() const { return file_.fd(); }
  /// Maps the bytes over `where`, which is in an arena.
  [[nodiscard]] bool map_at(void* where) const;
  /// Overwrites all of them, up to a bound that keeps large tests quick.
  void fill(unsigned char value) const;
  [[nodiscard]] std::size_t filled_bytes() const;

 private:
  explicit Backing(SharedFile file) : file_(std::move(file)) {}
  SharedFile file_;
};

enum class RangeKind { allocation, import, vmm, pool, managed, host_allocation, host_registration };

/// One allocation or mapping.
struct Range {
  std::uint64_t base = 0;
  std::uint64_t bytes = 0;
  std::byte* cpu = nullptr;  ///< where the CPU finds the bytes
  RangeKind kind = RangeKind::allocation;
  int device = 0;  ///< physical index
  Context* context = nullptr;
  std::uint64_t id = 0;  ///< CU_POINTER_ATTRIBUTE_BUFFER_ID
  std::shared_ptr<Backing> backing;
  std::uint64_t file = 0;                  ///< allocation: the number in the name m-<number>
  std::uint64_t exporter_seen_at = 0;      ///< import: the access that last looked at it
  unsigned int opens = 0;                  ///< import
  std::uint64_t handle = 0;                ///< vmm
  std::uint64_t reservation = 0;           ///< vmm: its base
  std::array<unsigned char, 16> access{};  ///< vmm: CUmemAccess_flags by physical index
  bool read_only = false;                  ///< host_registration

  [[nodiscard]] bool is_host() const {
    return kind == RangeKind::host_allocation || kind == RangeKind::host_registration;
  }
  [[nodiscard]] std::uint64_t end() const { return base + bytes; }
};

/// Addresses for ranges.
class Arena {
 public:
  bool open();
  /// 0 if there are none left.
  std::uint64_t take(std::uint64_t bytes, std::uint64_t alignment);
  /// Unmaps the bytes. With `reuse` the addresses are handed out again, the last ones first; else
  /// never, so that a stale pointer stays one.
  void give_back(std::uint64_t base, std::uint64_t bytes, bool reuse);
  void unmap(std::uint64_t base, std::uint64_t bytes);
  [[nodiscard]] std::byte* cpu(std::uint64_t address) const;
  [[nodiscard]] bool contains(std::uint64_t address) const;

 private:
  static constexpr std::uint64_t kBytes = std::uint64_t{256} << 30;
  static constexpr std::uint64_t kAlignment = std::uint64_t{1} << 30;
  /// What is left of kBytes behind an aligned beginning; the addresses after it are the process's.
  static constexpr std::uint64_t kUsable = kBytes - kAlignment;
  std::uint64_t device_ = 0;
  std::byte* cpu_ = nullptr;
  std::uint64_t used_ = 0;
  std::map<std::uint64_t, std::uint64_t> taken_;  ///< base -> bytes with padding
  std::multimap<std::uint64_t, std::uint64_t> free_;
};

class Ranges {
 public:
  Range& add(Range range);
  void erase(std::uint64_t base);
  /// The range that contains the address; null if none does.
  [[nodiscard]] Range* find(std::uint64_t address);
  /// Any range that overlaps these bytes.
  [[nodiscard]] Range* overlapping(std::uint64_t address, std::uint64_t bytes);
  [[nodiscard]] std::size_t count(RangeKind kind) const { return counts_[index(kind)]; }
  [[nodiscard]] std::uint64_t bytes(RangeKind kind) const { return bytes_[index(kind)]; }

  /// What is wrong with an access by `device` to all of these bytes, which may span neighbouring
  /// ranges; nothing if it is in order.
  [[nodiscard]] std::optional<std::string> complaint(std::uint64_t address, std::uint64_t bytes,
                                                     bool write, int device);

  template <typename Visit>
  void for_each(Visit&& visit) {
    for (auto& [base, range] : ranges_) visit(range);
  }

 private:
  static constexpr std::size_t index(RangeKind kind) { return static_cast<std::size_t>(kind); }

  std::map<std::uint64_t, Range> ranges_;
  std::map<std::uint64_t, std::uint64_t> freed_;  ///< base -> bytes, for better messages only
  std::array<std::size_t, 7> counts_{};
  std::array<std::uint64_t, 7> bytes_{};
  std::uint64_t next_id_ = 1;
};

}  // namespace fakecuda
