// Streams and events.

#include <unistd.h>

#include <algorithm>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

/// Undefined on hardware: the memory behind the event may be anybody's.
void complain_if_destroyed(const Event& event) {
  if (event.imported && event.page().destroyed.load() != 0)
    driver().violation(
        text("use of an imported event that pid ", event.page().creator_pid, " has destroyed"));
}

}  // namespace

CUresult stream_create_with_priority(CUstream* handle, unsigned int flags, int priority) {
  Driver& driver = fakecuda::driver();
  if (handle == nullptr || flags > CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
  *handle = driver.streams.add(driver.engine.create(Driver::current(), flags, priority));
  return CUDA_SUCCESS;
}

CUresult stream_create(CUstream* handle, unsigned int flags) {
  return stream_create_with_priority(handle, flags, 0);
}

CUresult stream_destroy(CUstream handle) {
  const auto stream = driver().streams.find(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  // Its work is still done, when somebody needs it.
  stream->destroyed = true;
  driver().streams.remove(handle);
  return CUDA_SUCCESS;
}

CUresult stream_synchronize(CUstream handle) {
  Driver& driver = fakecuda::driver();
  const auto stream = driver.streams.find(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  driver.engine.finish(stream);
  return driver.surface();
}

CUresult stream_query(CUstream handle) {
  Driver& driver = fakecuda::driver();
  const auto stream = driver.streams.find(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const bool done = driver.engine.query(stream);
  const CUresult result = driver.surface();
  return result != CUDA_SUCCESS || done ? result : CUDA_ERROR_NOT_READY;
}

CUresult stream_wait_event(CUstream handle, CUevent event_handle, unsigned int flags) {
  Driver& driver = fakecuda::driver();
  if (flags != CU_EVENT_WAIT_DEFAULT) return CUDA_ERROR_INVALID_VALUE;
  const auto stream = driver.usable_stream(handle);
  if (!stream) return stream.error();
  const auto event = driver.events.find(event_handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  complain_if_destroyed(*event);
  const std::uint64_t record = event->latest();
  if (record == 0) {
    // A silent success on hardware, and no wait.
    driver.violation("cuStreamWaitEvent on an event that was never recorded");
    return CUDA_SUCCESS;
  }
  driver.engine.enqueue(**stream, WaitFor{event, record});
  return CUDA_SUCCESS;
}

CUresult event_create(CUevent* handle, unsigned int flags) {
  Driver& driver = fakecuda::driver();
  constexpr unsigned int kFlags =
      CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS;
  const bool shared = (flags & CU_EVENT_INTERPROCESS) != 0;
  if (handle == nullptr || (flags & ~kFlags) != 0 ||
      (shared && (flags & CU_EVENT_DISABLE_TIMING) == 0))
    return CUDA_ERROR_INVALID_VALUE;
  const ProcessId self = driver.process.id();
  if (!shared) {
    *handle = driver.events.add(Event::create(Driver::current(), flags, self));
    return CUDA_SUCCESS;
  }
  if (!driver.device(Driver::current()->device).ipc) return CUDA_ERROR_NOT_SUPPORTED;
  const std::uint64_t number = ++driver.last_file;
  auto event =
      Event::create_shared(Driver::current(), flags, self, scramble(self.instance ^ number),
                           driver.file_path("e-", self, number));
  if (event == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  event->number = number;
  *handle = driver.events.add(std::move(event));
  return CUDA_SUCCESS;
}

CUresult event_destroy(CUevent handle) {
  Driver& driver = fakecuda::driver();
  const auto event = driver.events.find(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (event->is_shared() && !event->imported) {
    event->page().destroyed.store(1);
    ::unlink(driver.file_path("e-", driver.process.id(), event->number).c_str());
  }
  driver.events.remove(handle);
  return CUDA_SUCCESS;
}

CUresult event_record(CUevent handle, CUstream stream_handle) {
  Driver& driver = fakecuda::driver();
  const auto event = driver.events.find(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const auto stream = driver.usable_stream(stream_handle);
  if (!stream) return stream.error();
  if (event->context != (*stream)->context) return CUDA_ERROR_INVALID_HANDLE;
  complain_if_destroyed(*event);
  if (const std::uint64_t old = event->record_in_the_way()) {
    if (!driver.process.is_self(event->recorder(old)))
      driver.violation("an event with 64 records of another process that are all pending");
    driver.engine.finish(event, old);
  }
  const std::uint64_t record = event->begin_record(driver.process.id());
  driver.engine.enqueue(**stream, Complete{event, record});
  return CUDA_SUCCESS;
}

CUresult event_query(CUevent handle) {
  Driver& driver = fakecuda::driver();
  const auto event = driver.events.find(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  complain_if_destroyed(*event);
  const bool done = driver.engine.query(event);
  const CUresult result = driver.surface();
  return result != CUDA_SUCCESS || done ? result : CUDA_ERROR_NOT_READY;
}

CUresult event_synchronize(CUevent handle) {
  Driver& driver = fakecuda::driver();
  const auto event = driver.events.find(handle);
  if (event == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  complain_if_destroyed(*event);
  if (const std::uint64_t record = event->latest()) driver.engine.finish(event, record);
  return driver.surface();
}

}  // namespace fakecuda
