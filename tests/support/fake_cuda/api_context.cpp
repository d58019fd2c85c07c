// Primary contexts and the stack of current ones that each thread has.

#include <algorithm>
#include <vector>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

constexpr int kLeastPriority = 0;
constexpr int kGreatestPriority = -5;

std::vector<Context*>& stack() {
  thread_local std::vector<Context*> contexts;
  return contexts;
}

/// In the exclusive mode one process has the device.
bool is_unavailable(int physical) {
  const int mode = driver().device(physical).compute_mode;
  if (mode == CU_COMPUTEMODE_PROHIBITED) return true;
  if (mode != CU_COMPUTEMODE_EXCLUSIVE_PROCESS) return false;
  return driver().process.sum_of_others([physical](const ProcessPage& page) {
    return page.contexts[static_cast<std::size_t>(physical)].load();
  }) > 0;
}

/// What goes away with a context. The driver frees it without a word; here it is a leak.
void empty_context(Context& context) {
  Driver& driver = fakecuda::driver();
  const auto is_its = [&](const auto& object) { return object.context == &context; };
  std::vector<std::uint64_t> ranges;
  driver.ranges.for_each([&](const Range& range) {
    if (range.context == &context) ranges.push_back(range.base);
  });
  const std::size_t streams = driver.streams.count_if(is_its);
  const std::size_t events = driver.events.count_if(is_its);
  if (driver.sticky == CUDA_SUCCESS && !driver.leaks_excused &&
      ranges.size() + streams + events > 0)
    driver.violation(text("a primary context went away with ", ranges.size(), " ranges, ", streams,
                          " streams, ", events, " events in it"));
  driver.engine.finish_all(&context, /*blocking_only=*/false);
  for (const std::uint64_t base : ranges) driver.release_range(base);
  driver.streams.remove_if(is_its);
  driver.events.remove_if(is_its);
  context.peers.fill(false);
}

CUresult synchronize(Context& context) {
  Driver& driver = fakecuda::driver();
  driver.engine.finish_all(&context, /*blocking_only=*/false);
  return driver.surface();
}

}  // namespace

Context* Driver::current() { return stack().empty() ? nullptr : stack().back(); }

CUresult primary_retain(CUcontext* handle, CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  Context& context = driver().contexts[static_cast<std::size_t>(*physical)];
  if (context.retained == 0 && is_unavailable(*physical)) return CUDA_ERROR_DEVICE_UNAVAILABLE;
  ++context.retained;
  *handle = context.handle();
  return CUDA_SUCCESS;
}

CUresult primary_release(CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  Context& context = driver().contexts[static_cast<std::size_t>(*physical)];
  if (context.retained == 0) return CUDA_ERROR_INVALID_CONTEXT;
  if (context.retained == 1) empty_context(context);
  --context.retained;
  return CUDA_SUCCESS;
}

CUresult primary_reset(CUdevice device) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  empty_context(driver().contexts[static_cast<std::size_t>(*physical)]);
  return CUDA_SUCCESS;
}

CUresult primary_get_state(CUdevice device, unsigned int* flags, int* active) {
  const auto physical = driver().physical_of(device);
  if (!physical) return CUDA_ERROR_INVALID_DEVICE;
  if (flags == nullptr || active == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const Context& context = driver().contexts[static_cast<std::size_t>(*physical)];
  *flags = context.flags;
  *active = context.retained > 0 ? 1 : 0;
  return CUDA_SUCCESS;
}

CUresult ctx_push_current(CUcontext handle) {
  Context* context = driver().find_context(handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  stack().push_back(context);
  return CUDA_SUCCESS;
}

CUresult ctx_pop_current(CUcontext* handle) {
  if (stack().empty()) return CUDA_ERROR_INVALID_CONTEXT;
  if (handle != nullptr) *handle = stack().back()->handle();
  stack().pop_back();
  return CUDA_SUCCESS;
}

CUresult ctx_set_current(CUcontext handle) {
  Context* context = driver().find_context(handle);
  if (handle != nullptr && context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (!stack().empty()) stack().pop_back();
  if (context != nullptr) stack().push_back(context);
  return CUDA_SUCCESS;
}

CUresult ctx_get_current(CUcontext* handle) {
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *handle = stack().empty() ? nullptr : stack().back()->handle();
  return CUDA_SUCCESS;
}

CUresult ctx_get_device(CUdevice* device) {
  const Context* context = Driver::current();
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *device = driver().ordinal_of(context->device);
  return CUDA_SUCCESS;
}

CUresult ctx_get_device_of(CUdevice* device, CUcontext handle) {
  if (handle == nullptr) return ctx_get_device(device);
  const Context* context = driver().find_context(handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  if (device == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *device = driver().ordinal_of(context->device);
  return CUDA_SUCCESS;
}

CUresult ctx_synchronize() { return synchronize(*Driver::current()); }

CUresult ctx_synchronize_of(CUcontext handle) {
  Context* context = handle == nullptr ? Driver::current() : driver().find_context(handle);
  return context == nullptr ? CUDA_ERROR_INVALID_CONTEXT : synchronize(*context);
}

CUresult ctx_get_stream_priority_range(int* least, int* greatest) {
  if (least != nullptr) *least = kLeastPriority;
  if (greatest != nullptr) *greatest = kGreatestPriority;
  return CUDA_SUCCESS;
}

CUresult ctx_enable_peer_access(CUcontext handle, unsigned int flags) {
  const Context* peer = driver().find_context(handle);
  Context* context = Driver::current();
  if (peer == nullptr || peer == context) return CUDA_ERROR_INVALID_CONTEXT;
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!driver().device(peer->device).peers || !driver().device(context->device).peers)
    return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
  bool& enabled = context->peers[static_cast<std::size_t>(peer->device)];
  if (enabled) return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
  enabled = true;
  return CUDA_SUCCESS;
}

CUresult ctx_disable_peer_access(CUcontext handle) {
  const Context* peer = driver().find_context(handle);
  if (peer == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  bool& enabled = Driver::current()->peers[static_cast<std::size_t>(peer->device)];
  if (!enabled) return CUDA_ERROR_PEER_ACCESS_NOT_ENABLED;
  enabled = false;
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
