// Functions: declares what is behind every entry point, with the signature of the toolkit's own
// typedef. A definition that differs is another overload, and the link fails.
#pragma once

// Without it cuda.h renames the functions that it declares, and leaves out the old ones.
#ifndef __CUDA_API_VERSION_INTERNAL
#error "compile this with -D__CUDA_API_VERSION_INTERNAL"
#endif
#include <cuda.h>
#include <cudaTypedefs.h>

#include <type_traits>

namespace fakecuda {

#define OBSOLETE(arity, name, version, symbol)
#define ENTRY(arity, name, version, symbol, needs, function) \
  std::remove_pointer_t<PFN_##name##_v##version> function;
#include "support/fake_cuda/entry_points.inc"
#undef ENTRY

}  // namespace fakecuda
