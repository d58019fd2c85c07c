// A client of the simulation: connects, posts to the product's ring, waits for the reply.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gate.hpp"
#include "ipc/ring.hpp"
#include "ipc/wire.hpp"
#include "link.hpp"
#include "model.hpp"

namespace refit::sim {

class World;

class Client {
 public:
  Client(World& world, Role role, std::string name);
  ~Client() { disconnect(); }

  /// False: no daemon, or none that takes it, within `patience`.
  bool connect(microseconds patience);
  void disconnect();
  [[nodiscard]] bool connected() const noexcept { return link != nullptr; }

  /// Publishes a request; 0 if the ring is full.
  std::uint64_t post(wire::Opcode opcode);
  struct Answer {
    Errc code = Errc::ok;  ///< deadline and daemon_gone are this side's own
    bool replied = false;
    const wire::Reply* reply = nullptr;  ///< valid until the next call
  };
  Answer await(std::uint64_t request, Time deadline);
  /// The slot of the state words, or why there is none.
  tl::expected<std::uint32_t, Errc> register_module(const Shape& shape,
                                                    const std::vector<TensorSpec>& tensors,
                                                    const Memory& memory, const HeldState& held,
                                                    Time deadline);

  World& world;
  const Role role;
  const std::string name;
  std::shared_ptr<Process> process;
  std::shared_ptr<Link> link;
  Regions regions;
  flatbuffers::FlatBufferBuilder builder;

 private:
  bool take(std::uint64_t request, Answer& answer);

  std::unique_ptr<RingProducer> requests_;
  std::unique_ptr<RingConsumer> replies_;
  std::vector<std::byte> reply_;
  std::uint64_t next_request_ = 1;
  std::uint64_t next_ticket_ = 1;
};

}  // namespace refit::sim
