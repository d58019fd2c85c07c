// Answers of the daemon as JSON. Pure; any thread. Knows nothing of options and the socket.
#include "refitctl/format/json.hpp"

#include <cmath>
#include <nlohmann/json.hpp>

#include "refitctl/format/text.hpp"
#include "refitctl/format/views.hpp"

namespace refit::ctl {
namespace {

using Json = nlohmann::json;

std::string dump(const Json& json) {
  return json.dump(2, ' ', true, Json::error_handler_t::replace) + "\n";
}

std::string dump_line(const Json& json) {
  return json.dump(-1, ' ', true, Json::error_handler_t::replace) + "\n";
}

template <typename T>
Json or_null(const std::optional<T>& value) {
  return value ? Json(*value) : Json();
}

Json text_or_null(const std::string& text) { return text.empty() ? Json() : Json(text); }

// A float's shortest decimal, not the double that it widens to; JSON has no infinity.
Json microseconds(float us) {
  if (!std::isfinite(us)) return {};
  return std::round(static_cast<double>(us) * 1000) / 1000;
}

Json module_object(const ModuleStatus& module) {
  Json json = {
      {"engine", module.engine},
      {"module", module.module},
      {"state", module_state_name(module.state)},
      {"version", module.version},
      {"proven_version", or_null(module.proven_version)},
      {"source", text_or_null(module.source)},
      {"transaction", module.transaction.is_zero() ? Json() : Json(module.transaction.to_string())},
      {"tensors", module.tensors},
      {"bytes", module.bytes},
      {"refits", module.refits},
      {"populated", module.populated},
      {"asleep", module.asleep},
      {"restricted", module.restricted},
      {"last_refit", Json()}};
  if (module.refits > 0) {
    json["last_refit"] = {{"wait_us", microseconds(module.last.wait_us)},
                          {"gate_us", microseconds(module.last.gate_us)},
                          {"copy_us", microseconds(module.last.copy_us)},
                          {"check_us", microseconds(module.last.check_us)},
                          {"total_us", microseconds(module.last.total_us)},
                          {"bytes", module.last_bytes}};
  }
  return json;
}

Json module_array(const DaemonStatus& status) {
  Json modules = Json::array();
  for (const ModuleStatus& module : status.modules) modules.push_back(module_object(module));
  return modules;
}

Json session_array(const DaemonStatus& status) {
  Json sessions = Json::array();
  for (const SessionStatus& session : status.sessions) {
    sessions.push_back({{"id", session.id},
                        {"role", role_name(session.role)},
                        {"name", session.name},
                        {"uid", session.uid},
                        {"pid", session.pid},
                        {"modules", session.modules},
                        {"asleep", session.asleep},
                        {"restricted", session.restricted},
                        {"regions", session.regions},
                        {"registered_bytes", session.registered_bytes},
                        {"in_flight", session.in_flight},
                        {"age_us", session.age_us}});
  }
  return sessions;
}

Json status_object(const DaemonStatus& status) {
  return {{"daemon",
           {{"version", status.version},
            {"pid", status.pid},
            {"uptime_us", status.uptime_us},
            {"socket", status.socket},
            {"waiting", waiting_name(status.waiting)},
            {"copy_kernel", status.copy_kernel},
            {"copy_threads", status.copy_threads},
            {"draining", status.draining},
            {"refits", status.refits}}},
          {"sessions", session_array(status)},
          {"modules", module_array(status)}};
}

}  // namespace

std::string status_json(const DaemonStatus& status) { return dump(status_object(status)); }

std::string status_json_line(const DaemonStatus& status, const std::string& time,
                             const std::string& note) {
  Json json = status_object(status);
  json["time"] = time;
  json["note"] = text_or_null(note);
  return dump_line(json);
}

std::string silence_json_line(const Error& error, const std::string& time,
                              const std::string& note) {
  return dump_line({{"time", time},
                    {"note", text_or_null(note)},
                    {"error", {{"code", errc_name(error.code)}, {"message", error.message}}}});
}

std::string sessions_json(const DaemonStatus& status) {
  return dump({{"sessions", session_array(status)}});
}

std::string modules_json(const DaemonStatus& status) {
  return dump({{"modules", module_array(status)}});
}

std::string tensors_json(const Target& target, const std::vector<TensorSpec>& tensors) {
  Json list = Json::array();
  for (const TensorSpec& tensor : tensors) {
    list.push_back({{"name", tensor.name},
                    {"dtype", dtype_name(tensor.dtype)},
                    {"shape", tensor.shape},
                    {"strides", tensor.strides},
                    {"region", tensor.region},
                    {"offset_bytes", tensor.offset_bytes},
                    {"bytes", tensor_bytes(tensor)},
                    {"global_shape", tensor.global_shape},
                    {"box_offset", tensor.box_offset}});
  }
  return dump({{"engine", target.engine}, {"module", target.module}, {"tensors", list}});
}

Result<std::string> digest_json(const Target& target, DigestKind kind, const DigestReport& report,
                                Place place) {
  Json tensors = Json::object();
  Json device = Json::object();
  std::vector<std::string> unprintable;
  for (const auto& [name, digest] : report.tensors) {
    if (!is_utf8(name)) unprintable.push_back("tensor \"" + name + "\"");
    tensors[name] = digest.to_hex();
  }
  for (const auto& [name, digest] : report.device) {
    if (!is_utf8(name)) unprintable.push_back("tensor \"" + name + "\" on the device");
    device[name] = digest.to_hex();
  }
  for (const std::string& name : report.absent) {
    if (!is_utf8(name)) unprintable.push_back("absent tensor \"" + name + "\"");
  }
  if (!unprintable.empty()) {
    return fail(Errc::bad_manifest,
                "names in " + target.to_string() +
                    " are not UTF-8, so JSON cannot carry them; without --json they are shown",
                std::move(unprintable));
  }
  Json json = {{"engine", target.engine},
               {"module", target.module},
               {"kind", digest_kind_name(kind)},
               {"version", report.version},
               {"state", module_state_name(report.state)},
               {"module_digest", report.module.length == 0 ? Json() : Json(report.module.to_hex())},
               {"tensors", tensors}};
  if (place != Place::host) {
    json["device"] = device;
    json["absent"] = report.absent;
  }
  return dump(json);
}

std::string check_json(const CheckResult& result) {
  Json json = {{"engine", result.target.engine},
               {"module", result.target.module},
               {"kind", digest_kind_name(result.kind)},
               {"ok", result.ok()},
               {"expected", result.expected},
               {"equal", result.report.verified},
               {"missing", result.report.missing},
               {"mismatched", result.report.mismatched},
               {"module_equal", or_null(result.module_equal)},
               {"tensors_live", or_null(result.tensors_live)},
               {"state", module_state_name(result.report.state)},
               {"version", result.report.version},
               {"proven_version", or_null(result.report.proven_version)}};
  if (result.place != Place::host) {
    json["device_mismatched"] = result.report.device_mismatched;
    json["absent"] = result.report.absent;
  }
  return dump(json);
}

}  // namespace refit::ctl
