// The exported symbols, written by the table. Nothing is to be added here for a new function.

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/functions.hpp"

// The names of n arguments; and with their types, taken from a function type F.
#define ARGUMENTS_0
#define ARGUMENTS_1 , a0
#define ARGUMENTS_2 ARGUMENTS_1, a1
#define ARGUMENTS_3 ARGUMENTS_2, a2
#define ARGUMENTS_4 ARGUMENTS_3, a3
#define ARGUMENTS_5 ARGUMENTS_4, a4
#define ARGUMENTS_6 ARGUMENTS_5, a5
#define ARGUMENTS_7 ARGUMENTS_6, a6
#define ARGUMENTS_8 ARGUMENTS_7, a7
#define ARGUMENTS_9 ARGUMENTS_8, a8
#define ARGUMENTS_10 ARGUMENTS_9, a9
#define ARGUMENTS_11 ARGUMENTS_10, a10
#define PARAMETERS_0(F)
#define PARAMETERS_1(F) fakecuda::Parameter<F, 0> a0
#define PARAMETERS_2(F) PARAMETERS_1(F), fakecuda::Parameter<F, 1> a1
#define PARAMETERS_3(F) PARAMETERS_2(F), fakecuda::Parameter<F, 2> a2
#define PARAMETERS_4(F) PARAMETERS_3(F), fakecuda::Parameter<F, 3> a3
#define PARAMETERS_5(F) PARAMETERS_4(F), fakecuda::Parameter<F, 4> a4
#define PARAMETERS_6(F) PARAMETERS_5(F), fakecuda::Parameter<F, 5> a5
#define PARAMETERS_7(F) PARAMETERS_6(F), fakecuda::Parameter<F, 6> a6
#define PARAMETERS_8(F) PARAMETERS_7(F), fakecuda::Parameter<F, 7> a7
#define PARAMETERS_9(F) PARAMETERS_8(F), fakecuda::Parameter<F, 8> a8
#define PARAMETERS_10(F) PARAMETERS_9(F), fakecuda::Parameter<F, 9> a9
#define PARAMETERS_11(F) PARAMETERS_10(F), fakecuda::Parameter<F, 10> a10

namespace {

constexpr auto obsolete = [](auto...) { return fakecuda::call_obsolete(); };

}  // namespace

extern "C" {

#define ENTRY(arity, name, version, symbol, needs, function)                         \
  __attribute__((visibility("default"))) CUresult symbol(                            \
      PARAMETERS_##arity(PFN_##name##_v##version)) {                                 \
    using namespace fakecuda; /* NOLINT: `function` is in it, or the lambda above */ \
    return enter(Entry::symbol, function ARGUMENTS_##arity);                         \
  }
#include "support/fake_cuda/entry_points.inc"
#undef ENTRY

}  // extern "C"

namespace fakecuda {

const EntryPoint& entry_point(Entry entry) {
  static const EntryPoint kPoints[] = {
#define ENTRY(arity, name, version, symbol, needs, function) \
  {#name, #symbol, version, reinterpret_cast<void*>(&::symbol), Needs::needs},
#include "support/fake_cuda/entry_points.inc"
#undef ENTRY
  };
  return kPoints[static_cast<std::size_t>(entry)];
}

}  // namespace fakecuda
