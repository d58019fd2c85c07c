// Filling, changing, comparing and hashing a model's bytes. See weights.hpp.
//
// Entered by one thread; large work is spread over all cores. Must not use the project's own
// digests or copies.
#include "weights.hpp"

#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>

#include "floor.hpp"

namespace refit::bench {
namespace {

constexpr std::uint64_t kPlaceEveryBytes = 4096;
constexpr std::uint64_t kBlockBytes = std::uint64_t{64} << 20;
/// Below this, starting threads costs more than the work, and would disturb what is measured next.
constexpr std::uint64_t kAloneBytes = std::uint64_t{16} << 20;

std::uint64_t mix(std::uint64_t value) {
  value += 0x9e3779b97f4a7c15ULL;
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9ULL;
  value = (value ^ (value >> 27)) * 0x94d049bb133111ebULL;
  return value ^ (value >> 31);
}

void spread(std::uint64_t bytes, std::size_t count, const std::function<void(std::size_t)>& work) {
  if (bytes < kAloneBytes) {
    for (std::size_t i = 0; i < count; ++i) work(i);
  } else {
    on_all_cores(count, work);
  }
}

/// Calls `visit(offset, length)` for every place of a tensor of `bytes`.
template <typename Visit>
void for_each_place(std::uint64_t bytes, Visit&& visit) {
  for (std::uint64_t offset = 0; offset < bytes; offset += kPlaceEveryBytes) {
    visit(offset, std::min<std::uint64_t>(8, bytes - offset));
  }
}

struct ContextDeleter {
  void operator()(EVP_MD_CTX* context) const noexcept { EVP_MD_CTX_free(context); }
};
using Context = std::unique_ptr<EVP_MD_CTX, ContextDeleter>;

}  // namespace

void fill(std::byte* data, std::uint64_t bytes, std::uint64_t seed) {
  const std::uint64_t blocks = (bytes + kBlockBytes - 1) / kBlockBytes;
  spread(bytes, blocks, [&](std::size_t block) {
    const std::uint64_t first = block * kBlockBytes;
    const std::uint64_t last = std::min(bytes, first + kBlockBytes);
    for (std::uint64_t offset = first; offset < last; offset += 8) {
      const std::uint64_t value = mix(seed ^ offset);
      std::memcpy(data + offset, &value, std::min<std::uint64_t>(8, last - offset));
    }
  });
}

void perturb(const Model& model, const Arena& source, std::uint64_t step) {
  const std::uint64_t change = mix(step) | 0x0101010101010101ULL;  // no byte is left as it was
  spread(model.bytes, model.source.size(), [&](std::size_t i) {
    std::byte* tensor = source.data + source.layout.offsets[i];
    for_each_place(model.source[i].bytes, [&](std::uint64_t offset, std::uint64_t length) {
      std::uint64_t value = 0;
      std::memcpy(&value, tensor + offset, length);
      value ^= change;
      std::memcpy(tensor + offset, &value, length);
    });
  });
}

std::uint64_t places_that_differ(const Model& model, const Arena& source, const Arena& target) {
  std::atomic<std::uint64_t> differing{0};
  spread(model.bytes, model.source.size(), [&](std::size_t i) {
    const std::byte* from = source.data + source.layout.offsets[i];
    const Placement& place = model.placements[i];
    const std::byte* to = target.data + target.layout.offsets[place.target] + place.offset_bytes;
    std::uint64_t count = 0;
    for_each_place(model.source[i].bytes, [&](std::uint64_t offset, std::uint64_t length) {
      count += std::memcmp(from + offset, to + offset, length) != 0;
    });
    differing += count;
  });
  return differing;
}

std::uint64_t places(const Model& model) {
  std::uint64_t count = 0;
  for (const ModelTensor& tensor : model.source) {
    count += (tensor.bytes + kPlaceEveryBytes - 1) / kPlaceEveryBytes;
  }
  return count;
}

std::vector<Sha256> expected_sha256(const Model& model, const Arena& source) {
  std::vector<std::vector<std::uint32_t>> parts(model.target.size());
  for (std::uint32_t i = 0; i < model.source.size(); ++i)
    parts[model.placements[i].target].push_back(i);
  for (auto& list : parts) {
    std::sort(list.begin(), list.end(), [&](std::uint32_t a, std::uint32_t b) {
      return model.placements[a].offset_bytes < model.placements[b].offset_bytes;
    });
  }
  std::vector<std::uint32_t> order(model.target.size());
  std::iota(order.begin(), order.end(), 0U);
  std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
    return model.target[a].bytes > model.target[b].bytes;
  });
  std::vector<Sha256> digests(model.target.size());
  spread(model.bytes, order.size(), [&](std::size_t i) {
    const std::uint32_t target = order[i];
    const Context context(EVP_MD_CTX_new());
    EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
    for (const std::uint32_t part : parts[target]) {
      EVP_DigestUpdate(context.get(), source.data + source.layout.offsets[part],
                       model.source[part].bytes);
    }
    EVP_DigestFinal_ex(context.get(), digests[target].data(), nullptr);
  });
  return digests;
}

Sha256 sha256_stream(const std::byte* data, std::uint64_t bytes) {
  Sha256 digest;
  const Context context(EVP_MD_CTX_new());
  EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
  for (std::uint64_t offset = 0; offset < bytes; offset += kBlockBytes) {
    EVP_DigestUpdate(context.get(), data + offset, std::min(kBlockBytes, bytes - offset));
  }
  EVP_DigestFinal_ex(context.get(), digest.data(), nullptr);
  return digest;
}

}  // namespace refit::bench
