// Reading and parsing of digest manifests. Any thread. Knows nothing of the daemon or of options.
#include "refitctl/manifest_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>

namespace refit::ctl {
namespace {

using Json = nlohmann::json;

std::string in_quotes(std::string_view text) { return "\"" + std::string(text) + "\""; }

// Collects what is wrong; keys are named as they stand in the file.
class Parser {
 public:
  explicit Parser(std::vector<std::string> problems) : problems_(std::move(problems)) {}

  ManifestFile parse(const Json& root) {
    const auto tensors = root.find("tensors");
    // A plain object may hold a tensor that is called "tensors": its value is a string.
    if (tensors != root.end() && !tensors->is_string()) {
      parse_target_form(root, *tensors);
    } else {
      parse_digests(root, "");
    }
    return std::move(file_);
  }

  [[nodiscard]] const std::vector<std::string>& problems() const { return problems_; }

 private:
  void parse_target_form(const Json& root, const Json& tensors) {
    constexpr std::array<std::string_view, 9> kKeys{"engine",  "module",        "kind",
                                                    "tensors", "module_digest", "state",
                                                    "version", "device",        "absent"};
    for (const auto& [key, value] : root.items()) {
      if (std::find(kKeys.begin(), kKeys.end(), key) == kKeys.end()) {
        problem(in_quotes(key) +
                " is not a key of a manifest (engine, module, kind, tensors, "
                "module_digest, state, version)");
      }
    }

    const std::optional<std::string> engine = text(root, "engine");
    const std::optional<std::string> module = text(root, "module");
    if (engine && module) {
      auto target = parse_target(*engine + "/" + *module);
      // The engine's own slash would move the border.
      if (target && target->engine == *engine) {
        file_.target = std::move(*target);
      } else {
        problem("\"engine\" " + in_quotes(*engine) + " and \"module\" " + in_quotes(*module) +
                " are not the names of an engine and a module");
      }
    } else if (root.contains("engine") != root.contains("module")) {
      problem(
          "\"engine\" and \"module\" belong together: give both, or none and the target as an "
          "argument");
    }

    if (const auto kind = text(root, "kind")) {
      file_.kind = parse_digest_kind(*kind);
      if (!file_.kind) problem("\"kind\" " + in_quotes(*kind) + " is not sglang, raw or xxh3");
    }
    if (const auto found = root.find("module_digest"); found != root.end() && !found->is_null()) {
      file_.module = digest(*found, "\"module_digest\"");
    }
    if (tensors.is_object()) {
      parse_digests(tensors, "tensor ");
    } else {
      problem("\"tensors\" is not an object of names and digests");
    }
  }

  void parse_digests(const Json& object, const std::string& prefix) {
    // A JSON object's keys come sorted, as the checker wants them.
    for (const auto& [name, value] : object.items()) {
      if (name.empty()) {
        problem("a tensor has an empty name");
      } else if (const auto parsed = digest(value, prefix + in_quotes(name))) {
        file_.expected.emplace_back(name, *parsed);
      }
    }
    if (object.empty()) problem("no tensor is named, so there is nothing to check");
    const bool all_short =
        !file_.expected.empty() &&
        std::all_of(file_.expected.begin(), file_.expected.end(), [](const NamedDigest& named) {
          return named.second.length == digest_bytes(DigestKind::xxh3);
        });
    if (all_short && !file_.kind) file_.kind = DigestKind::xxh3;
  }

  std::optional<Digest> digest(const Json& value, const std::string& what) {
    if (!value.is_string()) {
      problem(what + " is not a string of hex digits");
      return std::nullopt;
    }
    const auto& hex = value.get_ref<const std::string&>();
    const auto parsed = Digest::from_hex(hex);
    if (!parsed) {
      problem(what + " is not a digest: 64 hex digits of SHA-256 or 32 of XXH3-128 are, and not " +
              std::to_string(hex.size()) + " characters" +
              (hex.size() == 64 || hex.size() == 32 ? " with other letters" : ""));
    }
    return parsed;
  }

  std::optional<std::string> text(const Json& root, const char* key) {
    const auto found = root.find(key);
    if (found == root.end()) return std::nullopt;
    if (found->is_string()) return found->get<std::string>();
    problem(in_quotes(key) + " is not a string");
    return std::nullopt;
  }

  void problem(std::string line) { problems_.push_back(std::move(line)); }

  std::vector<std::string> problems_;
  ManifestFile file_;
};

// A parser keeps the last of two equal keys without a word, which would drop an expectation: this
// finds them.
class DuplicateFinder {
 public:
  bool operator()(int /*depth*/, Json::parse_event_t event, Json& value) {
    switch (event) {
      case Json::parse_event_t::object_start:
        seen_.emplace_back();
        break;
      case Json::parse_event_t::object_end:
        seen_.pop_back();
        break;
      case Json::parse_event_t::key:
        if (!seen_.back().insert(value.get<std::string>()).second) {
          duplicates_.insert(value.get<std::string>());
        }
        break;
      default:
        break;
    }
    return true;
  }

