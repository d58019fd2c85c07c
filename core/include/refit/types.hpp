// The vocabulary that trainers, engines and the daemon share: dtypes, tensors as boxes, versions,
// transaction ids, deadlines and waiting modes. Plain values, no ownership, any thread.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refit/api.hpp"

namespace refit {

// X(name, wire number, bytes per element, torch's str(dtype)). The numbers travel on the wire and
// never change.
#define REFIT_DTYPE_TABLE(X)                    \
  X(float64, 1, 8, "torch.float64")             \
  X(float32, 2, 4, "torch.float32")             \
  X(float16, 3, 2, "torch.float16")             \
  X(bfloat16, 4, 2, "torch.bfloat16")           \
  X(float8_e4m3fn, 5, 1, "torch.float8_e4m3fn") \
  X(float8_e5m2, 6, 1, "torch.float8_e5m2")     \
  X(int64, 7, 8, "torch.int64")                 \
  X(int32, 8, 4, "torch.int32")                 \
  X(int16, 9, 2, "torch.int16")                 \
  X(int8, 10, 1, "torch.int8")                  \
  X(uint8, 11, 1, "torch.uint8")                \
  X(boolean, 12, 1, "torch.bool")

enum class DType : std::uint8_t {
#define REFIT_X(name, number, bytes, text) name = number,
  REFIT_DTYPE_TABLE(REFIT_X)
#undef REFIT_X
};

/// Bytes per element; 0 for a number that is no dtype (wire values are cast before they are
/// checked).
constexpr std::size_t element_bytes(DType dtype) noexcept {
  switch (dtype) {
#define REFIT_X(name, number, bytes, text) \
  case DType::name:                        \
    return bytes;
    REFIT_DTYPE_TABLE(REFIT_X)
#undef REFIT_X
  }
  return 0;
}

/// As PyTorch's str(dtype), e.g. "torch.bfloat16"; "invalid" for a number that is no dtype.
constexpr std::string_view dtype_name(DType dtype) noexcept {
  switch (dtype) {
#define REFIT_X(name, number, bytes, text) \
  case DType::name:                        \
    return text;
    REFIT_DTYPE_TABLE(REFIT_X)
#undef REFIT_X
  }
  return "invalid";
}

/// The inverse of dtype_name; takes the name with or without "torch.".
inline std::optional<DType> parse_dtype(std::string_view name) noexcept {
  constexpr std::string_view kPrefix = "torch.";
  if (name.substr(0, kPrefix.size()) == kPrefix) name.remove_prefix(kPrefix.size());
#define REFIT_X(enumerator, number, bytes, text) \
  if (name == std::string_view(text).substr(kPrefix.size())) return DType::enumerator;
  REFIT_DTYPE_TABLE(REFIT_X)
#undef REFIT_X
  return std::nullopt;
}

/// Extents or strides, one per dimension, outermost first; strides in elements.
using Dims = std::vector<std::uint64_t>;

/// PyTorch's repr(tuple(shape)): "()", "(128,)", "(3072, 256)".
[[nodiscard]] REFIT_API std::string shape_repr(const Dims& shape);

/// The layer buffer of a tensor that is not offloaded.
inline constexpr std::uint32_t kNoLayerBuffer = 0xffffffff;

/// Name, dtype, shape and strides of one tensor and where its bytes are: a region and a byte offset
/// in it.
///
/// A tensor is a box in a global shape: `shape` is the extent that this process holds,
/// `global_shape` the whole tensor's and `box_offset` where the box begins. Both empty means the
/// box is the whole tensor.
struct TensorSpec {
  std::string name;
  DType dtype = DType::float32;
  Dims shape;
  Dims strides;                    ///< in elements; empty means row-major contiguous
  std::uint32_t region = 0;        ///< index into the module's regions
  std::uint64_t offset_bytes = 0;  ///< of the first element, from the region's start
  Dims global_shape;
  Dims box_offset;
  std::uint32_t layer_buffer = kNoLayerBuffer;  ///< the layer buffer that it is a part of
  std::uint64_t layer_offset_bytes = 0;         ///< from that buffer's start
};

/// One rewrite rule from source names to target names (RE2 syntax, `\1` in the target). The first
/// rule that matches a whole name wins; a name that no rule matches keeps itself. `part` of `parts`
/// says which piece of a target that is fused along dimension 0 the source becomes.
struct NameRule {
  std::string pattern;
  std::string target;
  std::uint32_t part = 0;
  std::uint32_t parts = 1;
};

/// The trainer's 128-bit name of a transaction. Zero is no transaction.
struct REFIT_API TransactionId {
  std::uint64_t high = 0;
  std::uint64_t low = 0;

