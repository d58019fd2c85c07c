// What an engine says of a module that it registers again.
#pragma once

#include <cstdint>

#include "refit/types.hpp"

namespace refit {

struct HeldState {
  std::uint64_t version = 0;
  TransactionId transaction;
  bool poisoned = false;
  std::uint64_t selection = 0;  ///< which tensors `transaction` wrote, as the state word named them
  bool asleep = false;          ///< no memory: the module is registered by name and state alone
};

}  // namespace refit
