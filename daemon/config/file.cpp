// The configuration file: TOML to settings, with everything that is wrong listed at its place.
//
// Blocks where a user's or group's name is looked up in a network; knows nothing of flags.

#include <grp.h>
#include <pwd.h>
#include <sys/types.h>
// toml++ 3.3 asserts in parse_time what a malformed file makes false: a typing error is no abort.
#define TOML_ASSERT(expr) static_assert(true)
#include <toml++/toml.h>

#include <algorithm>
#include <cstring>

#include "config/configuration.hpp"
#include "plan/text.hpp"

namespace refit::daemon {
namespace {

constexpr std::size_t kErrorsMax = 100;

std::optional<uid_t> uid_of(const std::string& name) {
  passwd entry{};
  passwd* found = nullptr;
  std::vector<char> buffer(16 << 10);
  ::getpwnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found);
  return found == nullptr ? std::nullopt : std::optional(found->pw_uid);
}

std::optional<gid_t> gid_of(const std::string& name) {
  group entry{};
  group* found = nullptr;
  // A group's entry holds all of its members' names.
  for (std::size_t bytes = 16 << 10; bytes <= (16 << 20); bytes *= 4) {
    std::vector<char> buffer(bytes);
    const int code = ::getgrnam_r(name.c_str(), &entry, buffer.data(), buffer.size(), &found);
    if (found != nullptr) return found->gr_gid;
    if (code != ERANGE) break;
  }
  return std::nullopt;
}

const char* type_name(const toml::node& node) {
  switch (node.type()) {
    case toml::node_type::table:
      return "a table";
    case toml::node_type::array:
      return "a list";
    case toml::node_type::string:
      return "text";
    case toml::node_type::integer:
      return "an integer";
    case toml::node_type::floating_point:
      return "a fraction";
    case toml::node_type::boolean:
      return "true or false";
    default:
      return "a date or time";
  }
}

/// What a value is, for the message that refuses it.
std::string shown(const toml::node& node) {
  if (const auto* text = node.as_string()) return in_quotes(text->get());
  if (const auto* number = node.as_integer()) return std::to_string(number->get());
  if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
  return type_name(node);
}

class FileReader {
 public:
  explicit FileReader(Configuration& into) : into_(into) {}

  Result<void> read(std::string_view text) {
    try {
      const toml::table parsed = toml::parse(text, std::string_view(into_.file));
      for (const auto& [key, node] : parsed) read_top(key, node);
    } catch (const toml::parse_error& error) {  // the library's way to say it; goes no further
      complain(error.source(), std::string(error.description()));
    }
    if (errors_.empty()) return {};
    std::stable_sort(errors_.begin(), errors_.end(), [](const Problem& a, const Problem& b) {
      return std::tie(a.line, a.column) < std::tie(b.line, b.column);
    });
    const std::size_t count = errors_.size();
    std::vector<std::string> lines;
    for (std::size_t i = 0; i < std::min(count, kErrorsMax); ++i)
      lines.push_back(std::move(errors_[i].text));
    if (count > kErrorsMax) lines.push_back("(+" + std::to_string(count - kErrorsMax) + " more)");
    return fail(Errc::bad_configuration,
                into_.file + " has " + std::to_string(count) + (count == 1 ? " error" : " errors"),
                std::move(lines));
  }

 private:
  struct Problem {
    unsigned line, column;
    std::string text;
  };

  void complain(const toml::source_region& where, const std::string& what) {
    errors_.push_back({where.begin.line, where.begin.column,
                       into_.file + ":" + std::to_string(where.begin.line) + ":" +
                           std::to_string(where.begin.column) + ": " + what});
  }

  void unknown(const toml::key& key, const std::string& full,
               const std::vector<std::string_view>& known) {
    const auto meant = nearest(full, known);
    std::string list;
    for (const std::string_view one : known) list += (list.empty() ? "" : ", ") + std::string(one);
    complain(key.source(),
             "unknown key " + in_quotes(full) +
                 (meant ? "; did you mean " + std::string(*meant) + "?" : "; known keys: " + list));
  }

  static bool is_section(const std::string& word) {
    return std::any_of(options().begin(), options().end(),
                       [&](const Option& one) { return one.key.starts_with(word + "."); });
  }

  void read_top(const toml::key& key, const toml::node& node) {
    if (key.str() == "engine") return read_rules(node);
    const std::string word(key.str());
    if (!is_section(word)) return read_option(word, key, node);
    const toml::table* section = node.as_table();
    if (section == nullptr) {
      return complain(node.source(),
                      word + " is a section, [" + word + "], and not " + shown(node));
    }
    for (const auto& [name, value] : *section)
      read_option(word + "." + std::string(name.str()), name, value);
  }

