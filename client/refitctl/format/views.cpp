// Answers of the daemon as text for people. Pure; any thread. Knows nothing of options, the socket
// or JSON.
#include "refitctl/format/views.hpp"

#include <limits>

#include "refitctl/format/table.hpp"
#include "refitctl/format/text.hpp"
#include "refitctl/format/units.hpp"

namespace refit::ctl {
namespace {

Paint state_paint(ModuleState state) noexcept {
  switch (state) {
    case ModuleState::poisoned:
      return Paint::bad;
    case ModuleState::writing:
      return Paint::warning;
    default:
      return Paint::none;
  }
}

Cell state_cell(ModuleState state) {
  return {std::string(module_state_name(state)), state_paint(state)};
}

std::string plural(std::uint64_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

std::string state_line(ModuleState state, std::uint64_t version, const Style& style) {
  return "version " + std::to_string(version) + ", " +
         style.paint(state_paint(state), module_state_name(state));
}

std::string mixed_warning(ModuleState state, const Style& style) {
  if (is_whole(state)) return {};
  return style.paint(Paint::bad, "the module is not whole") +
         ": its bytes may be a mix of old and new weights; refit it, then look again\n";
}

// How far the proof is behind the version that is there.
std::string proof_text(const std::optional<std::uint64_t>& proven, std::uint64_t version) {
  if (!proven) return "none";
  if (*proven >= version) return "up to date";
  return plural(version - *proven, "version") + " behind";
}

// What the daemon does not tell of another uid's: no zero that could be taken for a fact.
std::string unless(bool restricted, std::string text) {
  if (restricted) return "-";
  return text;
}

std::string module_table(const DaemonStatus& status, const Style& style) {
  Table table({{"MODULE"},
               {"STATE"},
               {"VERSION", Align::right},
               {"PROOF"},
               {"SOURCE"},
               {"TRANSACTION"},
               {"REFITS", Align::right},
               {"TENSORS", Align::right},
               {"SIZE", Align::right},
               {"PAGES"}});
  for (const ModuleStatus& module : status.modules) {
    table.add_row({module.engine + "/" + module.module, state_cell(module.state),
                   std::to_string(module.version),
                   unless(module.restricted, proof_text(module.proven_version, module.version)),
                   unless(module.restricted, module.source),
                   unless(module.restricted, short_transaction(module.transaction)),
                   unless(module.restricted, std::to_string(module.refits)),
                   unless(module.restricted, std::to_string(module.tensors)),
                   unless(module.restricted, format_bytes(module.bytes)),
                   Cell(module.asleep       ? "asleep"
                        : module.restricted ? "-"
                        : module.populated  ? "populated"
                                            : "pending")});
  }
  return table.render(style, 2);
}

std::string last_refit_table(const DaemonStatus& status, const Style& style) {
  Table table({{"MODULE"},
               {"WAIT", Align::right},
               {"GATE", Align::right},
               {"COPY", Align::right},
               {"CHECK", Align::right},
               {"TOTAL", Align::right},
               {"SIZE", Align::right},
               {"COPY RATE", Align::right}});
  for (const ModuleStatus& module : status.modules) {
    if (module.refits == 0) continue;
    const Phases& last = module.last;
    table.add_row(
        {module.engine + "/" + module.module, format_us(static_cast<double>(last.wait_us)),
         format_us(static_cast<double>(last.gate_us)), format_us(static_cast<double>(last.copy_us)),
         format_us(static_cast<double>(last.check_us)),
         format_us(static_cast<double>(last.total_us)), format_bytes(module.last_bytes),
         format_rate(module.last_bytes, static_cast<double>(last.copy_us))});
  }
  return table.render(style, 2);
}

std::string session_table(const DaemonStatus& status, const Style& style) {
  Table table({{"ID", Align::right},
               {"ROLE"},
               {"NAME"},
               {"UID", Align::right},
               {"PID", Align::right},
               {"MODULES", Align::right}});
  for (const SessionStatus& session : status.sessions) {
    table.add_row({std::to_string(session.id), std::string(role_name(session.role)), session.name,
                   std::to_string(session.uid),
                   unless(session.restricted, std::to_string(session.pid)),
                   unless(session.restricted, std::to_string(session.modules))});
  }
  return table.render(style, 2);
}

bool any_refit(const DaemonStatus& status) {
  for (const ModuleStatus& module : status.modules) {
    if (module.refits > 0) return true;
  }
  return false;
}

// Lists what a check found wrong, one name a line.
std::string name_list(const std::string& title, const std::vector<std::string>& names,
                      const Style& style) {
  if (names.empty()) return {};
  std::string text = style.paint(Paint::bad, title) + " " + std::to_string(names.size()) + "\n";
  for (const std::string& name : names) text += "  " + escape(name) + "\n";
  return text;
}

}  // namespace

std::string status_text(const DaemonStatus& status, const Style& style) {
  std::string text = style.paint(Paint::strong, "refitd " + escape(status.version)) + "  pid " +
                     std::to_string(status.pid) + "  up " + format_uptime(status.uptime_us) + "  " +
                     (status.draining ? style.paint(Paint::warning, "draining") : "serving") + "\n";
  text += "  socket   " + escape(status.socket) + "\n";
  text += "  waiting  " + std::string(waiting_name(status.waiting)) + "\n";
  text += "  copy     " + escape(status.copy_kernel) + ", " +
          plural(status.copy_threads, "thread") + "\n";
  text += "  refits   " + std::to_string(status.refits) + "\n";
  text += "\nModules\n";
  text += status.modules.empty() ? "  none: no engine has registered one\n"
                                 : module_table(status, style);
  if (any_refit(status)) {
    text += "\nLast refit, in microseconds\n";
    text += last_refit_table(status, style);
  }
  text += "\nSessions\n";
  text += status.sessions.empty() ? "  none\n" : session_table(status, style);
  return text;
}

std::string status_lines(const DaemonStatus& status, const std::string& time) {
  std::string text = time + " refitd pid=" + std::to_string(status.pid) +
                     " refits=" + std::to_string(status.refits) +
                     " sessions=" + std::to_string(status.sessions.size()) +
                     " modules=" + std::to_string(status.modules.size()) +
                     " draining=" + (status.draining ? "yes" : "no") + "\n";
  for (const ModuleStatus& module : status.modules) {
    text += time + " " + escape(module.engine + "/" + module.module) +
            " state=" + std::string(module_state_name(module.state)) +
            " version=" + std::to_string(module.version) +
            " refits=" + std::to_string(module.refits);
    if (module.refits > 0)
      text += " last_total_us=" + format_us(static_cast<double>(module.last.total_us));
    text += "\n";
  }
  return text;
}

std::string sessions_text(const DaemonStatus& status,
                          const std::function<std::string(std::uint32_t)>& user_label,
                          const Style& style) {
  Table table({{"ID", Align::right},
               {"ROLE"},
               {"NAME"},
               {"USER"},
               {"PID", Align::right},
               {"MODULES", Align::right},
               {"REGIONS", Align::right},
               {"SIZE", Align::right},
               {"IN FLIGHT", Align::right},
               {"AGE"}});
  for (const SessionStatus& session : status.sessions) {
    table.add_row({std::to_string(session.id), std::string(role_name(session.role)), session.name,
                   user_label(session.uid), unless(session.restricted, std::to_string(session.pid)),
                   unless(session.restricted, std::to_string(session.modules)),
                   unless(session.restricted, std::to_string(session.regions)),
                   unless(session.restricted, format_bytes(session.registered_bytes)),
                   unless(session.restricted, std::to_string(session.in_flight)),
                   unless(session.restricted, format_uptime(session.age_us))});
  }
  return table.render(style);
}

std::string modules_text(const DaemonStatus& status, const Style& style) {
  if (status.modules.empty()) return "No module is registered: no engine has connected yet.\n";
  Table table({{"MODULE"},
               {"STATE"},
               {"VERSION", Align::right},
               {"TENSORS", Align::right},
               {"SIZE", Align::right},
               {"REFITS", Align::right},
               {"SOURCE"},
               {"TRANSACTION"}});
  for (const ModuleStatus& module : status.modules) {
    table.add_row({module.engine + "/" + module.module, state_cell(module.state),
                   std::to_string(module.version),
                   unless(module.restricted, std::to_string(module.tensors)),
                   unless(module.restricted, format_bytes(module.bytes)),
                   unless(module.restricted, std::to_string(module.refits)),
                   unless(module.restricted, module.source),
                   unless(module.restricted, short_transaction(module.transaction))});
  }
  return table.render(style);
}

std::string tensors_text(const Target& target, const std::vector<TensorSpec>& tensors,
                         const Style& style) {
  bool any_box = false;
  std::uint64_t total_bytes = 0;
  for (const TensorSpec& tensor : tensors) {
    any_box = any_box || (!tensor.global_shape.empty() && tensor.global_shape != tensor.shape);
    const std::uint64_t bytes = tensor_bytes(tensor);
    const bool fits = bytes <= std::numeric_limits<std::uint64_t>::max() - total_bytes;
    total_bytes = fits ? total_bytes + bytes : std::numeric_limits<std::uint64_t>::max();
  }

  std::vector<Column> columns{{"TENSOR"},
                              {"DTYPE"},
                              {"SHAPE"},
                              {"STRIDES"},
                              {"REGION", Align::right},
                              {"OFFSET", Align::right},
                              {"SIZE", Align::right}};
  if (any_box) {
    columns.push_back({"OF SHAPE"});
    columns.push_back({"AT"});
  }
  Table table(std::move(columns));
  for (const TensorSpec& tensor : tensors) {
    std::vector<Cell> row{tensor.name,
                          std::string(dtype_name(tensor.dtype)),
                          shape_repr(tensor.shape),
                          tensor.strides.empty() ? std::string() : shape_repr(tensor.strides),
                          std::to_string(tensor.region),
                          std::to_string(tensor.offset_bytes),
                          format_bytes(tensor_bytes(tensor))};
    if (any_box && !tensor.global_shape.empty()) {
      row.emplace_back(shape_repr(tensor.global_shape));
      row.emplace_back(shape_repr(tensor.box_offset));
    }
    table.add_row(std::move(row));
  }
  return style.paint(Paint::strong, escape(target.to_string())) + "  " +
         plural(tensors.size(), "tensor") + ", " + format_bytes(total_bytes) + "\n" +
         table.render(style);
}

std::string digest_text(const Target& target, DigestKind kind, const DigestReport& report,
                        double elapsed_us, const Style& style) {
  std::string text = style.paint(Paint::strong, escape(target.to_string())) + "  " +
                     state_line(report.state, report.version, style) + "  " +
                     std::string(digest_kind_name(kind)) + " of " +
                     plural(report.tensors.size(), "tensor") + " in " +
                     format_duration_us(elapsed_us) + "\n";
  text += mixed_warning(report.state, style);
  Table table({{"DIGEST"}, {"TENSOR"}});
  for (const auto& [name, digest] : report.tensors) table.add_row({digest.to_hex(), name});
  for (const auto& [name, digest] : report.device)
    table.add_row({digest.to_hex(), name + " (device)"});
  text += table.render(style);
  text += name_list("not on the device", report.absent, style);
  if (report.module.length != 0) text += "\nModule digest  " + report.module.to_hex() + "\n";
  return text;
}

std::string check_text(const CheckResult& result, const Style& style) {
  const CheckReport& report = result.report;
  std::string text =
      style.paint(Paint::strong, escape(result.target.to_string())) + "  " +
      state_line(report.state, report.version, style) + "  " +
      (result.ok() ? style.paint(Paint::good, "ok") : style.paint(Paint::bad, "FAILED")) + "\n";
  text += mixed_warning(report.state, style);
  text += std::to_string(report.verified) + " of " + plural(result.expected, "tensor") +
          " verified by " + std::string(digest_kind_name(result.kind)) + " in " +
          format_duration_us(result.elapsed_us) +
          "; proof of the whole module: " + proof_text(report.proven_version, report.version) +
          "\n";
  if (result.module_equal) {
    text += *result.module_equal ? "the module's digest is equal\n"
                                 : style.paint(Paint::bad, "the module's digest differs") + "\n";
  }
  text += name_list("mismatched", report.mismatched, style);
  text += name_list("mismatched on the device", report.device_mismatched, style);
  text += name_list("not on the device", report.absent, style);
  text += name_list("missing", report.missing, style);
  if (result.tensors_live && *result.tensors_live > result.expected) {
    text += plural(*result.tensors_live - result.expected, "tensor") +
            " of the module not in the manifest, so not looked at\n";
  }
  return text;
}

std::string short_transaction(const TransactionId& id) {
  return id.is_zero() ? std::string() : id.to_string().substr(0, 8);
}

std::uint64_t tensor_bytes(const TensorSpec& tensor) noexcept {
  std::uint64_t bytes = element_bytes(tensor.dtype);
  for (const std::uint64_t extent : tensor.shape) {
    if (extent == 0) return 0;
  }
  for (const std::uint64_t extent : tensor.shape) {
    if (bytes > std::numeric_limits<std::uint64_t>::max() / extent) {
      return std::numeric_limits<std::uint64_t>::max();
    }
    bytes *= extent;
  }
  return bytes;
}

}  // namespace refit::ctl
