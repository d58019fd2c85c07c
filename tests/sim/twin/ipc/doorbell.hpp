// The simulation's doorbell: a flag that both ends hold.
//
// Found before core/ipc/doorbell.hpp by the simulation's build alone.
#pragma once

#include <memory>

#include "kernel.hpp"
#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit {

class Doorbell {
 public:
  static Result<Doorbell> create() {
    Doorbell doorbell;
    doorbell.rung_ = std::make_shared<bool>(false);
    return doorbell;
  }
  /// The same bell for its other end.
  [[nodiscard]] Doorbell other_end() const {
    Doorbell doorbell;
    doorbell.rung_ = rung_;
    return doorbell;
  }
  [[nodiscard]] bool rung() const noexcept { return *rung_; }

  // What Session::open asks for, which the simulation never calls.
  static Result<Doorbell> create_for_peer(UniqueFd&) { return create(); }

  void ring() const noexcept {
    sim::turn();
    if (!sim::dying()) *rung_ = true;
  }
  void drain() const noexcept { *rung_ = false; }
  [[nodiscard]] int fd() const noexcept { return -1; }

 private:
  std::shared_ptr<bool> rung_;
};

}  // namespace refit
