// Process: this process as others and the tests see it, and the others as this one sees them.
//
// The page p-<pid> is written by its own process alone, under the driver's lock but for what is
// said otherwise. A flock on it, held as long as the process lives, is what tells the others that
// it does: kill(pid, 0) would take a reused pid for it, and fails across users.
#pragma once

#include <functional>
#include <sstream>
#include <string>

#include "support/fake_cuda/configuration.hpp"
#include "support/fake_cuda/fake_cuda.hpp"
#include "support/fake_cuda/shared_file.hpp"

namespace fakecuda {

/// The parts, as an ostream would print them, in one string.
template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

/// For text(): an address.
struct Hex {
  std::uint64_t value;
  friend std::ostream& operator<<(std::ostream& stream, Hex hex) {
    return stream << "0x" << std::hex << hex.value << std::dec;
  }
};

class Process {
 public:
  bool open(const Configuration& configuration);

  [[nodiscard]] ProcessId id() const { return {page_->pid, page_->instance}; }
  [[nodiscard]] ProcessPage& page() const { return *page_; }
  [[nodiscard]] bool is_self(ProcessId other) const { return other == id(); }
  [[nodiscard]] bool is_alive(ProcessId other) const;

  /// Sums a word over all other living processes.
  template <typename Word>
  [[nodiscard]] std::uint64_t sum_of_others(Word&& word) const {
    std::uint64_t sum = 0;
    for_each_other([&](const ProcessPage& page) { sum += word(page); });
    return sum;
  }

  void set(Gauge gauge, std::uint64_t value) {
    page_->gauges[static_cast<std::size_t>(gauge)].store(value);
  }
  void add(Tally tally, std::uint64_t count = 1) {
    page_->tallies[static_cast<std::size_t>(tally)].fetch_add(count);
  }

  /// A misuse that hardware would tolerate or leave undefined. `description` is one line.
  void violation(const std::string& description);
  /// The same from where no lock can be taken: the child of a fork.
  void violation_after_fork();
  void forget_violations();

 private:
  void for_each_other(const std::function<void(const ProcessPage&)>& visit) const;

  std::string directory_;
  OnViolation on_violation_ = OnViolation::exit;
  ProcessPage* page_ = nullptr;
};

}  // namespace fakecuda
