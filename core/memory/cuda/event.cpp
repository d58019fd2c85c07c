#include "memory/cuda/event.hpp"

#include <cstring>

namespace refit::cuda {

Result<IpcEvent> IpcEvent::create(std::shared_ptr<const Context> context,
                                  const std::string& label) {
  if (!context->device().ipc_events)
    return fail(Errc::unsupported, label + ": device " + context->device().label() +
                                       " has no interprocess events; synchronise the stream "
                                       "before the refit instead");
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
  CUevent event = nullptr;
  REFIT_TRY_CUDA(context->driver(),
                 event_create(&event, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING),
                 label + ": an interprocess event (cuEventCreate)");
  return IpcEvent(std::move(context), event);
}

Result<IpcEvent> IpcEvent::open(std::shared_ptr<const Context> context, const IpcHandle& handle,
                                const std::string& label) {
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
  const Driver& driver = context->driver();
  CUipcEventHandle bytes{};
  static_assert(sizeof bytes.reserved == sizeof handle);
  std::memcpy(bytes.reserved, handle.data(), handle.size());
  CUevent event = nullptr;
  const CUresult code = driver.ipc_open_event_handle(&event, bytes);
  if (code == CUDA_SUCCESS) return IpcEvent(std::move(context), event);
  Unexpected error = fail_cuda(driver,
                               label +
                                   ": opening its event (cuIpcOpenEventHandle); it is no handle, "
                                   "its process destroyed it or ended, or is this very one",
                               code);
  // Which of several codes it is for bytes that are none is not documented.
  if (code != CUDA_ERROR_OUT_OF_MEMORY && !is_sticky(code)) {
    error.value().code = Errc::bad_argument;
    error.value().native = 0;
  }
  return error;
}

IpcEvent& IpcEvent::operator=(IpcEvent&& other) noexcept {
  if (this != &other) {
    destroy();
    context_ = std::move(other.context_);
    event_ = std::exchange(other.event_, nullptr);
  }
  return *this;
}

Result<IpcHandle> IpcEvent::handle(const std::string& label) const {
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*context_));
  CUipcEventHandle bytes{};
  REFIT_TRY_CUDA(context_->driver(), ipc_get_event_handle(&bytes, event_),
                 label + ": exporting its event (cuIpcGetEventHandle)");
  IpcHandle handle{};
  std::memcpy(handle.data(), bytes.reserved, handle.size());
  return handle;
}

Result<bool> IpcEvent::passed(const std::string& label) const {
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*context_));
  const CUresult code = context_->driver().event_query(event_);
  if (code == CUDA_SUCCESS || code == CUDA_ERROR_NOT_READY) return code == CUDA_SUCCESS;
  return fail_cuda(context_->driver(), label + ": asking its event (cuEventQuery)", code);
}

void IpcEvent::destroy() noexcept {
  if (event_ == nullptr) return;
  const auto current = Current::enter(*context_);
  if (current) static_cast<void>(context_->driver().event_destroy(event_));
}

}  // namespace refit::cuda
