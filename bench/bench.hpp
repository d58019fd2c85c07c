// What the parts of one run of the bench share: options, the model, the figures so far, and what
// was skipped and why.
//
// Entered by the orchestrating thread. Knows nothing of how a figure is measured or judged.
#pragma once

#include <chrono>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "model.hpp"
#include "process.hpp"
#include "refit/result.hpp"
#include "storage.hpp"

namespace refit::bench {

/// The parts of a run, as --only names them.
inline constexpr const char* kParts[] = {"overhead", "ring",   "register",  "attach", "refit",
                                         "check",    "counts", "reconnect", "proof"};

struct Options {
  std::string manifest;
  double scale = 1;
  std::string memory = kHostMemory;  ///< of kMemoryKinds
  int steps = 30;
  std::vector<std::string> only;  ///< of kParts; empty means all
  std::string json_path;
  std::string refitd;
  bool quick = false;  ///< few repetitions: proves that everything runs, measures nothing
  bool quiet = false;
};

class Bench {
 public:
  /// Errors: bad_argument for a manifest that is not good; unsupported where --memory needs a
  /// driver and there is none.
  static Result<Bench> make(Options options);

  [[nodiscard]] bool wants(const std::string& part) const;
  /// `full` repetitions, or `quick` with --quick.
  [[nodiscard]] int times(int full, int quick) const { return options.quick ? quick : full; }
  void progress(const std::string& text) const;
  /// Records that `key` was not measured.
  void skip(const std::string& key, const std::string& reason);

  /// The fields of a role's "allocate" command for this model.
  [[nodiscard]] nlohmann::json model_fields(bool cut) const;

  [[nodiscard]] bool on_devices() const { return options.memory != kHostMemory; }

  Options options;
  Model model;
  bool fake_driver = false;  ///< the project's own: no time of it means anything
  TemporaryDirectory directory;
  nlohmann::ordered_json figures;  ///< every key of the output; null until measured

 private:
  Bench(Options given, Model loaded, TemporaryDirectory made)
      : options(std::move(given)), model(std::move(loaded)), directory(std::move(made)) {}
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

/// An engine and a trainer with a model in memory, on no daemon yet.
struct Pair {
  Peer engine;
  Peer trainer;

  /// Starts both and lets them allocate; `cut` cuts every tensor to 64 bytes.
  static Result<Pair> start(const Bench& bench, bool cut);
  /// Both connect and register; the engine then waits in its gate. Seconds of both registrations.
  Result<double> attach(const std::string& socket, const std::string& waiting);
  Result<void> detach();
  /// Ends both, the trainer first, which has the engine's memory open. Errors: a process that ended
  /// badly; the fake driver has that of a leak or of a misuse.
  Result<void> end();
  /// step_us 0: waits in its gate; else steps that long and polls.
  Result<void> open_gate(int step_us);
  Result<void> close_gate();
  /// Seconds of `count` refits, whose arrival was compared after the last.
  Result<std::vector<double>> refits(int count);
};

/// fixed_overhead_us, register_ms, and the counts with 64-byte tensors.
[[nodiscard]] Result<void> measure_small(Bench& bench);
/// ring_rtt_ns.
[[nodiscard]] Result<void> measure_ring(Bench& bench);
/// Everything at the model's own size.
[[nodiscard]] Result<void> measure_full(Bench& bench);

/// Allocations, faults, system calls, yields and opens per refit of a fresh daemon that `pair`
/// attaches to, under the key `size` ("full" or "small") of each figure. Detaches at the end.
[[nodiscard]] Result<void> count_per_refit(Bench& bench, Pair& pair, const std::string& size,
                                           int refits, int traced_refits);

/// From `kill -9` of an idle daemon to the end of the next refit, under socket activation, under
/// the key `size` of reconnect_ms. Detaches at the end.
[[nodiscard]] Result<void> measure_reconnect(Bench& bench, Pair& pair, const std::string& size);

/// What a proof costs the refit that begins beside it, by copies that the trainer has calibrated.
/// Detaches at the end.
[[nodiscard]] Result<void> measure_proof(Bench& bench, Pair& pair);

}  // namespace refit::bench
