// fatbin: what the fake driver looks at of a fatbin, without nvcc.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace fakecuda::test {

/// With an image for each architecture, that names the kernels fake_add and fake_missing.
inline std::vector<char> make_fatbin(const std::vector<std::uint32_t>& architectures,
                                     bool as_ptx = false) {
  const std::string names = "...fake_add...fake_missing...";
  struct Header {
    std::uint32_t magic = 0xba55ed50;
    std::uint16_t version = 1;
    std::uint16_t header_bytes = 16;
    std::uint64_t bytes = 0;
  } header;
  struct Entry {
    std::uint16_t kind;
    std::uint16_t version = 0x101;
    std::uint32_t header_bytes = 64;
    std::uint64_t bytes;
    std::uint32_t other[3] = {};
    std::uint32_t architecture;
    char rest[32] = {};
  };
  static_assert(sizeof(Entry) == 64);
  std::vector<char> image(sizeof header);
  for (const std::uint32_t architecture : architectures) {
    Entry entry{};
    entry.kind = as_ptx ? 1 : 2;
    entry.header_bytes = sizeof entry;
    entry.bytes = names.size();
    entry.architecture = architecture;
    const auto* bytes = reinterpret_cast<const char*>(&entry);
    image.insert(image.end(), bytes, bytes + sizeof entry);
    image.insert(image.end(), names.begin(), names.end());
  }
  header.bytes = image.size() - sizeof header;
  std::memcpy(image.data(), &header, sizeof header);
  return image;
}

}  // namespace fakecuda::test
