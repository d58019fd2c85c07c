// Registrar: takes a client's manifest and memory, checks them, maps and populates them.
//
// The loop thread; populating runs on the background pool. Metadata is checked and visible at once,
// the reply follows when the pages are there, so that the first refit after it costs what the
// second does; and when what was registered before is nobody's here any more, so that its client
// may free it: device memory that another process has open must not be freed.
#pragma once

#include <functional>

#include "config/configuration.hpp"
#include "server/background_pool.hpp"
#include "server/decode.hpp"
#include "server/device_access.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"
#include "server/scheduler.hpp"

namespace refit::daemon {

class Registrar {
 public:
  /// `closers`: for fds of unknown kind, whose close a client may be able to block for ever.
  Registrar(Registry& registry, Replies& replies, Scheduler& scheduler, BackgroundPool& background,
            BackgroundPool& closers, CompletionQueue& completions, DeviceAccess& devices,
            const Configuration& configuration)
      : registry_(registry),
        replies_(replies),
        scheduler_(scheduler),
        background_(background),
        closers_(closers),
        completions_(completions),
        devices_(devices),
        configuration_(configuration) {}

  /// Reads tickets that may still wait on the session's socket.
  std::function<void(Session&)> drain_tickets;
  /// The module's registration is about to be replaced or removed; running refits of it must know.
  /// False: not now.
  std::function<bool(Session&, Module&)> release_module;

  void register_module(Session& session, std::uint64_t request_id,
                       const wire::RegisterModule& message);
  void unregister_module(Session& session, std::uint64_t request_id,
                         const wire::UnregisterModule& message);
  /// Closes fds of unknown kind off the loop thread: closing may block (FUSE, a network
  /// filesystem).
  void close_later(std::vector<UniqueFd> fds);
  /// Unmaps what may be gigabytes off the loop thread, if nobody else holds it.
  void drop_later(std::shared_ptr<Registration> registration);

 private:
  void register_asleep(Session& session, std::uint64_t request_id, const RegisterRequest& request);
  struct Mapped {
    std::vector<MappedRegion> regions;
    std::vector<RegionInfo> infos;
  };
  UniqueFd claim_fd(Session& session, std::uint64_t ticket, const std::string& label,
                    std::vector<Error>& problems);
  Result<Mapped> map_regions(Session& session, RegisterRequest& request);
  void drop_fds(RegisterRequest& request);
  [[nodiscard]] Result<void> check_quotas(const Session& session,
                                          const RegisterRequest& request) const;
  static Result<Mapped> map_fds(const Session& session, const RegisterRequest& request,
                                const std::vector<UniqueFd>& fds, std::vector<Error> problems);
  static Result<void> map_fd(int fd, std::uint64_t declared_bytes, Access access,
                             const std::string& label, Mapped& mapped);
  static void add_device_region(const Session& session, const RegionClaim& claim, Mapped& mapped);
  Result<std::shared_ptr<Module>> place(Session& session, const RegisterRequest& request,
                                        std::shared_ptr<Registration> registration,
                                        const std::shared_ptr<void>& answer = nullptr);

  Registry& registry_;
  Replies& replies_;
  Scheduler& scheduler_;
  BackgroundPool& background_;
  BackgroundPool& closers_;
  CompletionQueue& completions_;
  DeviceAccess& devices_;
  const Configuration& configuration_;
  std::uint64_t next_generation_ = 1;
};

}  // namespace refit::daemon
