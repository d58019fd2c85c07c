// Exposition: reads Prometheus' text format as strictly as promtool does, and complains of every
// line that is not as it should be.
//
// One thread. Knows the format alone, and nothing of which metrics there are.
#pragma once

#include <cctype>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace refit::test {

class Exposition {
 public:
  using Labels = std::map<std::string, std::string>;

  explicit Exposition(const std::string& text) {
    if (text.empty() || text.back() != '\n') complain("the last line is not ended");
    std::size_t begin = 0;
    while (begin < text.size()) {
      const std::size_t end = std::min(text.find('\n', begin), text.size());
      line_ = text.substr(begin, end - begin);
      begin = end + 1;
      read_line();
    }
    end_family();
  }

  /// What is wrong; empty if the text is as it should be.
  [[nodiscard]] const std::vector<std::string>& complaints() const { return complaints_; }

  /// The value of one sample; NaN if there is none.
  [[nodiscard]] double value(const std::string& name, const Labels& labels = {}) const {
    const auto found = samples_.find({name, labels});
    return found == samples_.end() ? std::numeric_limits<double>::quiet_NaN() : found->second;
  }
  [[nodiscard]] bool has_family(const std::string& name) const { return families_.count(name) > 0; }
  [[nodiscard]] std::size_t sample_count() const { return samples_.size(); }

 private:
  void complain(const std::string& what) { complaints_.push_back(what + ": " + line_); }

  static bool is_name(std::string_view text, bool colon) {
    if (text.empty() || std::isdigit(static_cast<unsigned char>(text[0])) != 0) return false;
    for (const char c : text) {
      if (std::isalnum(static_cast<unsigned char>(c)) == 0 && c != '_' && !(colon && c == ':'))
        return false;
    }
    return true;
  }

  void read_line() {
    if (line_.empty()) return complain("an empty line");
    if (line_.rfind("# HELP ", 0) == 0) return read_help(line_.substr(7));
    if (line_.rfind("# TYPE ", 0) == 0) return read_type(line_.substr(7));
    if (line_[0] == '#') return complain("a comment");
    read_sample();
  }

  void read_help(const std::string& rest) {
    end_family();
    family_ = rest.substr(0, rest.find(' '));
    type_.clear();
    if (!is_name(family_, true)) complain("no metric name");
    if (!families_.insert(family_).second) complain("the family comes twice");
    if (rest.size() <= family_.size() + 1) complain("no help");
  }

  void read_type(const std::string& rest) {
    const std::string name = rest.substr(0, rest.find(' '));
    if (name != family_ || !type_.empty()) return complain("TYPE does not follow its HELP");
    type_ = rest.size() > name.size() ? rest.substr(name.size() + 1) : "";
    if (type_ != "counter" && type_ != "gauge" && type_ != "histogram") complain("no such type");
    const bool total = name.size() > 6 && name.substr(name.size() - 6) == "_total";
    if (total != (type_ == "counter")) complain("counters and only they end in _total");
  }

  void read_sample() {
    std::size_t at = 0;
    while (at < line_.size() && line_[at] != '{' && line_[at] != ' ') ++at;
    const std::string name = line_.substr(0, at);
    Labels labels;
    if (at < line_.size() && line_[at] == '{' && !read_labels(at, labels)) return;
    if (at >= line_.size() || line_[at] != ' ') return complain("no value");
    const std::string text = line_.substr(at + 1);
    char* end = nullptr;
    const double value =
        text == "+Inf" ? std::numeric_limits<double>::infinity() : std::strtod(text.c_str(), &end);
    if (text.empty() || (end != nullptr && *end != '\0')) return complain("no number");
    if (type_.empty()) return complain("a sample without TYPE");
    const std::string suffix = name.rfind(family_, 0) == 0 ? name.substr(family_.size()) : "?";
    const bool fits = type_ == "histogram"
                          ? suffix == "_bucket" || suffix == "_sum" || suffix == "_count"
                          : suffix.empty();
    if (!fits) complain("a sample of another family");
    if (type_ != "gauge" && !(value >= 0 && std::isfinite(value))) complain("a counter below zero");
    if (!samples_.emplace(std::make_pair(name, labels), value).second) complain("a duplicate");
    if (type_ == "histogram") add_to_histogram(suffix, labels, value);
  }

  bool read_labels(std::size_t& at, Labels& labels) {
    ++at;
    while (at < line_.size() && line_[at] != '}') {
      const std::size_t equals = line_.find('=', at);
      if (equals == std::string::npos || equals + 1 >= line_.size() || line_[equals + 1] != '"') {
        complain("a label without a quoted value");
        return false;
      }
      const std::string name = line_.substr(at, equals - at);
      if (!is_name(name, false)) complain("no label name");
      std::string value;
      at = equals + 2;
      for (; at < line_.size() && line_[at] != '"'; ++at) {
        if (line_[at] != '\\') {
          value += line_[at];
          continue;
        }
        const char escaped = ++at < line_.size() ? line_[at] : '?';
        if (escaped != '\\' && escaped != '"' && escaped != 'n') complain("an unknown escape");
        value += escaped == 'n' ? '\n' : escaped;
      }
      if (!labels.emplace(name, value).second) complain("a label comes twice");
      ++at;
      if (at < line_.size() && line_[at] == ',') ++at;
    }
    if (at >= line_.size()) {
      complain("labels that do not end");
      return false;
    }
    ++at;
    return true;
  }

  struct Buckets {
    double last_bound = -std::numeric_limits<double>::infinity();
    double last_count = 0;
    double count = -1;
    bool has_sum = false;
  };

  void add_to_histogram(const std::string& suffix, Labels labels, double value) {
    const std::string bound = labels["le"];
    labels.erase("le");
    Buckets& buckets = histogram_[labels];
    if (suffix == "_sum") {
      buckets.has_sum = true;
    } else if (suffix == "_count") {
      buckets.count = value;
    } else {
      const double le = bound == "+Inf" ? std::numeric_limits<double>::infinity()
                                        : std::strtod(bound.c_str(), nullptr);
      if (!(le > buckets.last_bound)) complain("bounds that do not grow");
      if (value < buckets.last_count) complain("buckets are not cumulative");
      buckets.last_bound = le;
      buckets.last_count = value;
    }
  }

  void end_family() {
    for (const auto& [labels, buckets] : histogram_) {
      if (!std::isinf(buckets.last_bound)) complain("no +Inf bucket in " + family_);
      if (buckets.count != buckets.last_count) complain("the count is not the last bucket's");
      if (!buckets.has_sum) complain("no sum in " + family_);
    }
    histogram_.clear();
  }

  std::string line_, family_, type_;
  std::set<std::string> families_;
  std::map<std::pair<std::string, Labels>, double> samples_;
  std::map<Labels, Buckets> histogram_;
  std::vector<std::string> complaints_;
};

}  // namespace refit::test
