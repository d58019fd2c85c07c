// Strided copies and casts as a device does them: the table that a kernel is given, and all of what
// the kernel does. One source for nvcc and for the host, where tests run it.
//
// Host and device code; no includes but what both can read. Nothing here trusts an address to be
// aligned: a misaligned access on a device ends its context.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "memory/cast_elements.hpp"

// Loops that nvcc would write out many times over, for nothing: they wait for memory.
#if defined(__CUDACC__)
#define REFIT_LOOP _Pragma("unroll 1")
#else
#define REFIT_LOOP
#endif

namespace refit::cuda {

/// As CopyOp, in units: elements of a cast, else as many bytes as all of its ends and strides are
/// multiples of (1, 2, 4 or 8). The layout is the device's too.
struct StridedCopy {
  static constexpr std::uint32_t kStays = 0xffff'ffff;
  static constexpr std::size_t kLoopsMax = 8;
  struct Loop {
    std::uint64_t count;
    std::uint64_t source_stride_bytes;
    std::uint64_t target_stride_bytes;
  };
  std::uint64_t source;
  std::uint64_t target;  ///< counts from the start of `part`, if it has one
  std::uint64_t first;   ///< how many units the copies before it have
  std::uint64_t run_units;
  std::uint32_t source_unit_bytes;
  std::uint32_t target_unit_bytes;
  std::uint32_t part;  ///< kStays: none
  std::uint32_t loop_count;
  Loop loops[kLoopsMax];  ///< outermost first
};
static_assert(sizeof(StridedCopy) == 240 && alignof(StridedCopy) == 8 &&
                  offsetof(StridedCopy, source_unit_bytes) == 32 &&
                  offsetof(StridedCopy, loops) == 48 && std::is_trivially_copyable_v<StridedCopy>,
              "host and device read the same table");

/// The parameter of every kernel: addresses as the device sees them.
struct StridedCopyTable {
  std::uint64_t copies;       ///< of an array of StridedCopy
  std::uint64_t count;        ///< of it; at least 1
  std::uint64_t units;        ///< of all copies together
  std::uint64_t part_begins;  ///< of an array of addresses; a part whose address is 0 is left out
};
static_assert(sizeof(StridedCopyTable) == 32 && std::is_trivially_copyable_v<StridedCopyTable>);

/// Threads of a block; whoever calls copy_strided() has a multiple of them.
inline constexpr std::uint32_t kLanes = 256;
/// What a block takes at a time: it looks for its first copy once in so many units.
inline constexpr std::uint64_t kTileUnits = 4096;

// `Memory` finds bytes to read and to write by their addresses: on a device these are pointers.

template <typename T, typename Memory>
REFIT_HOST_DEVICE T load(const Memory& memory, std::uint64_t address) noexcept {
  const void* const bytes = memory.to_read(address, sizeof(T));
  if (address % sizeof(T) == 0) return *static_cast<const T*>(bytes);
  std::uint64_t value = 0;
  for (std::size_t i = sizeof(T); i-- > 0;)
    value = value << 8 | static_cast<const unsigned char*>(bytes)[i];
  return static_cast<T>(value);
}

template <typename T, typename Memory>
REFIT_HOST_DEVICE void store(const Memory& memory, std::uint64_t address, T value) noexcept {
  void* const bytes = memory.to_write(address, sizeof(T));
  if (address % sizeof(T) == 0) {
    *static_cast<T*>(bytes) = value;
    return;
  }
  for (std::size_t i = 0; i < sizeof(T); ++i)
    static_cast<unsigned char*>(bytes)[i] =
        static_cast<unsigned char>(static_cast<std::uint64_t>(value) >> (8 * i));
}

/// A unit that is copied as it is.
struct PlainUnit {
  template <typename Memory>
  REFIT_HOST_DEVICE static void move(const Memory& memory, std::uint64_t target,
                                     std::uint64_t source, std::uint32_t bytes) noexcept {
    if (bytes == 8) {
      store(memory, target, load<std::uint64_t>(memory, source));
    } else if (bytes == 4) {
      store(memory, target, load<std::uint32_t>(memory, source));
    } else if (bytes == 2) {
      store(memory, target, load<std::uint16_t>(memory, source));
    } else {
      store(memory, target, load<std::uint8_t>(memory, source));
    }
  }
};

/// A unit that is cast by one of the functions of cast_elements.hpp.
template <auto kElement>
struct CastUnit;
template <typename From, typename To, To (*kElement)(From) noexcept>
struct CastUnit<kElement> {
  template <typename Memory>
  REFIT_HOST_DEVICE static void move(const Memory& memory, std::uint64_t target,
                                     std::uint64_t source, std::uint32_t) noexcept {
    store(memory, target, kElement(load<From>(memory, source)));
  }
};

template <typename Memory>
REFIT_HOST_DEVICE const StridedCopy& copy_at(const StridedCopyTable& table, const Memory& memory,
                                             std::uint64_t index) noexcept {
  return *static_cast<const StridedCopy*>(
      memory.to_read(table.copies + index * sizeof(StridedCopy), sizeof(StridedCopy)));
}

/// The copy that a unit is of: the last one that begins at it or before.
template <typename Memory>
REFIT_HOST_DEVICE std::uint64_t find_copy(const StridedCopyTable& table, const Memory& memory,
                                          std::uint64_t unit) noexcept {
  std::uint64_t found = 0;
  REFIT_LOOP
  for (std::uint64_t end = table.count; end - found > 1;) {
    const std::uint64_t middle = found + (end - found) / 2;
    (copy_at(table, memory, middle).first <= unit ? found : end) = middle;
  }
  return found;
}

/// What thread `index` of `count` does: its units of every copy. Neighbours have neighbouring ones.
template <typename Unit, typename Memory>
REFIT_HOST_DEVICE void copy_strided(const StridedCopyTable& table, std::uint64_t index,
                                    std::uint64_t count, const Memory& memory) noexcept {
  REFIT_LOOP
  for (std::uint64_t tile = index / kLanes * kTileUnits; tile < table.units;
       tile += count / kLanes * kTileUnits) {
    const std::uint64_t tile_end =
        table.units - tile < kTileUnits ? table.units : tile + kTileUnits;
    std::uint64_t unit = tile + index % kLanes;
    if (unit >= tile_end) continue;
    REFIT_LOOP
    for (std::uint64_t i = find_copy(table, memory, unit); unit < tile_end; ++i) {
      const StridedCopy& copy = copy_at(table, memory, i);
      std::uint64_t end = tile_end;
      if (i + 1 < table.count) {
        const std::uint64_t next = copy_at(table, memory, i + 1).first;
        end = next < end ? next : end;
      }
      std::uint64_t begin = 0;
      if (copy.part != StridedCopy::kStays) {
        begin = load<std::uint64_t>(memory, table.part_begins + copy.part * sizeof begin);
        // Left out: on to the lane's first unit of the next copy.
        if (begin == 0 && unit < end) unit += (end - unit + kLanes - 1) / kLanes * kLanes;
      }
      REFIT_LOOP
      for (; unit < end; unit += kLanes) {
        std::uint64_t source = copy.source;
        std::uint64_t target = begin + copy.target;
        std::uint64_t in_run = unit - copy.first;
        if (copy.loop_count != 0) {
          std::uint64_t run = in_run / copy.run_units;
          in_run -= run * copy.run_units;
          REFIT_LOOP
          for (std::uint32_t l = copy.loop_count; l-- > 0;) {
            const StridedCopy::Loop& loop = copy.loops[l];
            const std::uint64_t turn = run % loop.count;
            run /= loop.count;
            source += turn * loop.source_stride_bytes;
            target += turn * loop.target_stride_bytes;
          }
        }
        Unit::move(memory, target + in_run * copy.target_unit_bytes,
                   source + in_run * copy.source_unit_bytes, copy.target_unit_bytes);
      }
    }
  }
}

}  // namespace refit::cuda
