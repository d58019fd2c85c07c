// PlanCache: compiled plans bound to mapped memory, ready to be copied again without a look at a
// manifest.
//
// The loop thread alone, but for BoundPlan::prepare(). An entry lives as long as both of its
// registrations are the current ones.
#pragma once

#include <deque>
#include <memory>
#include <string_view>
#include <vector>

#include "ipc/wire.hpp"
#include "memory/copy_pool.hpp"
#include "plan/plan.hpp"
#include "plan/residency.hpp"
#include "server/decode.hpp"
#include "server/device_access.hpp"
#include "server/session.hpp"

namespace refit::daemon {

/// The copies between host memories into the second place of one layer buffer, which begins
/// elsewhere in every gate.
struct LayerCopies {
  std::uint32_t buffer = 0;
  std::size_t first = 0;  ///< of BoundPlan::layer_ops
  std::size_t count = 0;
  bool resident = false;  ///< set by settle()
  CopyJob job;
};

/// A plan with addresses in it. Keeps both registrations mapped while anybody holds it.
struct BoundPlan {
  std::shared_ptr<Registration> source;
  std::shared_ptr<Registration> target;
  PlanOptions options;
  Plan plan;
  std::uint64_t selection_hash = 0;  ///< of the names of the tensors that it writes; never 0
  /// From host memory to host memory.
  std::vector<CopyOp> ops;
  CopyJob job;
  /// The rest, layers' too, once prepare() made it; null where there is none.
  std::unique_ptr<DeviceJob> device_job;
  bool touches_devices = false;
  bool being_prepared = false;  ///< a background thread is in prepare()
  bool prepared = false;

  /// From host memory into host memory that stands for a device's. Their targets count from the
  /// buffer's start until settle() has put them where it is.
  std::vector<CopyOp> layer_ops;
  std::vector<std::uint64_t> layer_offsets;  ///< of the targets in their buffers, by the same index
  std::deque<LayerCopies> layers;
  LayerPlaces places;
  // By layer buffer.
  std::vector<std::uint64_t> residency_words;
  std::vector<std::uint64_t> layer_bytes;  ///< that the plan writes of it
  std::vector<std::byte*> layer_begins;    ///< its second place, null while absent; by settle()
  std::uint64_t device_bytes = 0;          ///< of the resident layers; set by settle()

  BoundPlan(std::shared_ptr<Registration> from, std::shared_ptr<Registration> to)
      : source(std::move(from)), target(std::move(to)), places(*target->manifest) {}

  /// True if it lacks nothing that prepare() makes.
  [[nodiscard]] bool ready() const noexcept { return prepared || !touches_devices; }
  /// Makes the copies that touch devices, for device_job; null if there are none. Blocks in the
  /// driver, and for seconds where that compiles kernels: any thread, once both registrations are
  /// populated. Errors: Errc::unsupported, Errc::cuda; names the modules.
  [[nodiscard]] Result<std::unique_ptr<DeviceJob>> prepare(DeviceAccess& devices) const;

  /// Reads where the engine's layers are, once, and points the copies there. Only while the engine
  /// holds still. Errors: Errc::bad_region; then nothing may be written. Allocates for those only.
  [[nodiscard]] Result<void> settle(const RequestRegion& engine);
};

/// `copy` with the address of its source, and its target at `target`.
[[nodiscard]] CopyOp op_of(const BoundPlan& bound, const Copy& copy, std::byte* target);

/// True if `held` are the names that a message asks for; none asked for is an empty list.
bool same_selection(const std::vector<std::string>& held, const Names* asked);

class PlanCache {
 public:
  using Selection = Names;

  PlanCache() { entries_.reserve(kEntriesMax); }

  /// The plan for these manifests, compiled if it is not there. `selection` may be null.
  Result<std::shared_ptr<BoundPlan>> get(const std::shared_ptr<Registration>& source,
                                         const std::shared_ptr<Registration>& target,
                                         const Selection* selection, bool allow_unmatched);

  /// Forgets every plan of a registration that was replaced or whose session ended.
  void forget(std::uint64_t generation);

 private:
  static constexpr std::size_t kEntriesMax = 64;
  std::vector<std::shared_ptr<BoundPlan>> entries_;  ///< most recently used last
};

}  // namespace refit::daemon
