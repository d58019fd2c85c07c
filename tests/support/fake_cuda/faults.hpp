// Faults: which calls are made to fail, and how. Syntax: fakecuda_set_faults in fake_cuda.hpp.
//
// Used under the driver's lock. Knows calls by number and name alone.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fakecuda {

enum class FaultKind { refuse, after, later };

struct Fault {
  CUresult code;
  FaultKind kind;
};

class Faults {
 public:
  /// False, and unchanged, if the text cannot be read.
  bool set(std::string_view text);
  /// To be asked once for every call. `name` and `symbol` are both what a fault may go by.
  std::optional<Fault> strike(std::string_view name, std::string_view symbol);

 private:
  struct Rule {
    std::string name;                            ///< of all calls if empty
    std::optional<std::uint64_t> calls_to_come;  ///< the last of them is struck; all if none
    Fault fault;
  };
  static std::optional<Rule> parse(std::string_view text);

  std::vector<Rule> rules_;
};

}  // namespace fakecuda
