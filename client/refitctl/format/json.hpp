// What refitctl shows to programs: answers of the daemon as JSON with stable keys.
//
// Pure; any thread. The keys are documented in each command's --help and only ever added to. Knows
// nothing of options and the socket.
#pragma once

#include <string>
#include <vector>

#include "refit/observer.hpp"
#include "refitctl/check_result.hpp"
#include "refitctl/target.hpp"

namespace refit::ctl {

// Text is ASCII and indented. Bytes of a name that are no UTF-8 become U+FFFD.
[[nodiscard]] std::string status_json(const DaemonStatus& status);
/// One turn of a watch in one line: status_json() with "time" and "note", or the error and those.
[[nodiscard]] std::string status_json_line(const DaemonStatus& status, const std::string& time,
                                           const std::string& note);
[[nodiscard]] std::string silence_json_line(const Error& error, const std::string& time,
                                            const std::string& note);
[[nodiscard]] std::string sessions_json(const DaemonStatus& status);
[[nodiscard]] std::string modules_json(const DaemonStatus& status);
[[nodiscard]] std::string tensors_json(const Target& target,
                                       const std::vector<TensorSpec>& tensors);
[[nodiscard]] std::string check_json(const CheckResult& result);

/// What `check` takes. Errc::bad_manifest if a name is no UTF-8: JSON cannot carry it, and a
/// replaced name would be another tensor's.
[[nodiscard]] Result<std::string> digest_json(const Target& target, DigestKind kind,
                                              const DigestReport& report,
                                              Place place = Place::host);

}  // namespace refit::ctl
