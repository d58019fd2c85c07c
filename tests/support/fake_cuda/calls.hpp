// Calls: what happens around every entry point, whatever it does.
//
// entry_points.inc is the one list: it names the exported symbols and the functions behind them,
// decides what cuGetProcAddress answers, and with its order numbers the calls for counting and for
// injected failures.
#pragma once

#include <cudaTypedefs.h>

#include <cstddef>
#include <mutex>
#include <optional>
#include <type_traits>

#include "support/fake_cuda/faults.hpp"

namespace fakecuda {

struct ProcessPage;

/// What a call needs to be let in.
enum class Needs {
  nothing,  ///< not even cuInit
  init,     ///< cuInit; a lost device does not matter
  device,   ///< cuInit, and a device that is not lost
  context   ///< and a current context
};

enum class Entry : std::size_t {
#define ENTRY(arity, name, version, symbol, needs, function) symbol,
#include "support/fake_cuda/entry_points.inc"
#undef ENTRY
  count
};

struct EntryPoint {
  const char* name;
  const char* symbol;
  int version;  ///< of CUDA that brought it
  void* address;
  Needs needs;
};
const EntryPoint& entry_point(Entry entry);
/// Fills in the names of the counters.
void name_calls(ProcessPage& page);

/// From the first to the last moment of a call. Holds the driver's lock.
class Call {
 public:
  explicit Call(Entry entry);
  /// What to return without doing anything; nothing if the call is let in.
  [[nodiscard]] const std::optional<CUresult>& refusal() const { return refusal_; }
  CUresult end(CUresult result);

 private:
  std::optional<CUresult> check() const;

  Entry entry_;
  std::unique_lock<std::mutex> lock_;
  std::optional<Fault> fault_;
  std::optional<CUresult> refusal_;
};

template <typename Function, typename... Arguments>
CUresult enter(Entry entry, Function function, Arguments... arguments) {
  Call call(entry);
  return call.refusal() ? *call.refusal() : call.end(function(arguments...));
}

/// The old entries with 32-bit addresses: what dlsym finds under the bare names.
CUresult call_obsolete();

/// Parameter `index` of one of the toolkit's PFN_ types.
template <typename Function, std::size_t index>
struct ParameterOf;
template <typename Result, typename First, typename... Rest, std::size_t index>
struct ParameterOf<Result (*)(First, Rest...), index>
    : ParameterOf<Result (*)(Rest...), index - 1> {};
template <typename Result, typename First, typename... Rest>
struct ParameterOf<Result (*)(First, Rest...), 0> {
  using Type = First;
};
template <typename Function, std::size_t index>
using Parameter = typename ParameterOf<Function, index>::Type;

}  // namespace fakecuda
