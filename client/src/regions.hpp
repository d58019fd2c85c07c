// The two regions of a session as its client sees them, and the bell of a daemon that sleeps: all
// that the gate knows of a session.
//
// Owns the bell; the regions stay mapped as long as whoever filled this in lives.
#pragma once

#include "ipc/doorbell.hpp"
#include "ipc/shared_layout.hpp"

namespace refit {

/// While it lives, the daemon need not ring: this side reads by itself. Whoever blocks afterwards
/// looks once more first.
class Awake {
 public:
  explicit Awake(RequestRegion& region) noexcept : region_(region) {
    region_.client_awake.store(1);  // pairs with the load in the daemon's Session::wake_client
  }
  ~Awake() { region_.client_awake.store(0); }
  Awake(const Awake&) = delete;
  Awake& operator=(const Awake&) = delete;

 private:
  RequestRegion& region_;
};

class Regions {
 public:
  Regions() = default;
  Regions(RequestRegion& request, const ResponseRegion& response, Doorbell daemon_doorbell) noexcept
      : request_(&request), response_(&response), daemon_doorbell_(std::move(daemon_doorbell)) {}

  [[nodiscard]] RequestRegion& request_region() noexcept { return *request_; }
  [[nodiscard]] const ResponseRegion& response_region() const noexcept { return *response_; }
  void ring_daemon() const noexcept {
    if (response_->daemon_awake.load() == 0) daemon_doorbell_.ring();
  }

 protected:
  RequestRegion* request_ = nullptr;
  const ResponseRegion* response_ = nullptr;
  Doorbell daemon_doorbell_;
};

}  // namespace refit
