// Where a model's bytes lie: one side's tensors in the memory that --memory names, and how the
// bench fills, reads, registers and copies them there.
//
// A role holds Storage and knows no kind; make_memory_kind() is the one place that does. Entered by
// a role's one thread. Only floor copies are timed. Knows nothing of the daemon.
#pragma once

#include <array>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "model.hpp"
#include "posix/unique_fd.hpp"
#include "refit/device_memory.hpp"
#include "refit/memory.hpp"
#include "refit/module.hpp"
#include "refit/result.hpp"
#include "weights.hpp"

namespace refit::bench {

inline constexpr std::array kMemoryKinds{"host", "cuda", "cuda-vmm", "offload"};
inline constexpr const char* kHostMemory = "host";
/// In the names of all tensor memory of the bench, so that /proc/PID/smaps of the daemon can be
/// told apart.
inline constexpr const char* kTensorLabel = "bench-tensors";

/// The tensors of one side, and where each lies in its arena.
struct Side {
  DType dtype = DType::bfloat16;
  std::vector<ModelTensor> tensors;
  Layout layout;
  std::vector<Extent> layers;  ///< runs of bytes that hold one layer each
};

/// Plain copies of the same number of bytes between the same memory: what a refit is compared with.
class Floor {
 public:
  struct Calibration {
    std::string winner;
    double best_s = 0;  ///< the shortest copy seen
    std::vector<std::pair<std::string, double>> medians_s;
  };
  virtual ~Floor() = default;
  /// Tries every way that there is, `rounds` times in turn; copy() takes the fastest from then on.
  [[nodiscard]] virtual Result<Calibration> calibrate(int rounds) = 0;
  /// Seconds of one copy.
  [[nodiscard]] virtual Result<double> copy() = 0;
};

class Storage {
 public:
  /// What another process of the bench needs to reach the same memory.
  struct Address {
    nlohmann::json how;
    int fd = -1;  ///< the storage's
  };

  virtual ~Storage();
  Storage(const Storage&) = delete;
  Storage& operator=(const Storage&) = delete;

  /// The bytes as a CPU reads and writes them: the tensors themselves, or a copy of a device's.
  [[nodiscard]] const Arena& view() const noexcept { return view_; }
  /// The first tensor's address, which a CPU can follow on host memory only.
  [[nodiscard]] std::byte* address() const noexcept { return address_; }

  /// Makes the tensors hold what the view holds, and the view what they hold. Errors: cuda;
  /// digest_mismatch if two places of one tensor differ.
  [[nodiscard]] virtual Result<void> write() { return {}; }
  [[nodiscard]] virtual Result<void> read() { return {}; }

  /// All tensors as a module to register. Of storage that was allocated here only.
  [[nodiscard]] Result<ModuleSpec> module(const std::string& name) const;
  [[nodiscard]] virtual Result<Address> share() = 0;
  /// Copies `bytes` from `source` to here; both outlive it.
  [[nodiscard]] virtual Result<std::unique_ptr<Floor>> floor_from(const Storage& source,
                                                                  std::uint64_t bytes) = 0;
  /// Seconds of one MADV_POPULATE of a fresh mapping of the same pages, and how many bytes that
  /// were. Errors: unsupported where there are no pages.
  [[nodiscard]] virtual Result<std::pair<double, std::uint64_t>> populate_fresh(
      int protection) const;

 protected:
  explicit Storage(Side side) : side_(std::move(side)) {}
  [[nodiscard]] const Side& side() const noexcept { return side_; }
  void lie_at(std::byte* address, std::byte* view);
  /// What module() registers the tensors in.
  void register_in(std::shared_ptr<Memory> region, std::shared_ptr<DeviceFence> fence = nullptr);

 private:
  /// What the module has before its first tensor, and once it is whole.
  [[nodiscard]] virtual Result<void> begin(ModuleSpec&) const { return {}; }
  [[nodiscard]] virtual Result<void> complete(ModuleSpec&) const { return {}; }

  Side side_;
  Arena view_;
  std::byte* address_ = nullptr;
  std::shared_ptr<Memory> region_;
  std::shared_ptr<DeviceFence> fence_;
};

/// How --memory's kinds come by their storage.
class MemoryKind {
 public:
  virtual ~MemoryKind() = default;
  [[nodiscard]] virtual Result<std::unique_ptr<Storage>> source(Side side) = 0;
  [[nodiscard]] virtual Result<std::unique_ptr<Storage>> target(Side side) = 0;
  /// The engine's target in the trainer, so that the floor copies between the very memory that a
  /// refit copies between.
  [[nodiscard]] virtual Result<std::unique_ptr<Storage>> map_target(Side side,
                                                                    const nlohmann::json& how,
                                                                    UniqueFd fd) = 0;
};

/// Errors: bad_argument for a name that is not in kMemoryKinds; unsupported without a driver.
[[nodiscard]] Result<std::unique_ptr<MemoryKind>> make_memory_kind(const std::string& name);

}  // namespace refit::bench
