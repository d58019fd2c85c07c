// What the two example programs share beside the model: commands on stdin, JSON lines on stdout,
// their common options.
//
// Main thread only. No torch in here, so that it compiles quickly.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <refit/connection.hpp>
#include <refit/memory.hpp>
#include <refit/module.hpp>
#include <refit/result.hpp>
#include <string>
#include <vector>

namespace dit {

using Json = nlohmann::ordered_json;

/// Writes one line and flushes it.
void emit(const Json& event);
/// Writes an "error" event and returns the exit status for main.
int report(const refit::Error& error);

/// Lines from stdin, waited for with a deadline and beside another descriptor.
class Commands {
 public:
  enum class Wake { command, descriptor, timeout, end };

  /// Waits until a line is there, `descriptor` (-1: none) is readable, stdin ended, or `timeout_ms`
  /// (-1: none) passed.
  Wake wait(int descriptor, int timeout_ms);
  /// The line that wait() announced.
  std::string take();

 private:
  std::optional<std::size_t> line_end() const;
  std::string buffer_;
  bool ended_ = false;
};

/// Options of both programs.
struct CommonOptions {
  std::string model = "S";
  std::string module = "transformer";
  std::string engine = "dit";
  refit::ConnectOptions connection;
  std::uint64_t seed = 0;
};
void add_common_options(CLI::App& app, CommonOptions& options);

/// "ready": who this is and where every tensor lies, so that other code can read the bytes through
/// /proc/PID/fd/FD without this library.
Json ready_event(const refit::ModuleSpec& spec);
/// "forward": SHA-256 over the little-endian float32 bytes, and the first few values.
Json forward_event(const std::vector<float>& values);

}  // namespace dit
