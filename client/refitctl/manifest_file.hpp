// The file that `check` compares an engine with: what `digest --json` wrote, or a plain object of
// names and digests.
//
// parse_manifest() is pure; read_manifest_text() reads a file. Any thread. Knows nothing of the
// daemon or of options.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "refit/checker.hpp"
#include "refit/result.hpp"
#include "refitctl/target.hpp"

namespace refit::ctl {

/// Twice what the largest manifest needs that the daemon takes: 65,536 tensors with names of 512
/// bytes.
inline constexpr std::size_t kManifestBytesMax = 128U << 20U;

struct ManifestFile {
  std::optional<Target> target;
  std::optional<DigestKind> kind;     ///< of the file; nothing in a plain object of 64-digit values
  std::vector<NamedDigest> expected;  ///< sorted by name, never empty
  std::optional<Digest> module;       ///< the digest of the whole module
};

/// Takes {"engine", "module", "kind", "tensors": {name: hex}} with the optional keys of `digest
/// --json`, or {name: hex}. Errc::bad_argument with every problem at once, each naming the key.
/// @param label  the file, for messages.
[[nodiscard]] Result<ManifestFile> parse_manifest(std::string_view json, const std::string& label);

/// The bytes of `path`, or of standard input for "-". Errors name the path: Errc::bad_argument if
/// it is no readable file, Errc::os otherwise.
[[nodiscard]] Result<std::string> read_manifest_text(const std::string& path);

/// "standard input" for "-", else the path.
[[nodiscard]] std::string manifest_label(const std::string& path);

[[nodiscard]] std::optional<DigestKind> parse_digest_kind(std::string_view name) noexcept;

/// Bytes of a digest of that kind.
[[nodiscard]] std::size_t digest_bytes(DigestKind kind) noexcept;

/// Errc::bad_argument, naming every tensor whose digest is not as long as `kind`'s are.
[[nodiscard]] Result<void> check_digest_lengths(const ManifestFile& manifest, DigestKind kind,
                                                const std::string& label);

}  // namespace refit::ctl
