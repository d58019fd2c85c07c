// Hashing: digests of tensors where they lie, on threads of the background pool.
//
// Each thread hashes two streams at a time, because a core has room for two of SHA-256
// (digest/sha256.hpp), and goes from tensor to tensor with both. Memory of clients that faults and
// devices that fail end a job with an error that names the module; nothing that a client wrote is
// trusted. Knows no request, no reply and no scheduler.
#pragma once

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "digest/digest.hpp"
#include "memory/sigbus_guard.hpp"
#include "server/background_pool.hpp"
#include "server/device_access.hpp"
#include "server/session.hpp"

namespace refit::daemon {

/// What is to be hashed of one module, and what came of it.
struct Hashing {
  std::shared_ptr<Registration> registration;
  std::shared_ptr<SessionMemory> session;  ///< whose words say where layers are
  DigestKind kind = DigestKind::sglang;
  /// First places on the host, then those of layers on the device.
  std::vector<const TensorSpec*> tensors;
  std::size_t host_count = 0;
  bool per_module = false;             ///< the digest of all host places in one stream, too
  std::atomic<bool> cancelled{false};  ///< any thread: nobody waits for the rest

  /// Of tensors, by the same index; of length 0 for a layer that was not there, or that moved
  /// whenever it was hashed.
  std::vector<Digest> digests;
  Digest module_digest;
};

/// Shares streams of so many bytes out among `threads` threads, which take part after part, the
/// largest streams first, and hash two streams of a part at a time in the order given: what follows
/// a part's first stream is about as long as that one. A stream that is a whole thread's share of
/// the work stands alone, for another one beside it would slow it down.
[[nodiscard]] std::vector<std::vector<std::uint32_t>> share_out(
    const std::vector<std::uint64_t>& bytes, unsigned threads);

class HashJob final : public BackgroundJob {
 public:
  /// `done` is called on the loop thread with the first error, if there was one. `hashing` outlives
  /// the job and is the pool's until then, but for `cancelled`.
  using Done = std::function<void(const std::optional<Error>& error)>;
  [[nodiscard]] static std::unique_ptr<HashJob> make(Hashing& hashing, DeviceAccess& devices,
                                                     unsigned threads, Done done);

  void run_part(std::size_t part) override;
  void finished() override { done_(error_); }

 private:
  struct Lane;
  using Parts = std::vector<std::vector<std::uint32_t>>;

  HashJob(Hashing& hashing, DeviceAccess& devices, Parts parts, Done done);

  // False after an error, which ends the part.
  [[nodiscard]] bool fill(Lane& lane);
  [[nodiscard]] bool begin(Lane& lane, std::uint32_t stream);
  [[nodiscard]] bool begin_tensor(Lane& lane);
  [[nodiscard]] bool begin_layer(Lane& lane);
  [[nodiscard]] bool end_tensor(Lane& lane);
  [[nodiscard]] bool open(Lane& lane, const TensorSpec& spec, const MappedRegion& region,
                          std::uint64_t offset);
  [[nodiscard]] bool gather(Lane& lane, const TensorSpec& spec, DeviceReading& reading,
                            std::uint64_t span);

  template <typename Body>
  [[nodiscard]] bool guarded(Body&& body);
  bool fail(Error error);

  [[nodiscard]] bool is_module(std::uint32_t stream) const noexcept {
    return stream == hashing_.tensors.size();
  }

  Hashing& hashing_;
  DeviceAccess& devices_;
  const Parts parts_;
  const Done done_;
  std::vector<const TensorSpec*> by_name_;  ///< the module's stream
  std::vector<GuardedRange> ranges_;
  std::mutex mutex_;
  std::optional<Error> error_;  ///< guarded by mutex_ while parts run
};

}  // namespace refit::daemon
