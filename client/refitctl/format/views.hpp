// What refitctl shows to people: answers of the daemon as text.
//
// Pure; any thread. Knows nothing of options, the socket or JSON.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "refit/observer.hpp"
#include "refitctl/check_result.hpp"
#include "refitctl/format/style.hpp"
#include "refitctl/target.hpp"

namespace refit::ctl {

[[nodiscard]] std::string status_text(const DaemonStatus& status, const Style& style);
/// One line for the daemon and one for each module, each beginning with `time`: what a watch
/// appends to a file.
[[nodiscard]] std::string status_lines(const DaemonStatus& status, const std::string& time);
/// `user_label` names a uid's user.
[[nodiscard]] std::string sessions_text(const DaemonStatus& status,
                                        const std::function<std::string(std::uint32_t)>& user_label,
                                        const Style& style);
[[nodiscard]] std::string modules_text(const DaemonStatus& status, const Style& style);
[[nodiscard]] std::string tensors_text(const Target& target, const std::vector<TensorSpec>& tensors,
                                       const Style& style);
[[nodiscard]] std::string digest_text(const Target& target, DigestKind kind,
                                      const DigestReport& report, double elapsed_us,
                                      const Style& style);
[[nodiscard]] std::string check_text(const CheckResult& result, const Style& style);

/// The first 8 of the id's 32 hex digits; empty for no transaction.
[[nodiscard]] std::string short_transaction(const TransactionId& id);

/// Bytes of a tensor's elements; the largest number if the product does not fit.
[[nodiscard]] std::uint64_t tensor_bytes(const TensorSpec& tensor) noexcept;

}  // namespace refit::ctl
