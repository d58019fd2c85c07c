#include "config/configuration.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "posix/unique_fd.hpp"

namespace refit::daemon {
namespace {

/// A file of a megabyte is no configuration; the bound keeps a wrong path from being read for long.
constexpr std::size_t kFileBytesMax = std::size_t{1} << 20;

Unexpected unreadable(const std::string& file, const std::string& why) {
  return fail(Errc::bad_configuration, "the configuration " + file + " cannot be read: " + why, {});
}

/// The file's text; nothing if it need not be there and is not.
Result<std::optional<std::string>> read(const ConfigurationSource& source) {
  // O_NONBLOCK: a FIFO of that name must not hold us.
  const UniqueFd fd =
      UniqueFd::adopt(::open(source.file.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) {
    if (errno == ENOENT && !source.file_required) return std::nullopt;
    return unreadable(source.file, std::strerror(errno));
  }
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) return unreadable(source.file, std::strerror(errno));
  if (S_ISDIR(status.st_mode) || S_ISFIFO(status.st_mode))
    return unreadable(source.file, "it is no regular file");
  std::string text(kFileBytesMax + 1, '\0');
  std::size_t bytes = 0;
  while (bytes < text.size()) {
    const ssize_t count = ::read(fd.get(), text.data() + bytes, text.size() - bytes);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return unreadable(source.file, std::strerror(errno));
    if (count == 0) break;
    bytes += static_cast<std::size_t>(count);
  }
  if (bytes > kFileBytesMax)
    return unreadable(source.file, "it has more than " + std::to_string(kFileBytesMax) + " bytes");
  text.resize(bytes);
  return text;
}

std::string flag_name(const Option& option) {
  const auto comma = option.flag.rfind(',');
  return std::string(option.flag.substr(comma == std::string_view::npos ? 0 : comma + 1));
}

template <typename Id>
std::string id_list(const std::vector<Id>& ids) {
  std::string text = "[";
  for (const Id id : ids) text += (text.size() > 1 ? ", " : "") + std::to_string(id);
  return text + "]";
}

/// A TOML basic string.
std::string quote(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x",
                    static_cast<unsigned>(static_cast<unsigned char>(c)));
      out += escaped;
      continue;
    }
    out += c;
  }
  return out + "\"";
}

}  // namespace

Result<Configuration> load(const ConfigurationSource& source) {
  Configuration configuration;
  configuration.file = source.file;
  configuration.origins.assign(options().size(), "built in");
  REFIT_TRY_ASSIGN(const std::optional<std::string> text, read(source));
  if (text) {
    configuration.file_read = true;
    REFIT_TRY(apply_text(*text, configuration));
  }
  for (const auto& [option, value] : source.flags) {
    option->set(configuration.settings, value);
    configuration.origins[static_cast<std::size_t>(option - options().data())] = flag_name(*option);
  }
  return configuration;
}

std::string print(const Configuration& configuration) {
  constexpr std::size_t kOriginColumn = 44;
  std::string text;
  std::string section;
  for (std::size_t i = 0; i < options().size(); ++i) {
    const Option& option = options()[i];
    const auto dot = option.key.find('.');
    const std::string_view name =
        dot == std::string_view::npos ? option.key : option.key.substr(dot + 1);
    if (dot != std::string_view::npos && section != option.key.substr(0, dot)) {
      section = option.key.substr(0, dot);
      text += "\n[" + section + "]\n";
    }
    std::string line =
        std::string(name) + " = " + value_text(option, option.get(configuration.settings));
    line.append(line.size() < kOriginColumn ? kOriginColumn - line.size() : 1, ' ');
    text += line + "# " + configuration.origins[i] + "\n";
  }
  for (std::size_t i = 0; i < configuration.settings.engines.size(); ++i) {
    const EngineRule& rule = configuration.settings.engines[i];
    text += "\n[[engine]]";
    text.append(kOriginColumn - std::strlen("[[engine]]"), ' ');
    text += "# " + configuration.rule_origins[i] + "\nname = " + quote(rule.name) + "\n";
    if (rule.owner) text += "owner = " + std::to_string(*rule.owner) + "\n";
    text += "allow_uids = " + id_list(rule.uids) + "\nallow_gids = " + id_list(rule.gids) + "\n";
  }
  return text;
}

Changes take_over(Configuration& running, Configuration loaded) {
  Changes changes;
  for (std::size_t i = 0; i < options().size(); ++i) {
    const Option& option = options()[i];
    const std::uint64_t old_value = option.get(running.settings);
    if (option.get(loaded.settings) == old_value) continue;
    if (option.live) {
      changes.changed.emplace_back(option.key);
    } else {
      changes.needs_restart.emplace_back(option.key);
      option.set(loaded.settings, old_value);
      loaded.origins[i] = running.origins[i];
    }
  }
  if (running.settings.engines != loaded.settings.engines) changes.changed.emplace_back("engine");
  running = std::move(loaded);
  return changes;
}

}  // namespace refit::daemon
