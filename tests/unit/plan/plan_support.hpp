// What the plan's unit tests share: short builders for tensors and manifests, searching a list of
// problems, and a naive executor of plans. One thread. Must not use anything of the compiler under
// test beyond its public types.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "plan/manifest.hpp"
#include "plan/plan.hpp"
#include "support/cast_by_definition.hpp"

namespace refit::daemon::testing {

using ManifestPtr = std::shared_ptr<const Manifest>;

inline constexpr std::uint64_t kTrainerInode = 100;
inline constexpr std::uint64_t kEngineInode = 200;

inline TensorSpec tensor(std::string name, Dims shape, std::uint64_t offset_bytes = 0,
                         DType dtype = DType::float32) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.shape = std::move(shape);
  spec.offset_bytes = offset_bytes;
  return spec;
}

inline TensorSpec strided(TensorSpec spec, Dims strides) {
  spec.strides = std::move(strides);
  return spec;
}

inline TensorSpec boxed(TensorSpec spec, Dims global_shape, Dims box_offset) {
  spec.global_shape = std::move(global_shape);
  spec.box_offset = std::move(box_offset);
  return spec;
}

inline TensorSpec in_region(TensorSpec spec, std::uint32_t region) {
  spec.region = region;
  return spec;
}

inline std::uint64_t bytes_of(const TensorSpec& spec) {
  std::uint64_t bytes = element_bytes(spec.dtype);
  for (const std::uint64_t extent : spec.shape) bytes *= extent;
  return bytes;
}

/// Gives contiguous tensors consecutive offsets and returns the bytes that they take.
inline std::uint64_t pack(std::vector<TensorSpec>& tensors, std::uint64_t align_bytes = 1) {
  std::uint64_t next = 0;
  for (TensorSpec& spec : tensors) {
    next = (next + align_bytes - 1) / align_bytes * align_bytes;
    spec.offset_bytes = next;
    next += bytes_of(spec);
  }
  return next;
}

inline RegionInfo region(std::uint64_t bytes, std::uint64_t inode) { return {bytes, 1, inode}; }

inline Result<ManifestPtr> try_trainer(std::vector<TensorSpec> tensors,
                                       std::vector<NameRule> rules = {},
                                       std::uint64_t bytes = 1 << 20) {
  return Manifest::validate("trainer/dit", Role::trainer, std::move(tensors),
                            {region(bytes, kTrainerInode)}, std::move(rules));
}

inline Result<ManifestPtr> try_engine(std::vector<TensorSpec> tensors,
                                      std::uint64_t bytes = 1 << 20) {
  return Manifest::validate("engine/transformer", Role::engine, std::move(tensors),
                            {region(bytes, kEngineInode)}, {});
}

/// The manifest, or a test failure with everything that is wrong and an empty one.
inline ManifestPtr valid(Result<ManifestPtr> result) {
  if (result) return *result;
  ADD_FAILURE() << result.error().to_string();
  return *Manifest::validate("invalid", Role::trainer, {}, {}, {});
}

inline ManifestPtr trainer(std::vector<TensorSpec> tensors, std::vector<NameRule> rules = {},
                           std::uint64_t bytes = 1 << 20) {
  return valid(try_trainer(std::move(tensors), std::move(rules), bytes));
}

inline ManifestPtr engine(std::vector<TensorSpec> tensors, std::uint64_t bytes = 1 << 20) {
  return valid(try_engine(std::move(tensors), bytes));
}

/// How many details hold all of the given texts.
inline std::size_t count_details(const Error& error, const std::vector<std::string>& texts) {
  return static_cast<std::size_t>(
      std::count_if(error.details.begin(), error.details.end(), [&](const std::string& line) {
        return std::all_of(texts.begin(), texts.end(), [&](const std::string& text) {
          return line.find(text) != std::string::npos;
        });
      }));
}

/// Expects an error of that code with exactly one detail for each entry, no other, in sorted order.
template <typename T>
void expect_problems(const Result<T>& result, Errc code,
                     const std::vector<std::vector<std::string>>& expected) {
  ASSERT_FALSE(result.has_value());
  const Error& error = result.error();
  EXPECT_EQ(error.code, code);
  EXPECT_TRUE(std::is_sorted(error.details.begin(), error.details.end()));
  EXPECT_EQ(error.details.size(), expected.size()) << error.to_string();
  for (const std::vector<std::string>& texts : expected) {
    std::string wanted;
    for (const std::string& text : texts) wanted += " <" + text + ">";
    EXPECT_EQ(count_details(error, texts), 1U) << "wanted:" << wanted << "\n" << error.to_string();
  }
}

using Memory = std::vector<std::vector<std::uint8_t>>;  // One buffer for each region.

/// Walks a plan run by run. Bounds are the vectors' `at` and an explicit check.
inline void execute(const Plan& plan, const Memory& source, Memory& target) {
  for (const Copy& copy : plan.copies) {
    std::vector<std::uint64_t> index(copy.loop_count, 0);
    while (true) {
      std::uint64_t from = copy.source_offset;
      std::uint64_t to = copy.target_offset;
      for (std::uint32_t d = 0; d < copy.loop_count; ++d) {
        from += index[d] * copy.loops[d].source_stride_bytes;
        to += index[d] * copy.loops[d].target_stride_bytes;
      }
      const auto& in = source.at(copy.source_region);
      auto& out = target.at(copy.target_region);
      ASSERT_LE(from + copy.source_run_bytes(), in.size());
      ASSERT_LE(to + copy.run_bytes, out.size());
      test::cast_by_definition(copy.cast, out.data() + to, in.data() + from, copy.run_bytes);
      std::uint32_t d = copy.loop_count;
      while (d > 0 && ++index[d - 1] == copy.loops[d - 1].count) index[--d] = 0;
      if (d == 0) break;
    }
  }
}

}  // namespace refit::daemon::testing
