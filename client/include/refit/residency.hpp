// Where the device places of a module's offloaded layers are: the engine's offload manager says it
// here, a refit writes there.
//
// An offloaded tensor has its bytes on the host and, while its layer is resident, a second time on
// the device, at an address that changes with every prefetch. A refit writes both places, so it
// must know the second. Threads: any; a Move belongs to the thread that began it.
#pragma once

#include <cstdint>
#include <memory>

#include "refit/api.hpp"
#include "refit/memory.hpp"
#include "refit/result.hpp"

namespace refit {

class REFIT_API Residency {
  class REFIT_LOCAL State;

 public:
  Residency();
  ~Residency();
  Residency(const Residency&) = delete;
  Residency& operator=(const Residency&) = delete;

  /// A change under way: no refit is let through while one lives, and none begins while a refit is.
  class REFIT_API Move {
   public:
    Move(Move&& other) noexcept = default;
    Move& operator=(Move&&) = delete;
    ~Move();

    /// Layer buffer `buffer` is on the host alone from now on. Call it before anything else is put
    /// where it was.
    void absent(std::uint32_t buffer);
    /// All bytes of layer buffer `buffer` are at `address` now, in a pool of the module, at a
    /// multiple of 32. Call it when they are there. Errors: Errc::bad_region.
    [[nodiscard]] Result<void> resident(std::uint32_t buffer, const void* address);

   private:
    friend class Residency;
    explicit Move(std::shared_ptr<State> state);
    std::shared_ptr<State> state_;
  };

  /// Begins a change; waits while a refit is let through, which needs layers that hold still. Copy
  /// a layer within: between its copy and its Move's end no byte of it is replaced. Never call
  /// Engine's functions, and never wait for the thread that does, while a Move lives: the gate
  /// waits for its end.
  [[nodiscard]] Move move();

 private:
  friend class Gate;
  friend class ModuleSpec;
  std::shared_ptr<State> state_;
};

}  // namespace refit