  /// A fresh random id.
  static TransactionId random();
  /// 32 lowercase hex digits.
  [[nodiscard]] std::string to_string() const;
  [[nodiscard]] bool is_zero() const noexcept { return high == 0 && low == 0; }
  friend bool operator==(const TransactionId& a, const TransactionId& b) noexcept {
    return a.high == b.high && a.low == b.low;
  }
  friend bool operator!=(const TransactionId& a, const TransactionId& b) noexcept {
    return !(a == b);
  }
};

/// What a module's bytes are. The numbers stand in shared memory and on the wire.
enum class ModuleState : std::uint8_t {
  none = 0,       ///< no module in this slot
  initial = 1,    ///< registered; the engine's own weights, no refit yet
  writing = 2,    ///< bytes are being replaced; no step may run
  committed = 3,  ///< whole; `version` names it
  poisoned = 4,   ///< may be a mix; no step may run until a refit commits
};

constexpr std::string_view module_state_name(ModuleState state) noexcept {
  switch (state) {
    case ModuleState::none:
      return "none";
    case ModuleState::initial:
      return "initial";
    case ModuleState::writing:
      return "writing";
    case ModuleState::committed:
      return "committed";
    case ModuleState::poisoned:
      return "poisoned";
  }
  return "invalid";
}

/// How a side waits for the other: `off` blocks on an eventfd at once, `adaptive` reads for a few
/// microseconds first where the awaited work is that short, `always` never blocks and needs a core
/// of its own.
enum class Waiting : std::uint8_t { off = 0, adaptive = 1, always = 2 };

constexpr std::string_view waiting_name(Waiting waiting) noexcept {
  switch (waiting) {
    case Waiting::off:
      return "off";
    case Waiting::adaptive:
      return "adaptive";
    case Waiting::always:
      return "always";
  }
  return "invalid";
}

enum class Role : std::uint8_t { trainer = 0, engine = 1, observer = 2 };

constexpr std::string_view role_name(Role role) noexcept {
  switch (role) {
    case Role::trainer:
      return "trainer";
    case Role::engine:
      return "engine";
    case Role::observer:
      return "observer";
  }
  return "invalid";
}

/// What a failure in `writing` leaves: with `atomic` the bytes are the old or the new ones; with
/// `poisoned_on_failure` they may be a mix, which the module says of itself.
enum class Guarantee : std::uint8_t { atomic = 0, poisoned_on_failure = 1 };

constexpr std::string_view guarantee_name(Guarantee guarantee) noexcept {
  switch (guarantee) {
    case Guarantee::atomic:
      return "atomic";
    case Guarantee::poisoned_on_failure:
      return "poisoned_on_failure";
  }
  return "invalid";
}

/// A point in time on the monotonic clock at which a blocking call returns, done or not. It never
/// makes weights usable.
class Deadline {
 public:
  using Clock = std::chrono::steady_clock;

  static Deadline in(Clock::duration duration) { return Deadline(Clock::now() + duration); }
  static Deadline at(Clock::time_point point) noexcept { return Deadline(point); }

  [[nodiscard]] Clock::time_point point() const noexcept { return point_; }
  [[nodiscard]] bool passed() const noexcept { return Clock::now() >= point_; }
  /// Milliseconds left, rounded up, never negative: poll(2)'s unit.
  [[nodiscard]] int remaining_ms() const noexcept {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(point_ - Clock::now()).count();
    return left < 0 ? 0 : left > 1'000'000'000 ? 1'000'000'000 : static_cast<int>(left);
  }

 private:
  explicit Deadline(Clock::time_point point) noexcept : point_(point) {}
  Clock::time_point point_;
};

/// Which hash. `sglang`: SHA-256 over dtype string, shape repr and bytes; `raw`: SHA-256 over the
/// bytes; `xxh3`: XXH3-128 over the bytes, which finds accidents and proves nothing.
enum class DigestKind : std::uint8_t { sglang = 0, raw = 1, xxh3 = 2 };

constexpr std::string_view digest_kind_name(DigestKind kind) noexcept {
  switch (kind) {
    case DigestKind::sglang:
      return "sglang";
    case DigestKind::raw:
      return "raw";
    case DigestKind::xxh3:
      return "xxh3";
  }
  return "invalid";
}

/// Where a tensor's bytes are looked at. An offloaded tensor has a second place, on the device,
/// while its layer is resident.
enum class Place : std::uint8_t { host = 0, device = 1, all = 2 };

constexpr std::string_view place_name(Place place) noexcept {
  switch (place) {
    case Place::host:
      return "host";
    case Place::device:
      return "device";
    case Place::all:
      return "all";
  }
  return "invalid";
}

/// A digest's bytes: 32 of SHA-256 or 16 of XXH3-128 (canonical big-endian order).
struct REFIT_API Digest {
  std::array<std::uint8_t, 32> bytes{};
  std::uint8_t length = 0;

  /// Lowercase hex.
  [[nodiscard]] std::string to_hex() const;
  /// 64 or 32 hex digits; nullopt otherwise.
  static std::optional<Digest> from_hex(std::string_view hex);
  friend bool operator==(const Digest& a, const Digest& b) noexcept {
    return a.length == b.length && a.bytes == b.bytes;
  }
  friend bool operator!=(const Digest& a, const Digest& b) noexcept { return !(a == b); }
};

}  // namespace refit
