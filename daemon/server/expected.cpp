#include "server/expected.hpp"

#include <algorithm>

#include "server/decode.hpp"

namespace refit::daemon {

Result<std::shared_ptr<const Expected>> Expected::of(const BoundPlan& plan,
                                                     const wire::Target& wanted) {
  if (wanted.expected() == nullptr || wanted.expected()->size() == 0)
    return std::shared_ptr<const Expected>();
  REFIT_TRY_ASSIGN(const auto digests, decode_expected(wanted.expected(), wanted.expected_kind(),
                                                       "a refit with expected digests"));
  const Manifest& manifest = *plan.target->manifest;
  const auto& written = plan.plan.targets;
  auto expected = std::make_shared<Expected>();
  expected->kind = static_cast<DigestKind>(wanted.expected_kind());
  std::vector<std::string> unknown;
  for (const auto& [name, digest] : digests) {
    const TensorSpec* const spec = manifest.find(name);
    if (spec == nullptr || !std::binary_search(written.begin(), written.end(),
                                               spec - manifest.tensors().data(), std::less<>())) {
      unknown.push_back("tensor " + name + " of " + manifest.label() + " is not written");
      continue;
    }
    expected->tensors.push_back(spec);
    expected->digests.push_back(digest);
  }
  if (!unknown.empty()) {
    std::sort(unknown.begin(), unknown.end());
    const std::string what = "expected digests of tensors that the refit does not write: " +
                             std::to_string(unknown.size());
    return fail(Errc::manifest_mismatch, what, std::move(unknown));
  }
  expected->complete = expected->tensors.size() == written.size();
  return expected;
}

}  // namespace refit::daemon