  void read_option(const std::string& full, const toml::key& key, const toml::node& node) {
    const Option* option = find_option(full);
    if (option == nullptr) {
      std::vector<std::string_view> known;
      for (const Option& one : options()) known.push_back(one.key);
      known.push_back("engine");
      return unknown(key, full, known);
    }
    std::optional<std::uint64_t> value;
    const auto* number = node.as_integer();
    const auto* text = node.as_string();
    const auto* flag = node.as_boolean();
    switch (option->type) {
      case OptionType::boolean:
        if (flag != nullptr) value = flag->get() ? 1 : 0;
        break;
      case OptionType::integer:
        if (number != nullptr) value = parse_value(*option, std::to_string(number->get()));
        break;
      case OptionType::bytes:
        if (number != nullptr) value = parse_value(*option, std::to_string(number->get()));
        if (text != nullptr) value = parse_value(*option, text->get());
        break;
      case OptionType::waiting:
        if (text != nullptr) value = parse_value(*option, text->get());
        break;
    }
    if (!value)
      return complain(node.source(),
                      full + " is " + allowed_text(*option) + ", and not " + shown(node));
    option->set(into_.settings, *value);
    into_.origins[static_cast<std::size_t>(option - options().data())] = place(node);
  }

  [[nodiscard]] std::string place(const toml::node& node) const {
    return into_.file + ":" + std::to_string(node.source().begin.line);
  }

  void read_rules(const toml::node& node) {
    const toml::array* list = node.as_array();
    if (list == nullptr)
      return complain(node.source(), "a rule begins with [[engine]], in double brackets");
    for (const toml::node& entry : *list) {
      const toml::table* table = entry.as_table();
      if (table == nullptr) {
        complain(entry.source(), "a rule begins with [[engine]], and is not " + shown(entry));
        continue;
      }
      read_rule(*table);
    }
  }

  void read_rule(const toml::table& table) {
    EngineRule rule;
    const std::size_t errors_before = errors_.size();
    for (const auto& [key, node] : table) {
      if (key.str() == "name") {
        const auto* text = node.as_string();
        if (text == nullptr || text->get().empty()) {
          complain(node.source(),
                   "engine.name is a glob such as \"flux*\", and not " + shown(node));
        } else {
          rule.name = text->get();
        }
      } else if (key.str() == "owner") {
        if (node.is_string()) {
          rule.owner = look_up<uid_t>(node, "engine.owner", "user", uid_of);
        } else {
          rule.owner = number<uid_t>(node, "engine.owner", "a uid or a user's name");
        }
      } else if (key.str() == "allow_uids") {
        each(node, "engine.allow_uids", [&](const toml::node& one) {
          if (const auto id = number<uid_t>(one, "engine.allow_uids", "a list of uids"))
            rule.uids.push_back(*id);
        });
      } else if (key.str() == "allow_gids") {
        each(node, "engine.allow_gids", [&](const toml::node& one) {
          if (const auto id = number<gid_t>(one, "engine.allow_gids", "a list of gids"))
            rule.gids.push_back(*id);
        });
      } else if (key.str() == "allow_users") {
        each(node, "engine.allow_users", [&](const toml::node& one) {
          if (const auto id = look_up<uid_t>(one, "engine.allow_users", "user", uid_of))
            rule.uids.push_back(*id);
        });
      } else if (key.str() == "allow_groups") {
        each(node, "engine.allow_groups", [&](const toml::node& one) {
          if (const auto id = look_up<gid_t>(one, "engine.allow_groups", "group", gid_of))
            rule.gids.push_back(*id);
        });
      } else {
        std::vector<std::string_view> known;
        for (const RuleKey& one : rule_keys()) known.push_back(one.key);
        unknown(key, std::string(key.str()), known);
      }
    }
    if (errors_.size() == errors_before && rule.name.empty())
      complain(table.source(),
               "this rule has no name: say which engines, by a glob such as name = \"flux*\"");
    if (errors_.size() != errors_before) return;
    const auto sort = [](auto& ids) {
      std::sort(ids.begin(), ids.end());
      ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    };
    sort(rule.uids);
    sort(rule.gids);
    into_.settings.engines.push_back(std::move(rule));
    into_.rule_origins.push_back(place(table));
  }

  template <typename Body>
  void each(const toml::node& node, const char* key, Body&& body) {
    const toml::array* list = node.as_array();
    if (list == nullptr)
      return complain(node.source(), std::string(key) + " is a list, and not " + shown(node));
    for (const toml::node& one : *list) body(one);
  }

  /// The kernel's (uid_t)-1 means nobody, so it is no id here.
  template <typename Id>
  std::optional<Id> number(const toml::node& node, const char* key, const char* wanted) {
    const auto* value = node.as_integer();
    if (value != nullptr && value->get() >= 0 &&
        value->get() < static_cast<std::int64_t>(UINT32_MAX))
      return static_cast<Id>(value->get());
    complain(node.source(),
             std::string(key) + " is " + wanted + " (0 to 4294967294), and not " + shown(node));
    return std::nullopt;
  }

  template <typename Id>
  std::optional<Id> look_up(const toml::node& node, const char* key, const char* what,
                            std::optional<Id> (*find)(const std::string&)) {
    const auto* text = node.as_string();
    if (text == nullptr) {
      complain(node.source(),
               std::string(key) + " takes names of " + what + "s, and not " + shown(node));
      return std::nullopt;
    }
    const auto id = find(text->get());
    if (!id)
      complain(node.source(), std::string(key) + ": there is no " + what + " " +
                                  in_quotes(text->get()) + " on this host");
    return id;
  }

  Configuration& into_;
  std::vector<Problem> errors_;
};

}  // namespace

Result<void> apply_text(std::string_view text, Configuration& into) {
  if (into.origins.empty()) into.origins.assign(options().size(), "built in");
  return FileReader(into).read(text);
}

}  // namespace refit::daemon
