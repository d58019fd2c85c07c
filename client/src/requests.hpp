// The messages that more than one kind of client sends: registration, check and digest.
#pragma once

#include "held_state.hpp"
#include "refit/checker.hpp"
#include "refit/module.hpp"
#include "session.hpp"

namespace refit {

/// Sends the regions' fds and the manifest; the reply goes to registered_slot(). `residency_base`
/// is the number of the module's first residency word.
Result<std::uint64_t> post_registration(Session& session, const ModuleSpec& module,
                                        const HeldState& held, Deadline deadline,
                                        std::uint32_t residency_base = 0);
/// The module's slot among the state words.
Result<std::uint32_t> registered_slot(const wire::Reply& reply);
/// Both, and the wait between them.
Result<std::uint32_t> register_module(Session& session, const ModuleSpec& module,
                                      const HeldState& held, Deadline deadline,
                                      std::uint32_t residency_base = 0);
Result<void> unregister_module(Session& session, const std::string& module, Deadline deadline);
Result<CheckReport> check(Session& session, const CheckRequest& request, Deadline deadline);
Result<DigestReport> digest(Session& session, const DigestRequest& request, Deadline deadline);

[[nodiscard]] flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<wire::ExpectedDigest>>>
expected_to_wire(flatbuffers::FlatBufferBuilder& fbb, const std::vector<NamedDigest>& expected);

/// What the daemon may use of the time that is left: a little less, so that its named error arrives
/// before the caller's own deadline does.
std::uint64_t daemon_budget_us(Deadline deadline);

}  // namespace refit
