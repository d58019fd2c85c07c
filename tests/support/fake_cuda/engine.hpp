// Engine: streams, and when their work runs.
//
// Work waits in its stream until somebody needs it: a call of this process that synchronises, or a
// waiter in another process that set `demanded` in an event's page. A stream whose schedule is
// eager runs its work at once as far as its events allow. No clock decides anything, so a missing
// wait reads old bytes in a lazy schedule every time. Work runs on the thread that needs it, under
// the driver's lock; for other processes that is the driver's worker thread.
#pragma once

#include <cuda.h>

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string_view>
#include <variant>
#include <vector>

#include "support/fake_cuda/draw.hpp"
#include "support/fake_cuda/event.hpp"

namespace fakecuda {

struct Driver;

/// One piece of a copy.
struct Transfer {
  std::uint64_t to = 0;
  std::uint64_t from = 0;
  std::uint64_t bytes = 0;
  /// Bytes that were read when the call was made; `from` is not read again.
  std::shared_ptr<const std::vector<std::byte>> early;
};

/// Pieces in no order.
struct Copy {
  std::vector<Transfer> transfers;
};
struct Fill {
  std::uint64_t to;
  std::uint64_t bytes;
  unsigned char value;
};
struct Launch;  // kernels.hpp
struct PoolFree {
  std::uint64_t base;
};
struct WaitFor {
  std::shared_ptr<Event> event;
  std::uint64_t record;
};
struct Complete {
  std::shared_ptr<Event> event;
  std::uint64_t record;
};
using Work = std::variant<Copy, Fill, std::shared_ptr<const Launch>, PoolFree, WaitFor, Complete>;

struct Operation {
  std::uint64_t number;  ///< counts all operations of the process
  Work work;
};

struct Stream {
  Context* context = nullptr;
  unsigned int flags = 0;
  int priority = 0;
  bool eager = false;
  std::deque<Operation> queue;
  unsigned int queries = 0;  ///< that were answered with "not ready" in a row
  bool destroyed = false;    ///< goes away when its work is done
};

class Engine {
 public:
  explicit Engine(Driver& driver) : driver_(driver) {}

  std::shared_ptr<Stream> create(Context* context, unsigned int flags, int priority);
  void enqueue(Stream& stream, Work work);
  /// What a call that blocks by itself does on the device of this context.
  void run_now(Context* context, Work work);

  /// Blocks until everything that is in the stream now has run. The lock is released meanwhile.
  void finish(const std::shared_ptr<Stream>& stream);
  void finish(const std::shared_ptr<Event>& event, std::uint64_t record);
  /// All streams of a context, in a drawn order.
  void finish_all(Context* context, bool blocking_only);

  /// Whether it is done. The first few times a pending one stays so; then somebody has to be what
  /// makes it run, or a client that polls would poll forever.
  bool query(const std::shared_ptr<Stream>& stream);
  bool query(const std::shared_ptr<Event>& event);

  /// Runs what other processes demand. False if something of a third one has to come first. Called
  /// by the worker.
  bool serve_others();

  /// Whether work that has not run would touch these bytes.
  [[nodiscard]] bool is_pending(std::uint64_t base, std::uint64_t bytes) const;
  [[nodiscard]] std::size_t pending() const;
  /// Forgets all work: the device is lost, or the process ends. Who waits for it goes on.
  void drop_everything();
  /// Draws from now on are those of a fresh process.
  void restart_numbering() {
    created_ = 0;
    numbered_from_ = enqueued_;
  }

 private:
  static constexpr std::uint64_t kAll = ~std::uint64_t{0};

  /// Runs the stream up to the operation with this number. False if something of another process
  /// has to come first. With `demand` whatever it waits for is made to run, too.
  bool advance(Stream& stream, std::uint64_t number, bool demand);
  bool advance_to(const Event& event, std::uint64_t record);
  bool may_pass(const WaitFor& wait, bool demand);
  void run(Stream& stream, const Operation& operation);
  void run_copy(const Stream& stream, std::uint64_t number, const Copy& copy);
  void run_fill(const Stream& stream, const Fill& fill);
  void run_launch(const Stream& stream, const Launch& launch);
  void prune();
  template <typename Try>
  void until(Try&& attempt);
  [[nodiscard]] Draw draw(std::string_view purpose, std::uint64_t number) const;
  [[nodiscard]] unsigned int stubborn_queries(std::uint64_t number) const;

  Driver& driver_;
  /// Also destroyed ones that still have work.
  std::vector<std::shared_ptr<Stream>> streams_;
  std::uint64_t created_ = 0;
  std::uint64_t enqueued_ = 0;
  std::uint64_t numbered_from_ = 0;
};

/// Calls visit(address, bytes, write) for everything that the work touches.
void for_each_access(const Work& work,
                     const std::function<void(std::uint64_t, std::uint64_t, bool)>& visit);

}  // namespace fakecuda
