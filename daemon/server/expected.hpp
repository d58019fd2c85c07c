// Expected: the digests that a trainer says the tensors of one target shall have.
//
// Any thread; immutable.
#pragma once

#include <memory>
#include <vector>

#include "ipc/wire.hpp"
#include "server/plan_cache.hpp"

namespace refit::daemon {

struct Expected {
  DigestKind kind = DigestKind::sglang;
  std::vector<const TensorSpec*> tensors;  ///< of the plan's target, which outlives this
  std::vector<Digest> digests;             ///< by the same index
  bool complete = false;                   ///< there is one for every tensor that the plan writes

  /// What came with a refit by `plan`; null if nothing did. Errors: as decode_expected;
  /// Errc::manifest_mismatch lists the names that the plan does not write.
  static Result<std::shared_ptr<const Expected>> of(const BoundPlan& plan,
                                                    const wire::Target& wanted);
};

}  // namespace refit::daemon
