// Replies: one reused builder for everything the daemon answers, so that a steady answer allocates
// nothing.
//
// The loop thread alone. A client that lets its replies pile up is reported to whoever set
// `overrun`.
#pragma once

#include <functional>

#include "server/session.hpp"

namespace refit::daemon {

class Replies {
 public:
  /// Called when a reply could not be delivered; ends the session later, never from inside.
  std::function<void(Session&)> overrun;

  /// The builder for the next reply, empty.
  flatbuffers::FlatBufferBuilder& builder() {
    builder_.Clear();
    return builder_;
  }

  /// Sends what `body` was built as in builder().
  void send(Session& session, std::uint64_t request_id, wire::Body type,
            flatbuffers::Offset<void> body);
  void send_ok(Session& session, std::uint64_t request_id) {
    builder();
    send(session, request_id, wire::Body::NONE, {});
  }
  void send_error(Session& session, std::uint64_t request_id, const Error& error);

 private:
  void deliver(Session& session, std::uint64_t request_id);
  flatbuffers::FlatBufferBuilder builder_{std::size_t{16} * 1024};
};

}  // namespace refit::daemon
