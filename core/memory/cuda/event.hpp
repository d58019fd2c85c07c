// An interprocess event: one process's stream records it, another one's waits for it.
//
// Any thread. Whoever created it destroys it last: using an opened one after that is undefined.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "memory/cuda/device.hpp"
#include "memory/exported.hpp"

namespace refit::cuda {

class IpcEvent {
 public:
  /// A new one, without timing. Errors: Errc::unsupported where the device has none; Errc::cuda.
  /// `label` names it in errors.
  [[nodiscard]] static Result<IpcEvent> create(std::shared_ptr<const Context> context,
                                               const std::string& label);
  /// Another process's. It may be recorded anew at any time; a wait is for its last record before
  /// that. Errors: Errc::bad_argument for bytes that are no handle of a living event of another
  /// process; Errc::cuda.
  [[nodiscard]] static Result<IpcEvent> open(std::shared_ptr<const Context> context,
                                             const IpcHandle& handle, const std::string& label);
  IpcEvent(IpcEvent&& other) noexcept
      : context_(std::move(other.context_)), event_(std::exchange(other.event_, nullptr)) {}
  IpcEvent& operator=(IpcEvent&& other) noexcept;
  ~IpcEvent() { destroy(); }

  [[nodiscard]] CUevent get() const noexcept { return event_; }
  /// Whether all that was recorded before the call is done. Asks and does not wait. Errors:
  /// Errc::cuda, with `label`.
  [[nodiscard]] Result<bool> passed(const std::string& label) const;
  /// What another process opens it by; only of a created one. Errors: Errc::cuda.
  [[nodiscard]] Result<IpcHandle> handle(const std::string& label) const;

 private:
  IpcEvent(std::shared_ptr<const Context> context, CUevent event) noexcept
      : context_(std::move(context)), event_(event) {}
  void destroy() noexcept;

  std::shared_ptr<const Context> context_;
  CUevent event_ = nullptr;
};

}  // namespace refit::cuda
