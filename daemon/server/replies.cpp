#include "server/replies.hpp"

#include <utility>

#include "log.hpp"

namespace refit::daemon {

void Replies::send(Session& session, std::uint64_t request_id, wire::Body type,
                   flatbuffers::Offset<void> body) {
  wire::ReplyBuilder reply(builder_);
  reply.add_code(static_cast<std::uint16_t>(Errc::ok));
  if (type != wire::Body::NONE) {
    reply.add_body_type(type);
    reply.add_body(body);
  }
  builder_.Finish(reply.Finish());
  deliver(session, request_id);
}

void Replies::send_error(Session& session, std::uint64_t request_id, const Error& error) {
  if ((error.code == Errc::permission || error.code == Errc::quota) &&
      !std::exchange(session.denial_logged, true)) {
    LogFields fields = fields_of(session);
    fields.errc = error.code;
    log(LogEvent::request_denied, session.label_and_uid() + " was denied: " + error.message,
        fields);
  }
  // A list that is too long for one message is cut with its count, not dropped.
  constexpr std::size_t kDetailBytesMax = kPayloadBytesMax / 2;
  auto& fbb = builder();
  std::vector<flatbuffers::Offset<flatbuffers::String>> lines;
  std::size_t bytes = 0;
  for (std::size_t i = 0; i < error.details.size(); ++i) {
    bytes += error.details[i].size() + 16;
    if (bytes > kDetailBytesMax) {
      lines.push_back(fbb.CreateString("(+" + std::to_string(error.details.size() - i) + " more)"));
      break;
    }
    lines.push_back(fbb.CreateString(error.details[i]));
  }
  const auto message = fbb.CreateString(error.message);
  const auto details = fbb.CreateVector(lines);
  fbb.Finish(wire::CreateReply(fbb, static_cast<std::uint16_t>(error.code), message, details));
  deliver(session, request_id);
}

void Replies::deliver(Session& session, std::uint64_t request_id) {
  if (session.closed) return;
  if (session.in_flight > 0) --session.in_flight;
  if (builder_.GetSize() > kPayloadBytesMax) {
    ++session.in_flight;
    return send_error(session, request_id,
                      {Errc::quota,
                       0,
                       "the answer has " + std::to_string(builder_.GetSize()) +
                           " bytes, more than a message carries; ask for less at a time",
                       {}});
  }
  if (!session.reply(request_id, builder_) && overrun) overrun(session);
}

}  // namespace refit::daemon
