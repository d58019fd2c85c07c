// What processes share: the pages at the end of memory files, the pages of events, the doorbell.
//
// Any of these processes may be killed at any instruction, so nothing here can stay locked: words
// are atomics that each mean something by themselves, and who holds something is a process that
// is alive, never a count that only its holder could take back.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

namespace fakecuda {

inline constexpr std::size_t kPage = 4096;

/// One process, also after its pid went to another.
struct ProcessId {
  std::int64_t pid = 0;
  std::uint64_t instance = 0;
  bool operator==(const ProcessId&) const = default;
};

/// The last page of every file that is device memory. For VMM the file is the exported fd itself,
/// so that SCM_RIGHTS carries everything an importer needs.
struct MemoryPage {
  static constexpr std::uint64_t kMagic = 0x4d65'6d6f'4661'6b65;
  struct Importer {
    std::atomic<std::int64_t> pid;  ///< claimed by compare-and-swap from 0
    std::atomic<std::uint64_t> instance;
  };

  std::uint64_t magic;
  std::uint64_t nonce;  ///< also in the legacy handle: a guessed file name opens nothing
  std::uint64_t bytes;
  std::int64_t exporter_pid;
  std::uint64_t exporter_instance;
  std::uint32_t exporter_uid;
  std::int32_t device;  ///< physical index
  std::uint32_t handle_types;
  std::atomic<std::uint32_t> freed;     ///< by the exporter, while others may have it mapped
  std::atomic<std::uint32_t> poisoned;  ///< an importer saw that the exporter is dead
  Importer importers[64];

  [[nodiscard]] ProcessId exporter() const { return {exporter_pid, exporter_instance}; }
};
static_assert(sizeof(MemoryPage) <= kPage);

/// An event. Each record has a word of its own: with a single counter, the end of record 2 on one
/// stream would release those who wait for record 1 on another.
struct EventPage {
  static constexpr std::uint64_t kMagic = 0x4576'656e'4661'6b65;
  static constexpr std::uint64_t kSlots = 64;
  static constexpr std::uint64_t kCompleted = 1;
  static constexpr std::uint64_t kDemanded = 2;
  static constexpr unsigned kRecordShift = 2;
  struct Slot {
    std::atomic<std::uint64_t> state;  ///< record << kRecordShift | kDemanded | kCompleted
    std::atomic<std::int64_t> pid;     ///< of who recorded, and whose stream must run
    std::atomic<std::uint64_t> instance;
  };

  std::uint64_t magic;
  std::uint64_t nonce;
  std::int64_t creator_pid;
  std::uint64_t creator_instance;
  std::uint32_t creator_uid;
  std::atomic<std::uint32_t> destroyed;
  std::atomic<std::uint64_t> next_record;
  std::atomic<std::uint64_t> recorded;  ///< the latest; 0 if it never was
  Slot slots[kSlots];

  Slot& slot(std::uint64_t record) { return slots[record % kSlots]; }
};
static_assert(sizeof(EventPage) <= kPage);

/// A mapping of a whole file, with its fd.
class SharedFile {
 public:
  SharedFile() = default;
  /// A new file. Mode 0666 whatever the umask: who may open it is the directory's business.
  static std::optional<SharedFile> create(const std::string& path, std::size_t bytes);
  static std::optional<SharedFile> create_memfd(std::size_t bytes);
  static std::optional<SharedFile> open(const std::string& path);
  /// Takes the fd over, and closes it if this fails.
  static std::optional<SharedFile> adopt(int fd);
  ~SharedFile();
  SharedFile(SharedFile&& other) noexcept;
  SharedFile& operator=(SharedFile&& other) noexcept;

  [[nodiscard]] int fd() const { return fd_; }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }
  /// The last page; it is mapped for as long as this object lives.
  template <typename Page>
  [[nodiscard]] Page* tail() const {
    return static_cast<Page*>(tail_);
  }

 private:
  int fd_ = -1;
  std::size_t bytes_ = 0;
  void* tail_ = nullptr;
};

/// A word in FAKECUDA_DIR that changes whenever a waiter in any process may find something new.
class Doorbell {
 public:
  bool open(const std::string& directory);
  /// To be read before the condition that is waited for, and handed to wait().
  [[nodiscard]] std::uint32_t observe() const { return word_->load(); }
  void ring();
  /// Returns when it has rung since `observed`; with `may_die` also after a moment, for who waits
  /// for another process: the dead do not ring.
  void wait(std::uint32_t observed, bool may_die) const;

 private:
  std::atomic<std::uint32_t>* word_ = nullptr;
};

}  // namespace fakecuda