  [[nodiscard]] std::vector<std::string> problems() const {
    std::vector<std::string> lines;
    for (const std::string& key : duplicates_)
      lines.push_back(in_quotes(key) + " stands there twice");
    return lines;
  }

 private:
  std::vector<std::set<std::string>> seen_;
  std::set<std::string> duplicates_;
};

}  // namespace

Result<ManifestFile> parse_manifest(std::string_view json, const std::string& label) {
  DuplicateFinder duplicates;
  Json root;
  try {
    root = Json::parse(
        json.begin(), json.end(),
        [&duplicates](int depth, Json::parse_event_t event, Json& value) {
          return duplicates(depth, event, value);
        },
        true);
  } catch (const Json::parse_error& error) {
    // Its text begins with the library's own error number in brackets.
    std::string reason = error.what();
    if (const std::size_t end = reason.find("] "); end != std::string::npos) {
      reason.erase(0, end + 2);
    }
    return fail(Errc::bad_argument, label + " is not JSON: " + reason);
  }
  if (!root.is_object()) {
    return fail(
        Errc::bad_argument,
        label + " is not a manifest: a JSON object is, as `refitctl digest --json` writes it");
  }
  Parser parser(duplicates.problems());
  ManifestFile file = parser.parse(root);
  if (!parser.problems().empty()) {
    const std::size_t count = parser.problems().size();
    return fail(Errc::bad_argument,
                label + " is not a manifest: " + std::to_string(count) +
                    (count == 1 ? " thing is wrong" : " things are wrong"),
                parser.problems());
  }
  return file;
}

Result<std::string> read_manifest_text(const std::string& path) {
  const bool is_stdin = path == "-";
  const int fd = is_stdin ? STDIN_FILENO : ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const std::string label = manifest_label(path);
  const auto failed = [&label](int error) {
    const bool wrong_path =
        error == ENOENT || error == ENOTDIR || error == EISDIR || error == ENAMETOOLONG;
    return Unexpected(Error{wrong_path ? Errc::bad_argument : Errc::os,
                            wrong_path ? 0 : error,
                            "cannot read the manifest " + label + ": " + std::strerror(error),
                            {}});
  };
  if (fd < 0) return failed(errno);

  std::string text;
  int error = 0;
  std::array<char, 65536> buffer;
  while (text.size() <= kManifestBytesMax) {
    const ssize_t count = ::read(fd, buffer.data(), buffer.size());
    if (count == 0) break;
    if (count < 0) {
      if (errno == EINTR) continue;
      error = errno;
      break;
    }
    text.append(buffer.data(), static_cast<std::size_t>(count));
  }
  if (!is_stdin) ::close(fd);
  if (error != 0) return failed(error);
  if (text.size() > kManifestBytesMax) {
    return fail(Errc::bad_argument, "the manifest " + label + " is larger than " +
                                        std::to_string(kManifestBytesMax >> 20U) + " MiB");
  }
  return text;
}

std::string manifest_label(const std::string& path) {
  return path == "-" ? "standard input" : path;
}

std::optional<DigestKind> parse_digest_kind(std::string_view name) noexcept {
  for (const DigestKind kind : {DigestKind::sglang, DigestKind::raw, DigestKind::xxh3}) {
    if (name == digest_kind_name(kind)) return kind;
  }
  return std::nullopt;
}

std::size_t digest_bytes(DigestKind kind) noexcept { return kind == DigestKind::xxh3 ? 16 : 32; }

Result<void> check_digest_lengths(const ManifestFile& manifest, DigestKind kind,
                                  const std::string& label) {
  const std::size_t wanted = digest_bytes(kind);
  std::vector<std::string> problems;
  const auto look = [&](const std::string& what, const Digest& digest) {
    if (digest.length != wanted) {
      problems.push_back(what + " has " + std::to_string(digest.length * 2) + " hex digits, " +
                         std::string(digest_kind_name(kind)) + " has " +
                         std::to_string(wanted * 2));
    }
  };
  for (const auto& [name, digest] : manifest.expected) look("tensor " + in_quotes(name), digest);
  if (manifest.module) look("\"module_digest\"", *manifest.module);
  if (problems.empty()) return {};
  return fail(Errc::bad_argument,
              label + " does not hold digests of kind " + std::string(digest_kind_name(kind)) +
                  ": say which it holds with --kind",
              std::move(problems));
}

}  // namespace refit::ctl
