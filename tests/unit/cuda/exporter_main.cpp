// The other process of these tests; exporter.hpp is its other end.
//
//   serve   does what it is told on fd 3 until that closes
//   state   writes what the driver table found to fd 3, with the library that the environment
//           leads to; `state again` after it has looked once before

#include <optional>

#include "memory/cuda/event.hpp"
#include "memory/cuda/export.hpp"
#include "unit/cuda/exporter.hpp"

namespace refit::cuda::test {
namespace {

class Served {
 public:
  Answer act(const Order& order, std::vector<UniqueFd>& fds) {
    Answer answer;
    const Result<void> done = run(order, answer, fds);
    answer.code = done ? Errc::ok : done.error().code;
    if (!done)
      std::snprintf(answer.message, sizeof answer.message, "%s", done.error().message.c_str());
    return answer;
  }

 private:
  Result<void> run(const Order& order, Answer& answer, std::vector<UniqueFd>& fds) {
    if (devices_ == nullptr) {
      REFIT_TRY_ASSIGN(devices_, VisibleDevices::open());
    }
    const Device& device = devices_->all().at(static_cast<std::size_t>(order.device));
    switch (order.act) {
      case Act::make:
        memory_.emplace(order.kind, order.bytes, order.segments, order.device);
        return {};
      case Act::free:
        memory_.reset();
        return {};
      case Act::export_range: {
        REFIT_TRY_ASSIGN(Exported exported,
                         export_memory(*devices_, memory_->address() + order.offset, order.bytes,
                                       "made memory"));
        tell(exported, answer, fds);
        return {};
      }
      case Act::read: {
        unsigned char byte = 0;
        REFIT_TRY_ASSIGN(const auto context, devices_->context(device));
        REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
        must(cuda().cuMemcpyDtoH(&byte, memory_->address() + order.offset, 1));
        answer.value = byte;
        return {};
      }
      case Act::make_event: {
        REFIT_TRY_ASSIGN(const auto context, devices_->context(device));
        REFIT_TRY_ASSIGN(IpcEvent event, IpcEvent::create(context, "fence"));
        event_.emplace(std::move(event));
        REFIT_TRY_ASSIGN(answer.event, event_->handle("fence"));
        return {};
      }
      case Act::fill_and_record: {
        REFIT_TRY_ASSIGN(const auto context, devices_->context(device));
        REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
        CUstream stream = nullptr;
        must(cuda().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        must(cuda().cuMemsetD8Async(memory_->address(), static_cast<unsigned char>(order.offset),
                                    memory_->bytes(), stream));
        must(cuda().cuEventRecord(event_->get(), stream));
        must(cuda().cuStreamDestroy(stream));
        return {};
      }
      case Act::destroy_event:
        event_.reset();
        return {};
      case Act::retain: {
        REFIT_TRY_ASSIGN(held_, devices_->context(device));
        return {};
      }
    }
    return fail(Errc::bad_argument, "no such order");
  }

  static void tell(Exported& exported, Answer& answer, std::vector<UniqueFd>& fds) {
    answer.device = exported.device;
    answer.kind = exported.kind;
    answer.bytes = exported.bytes;
    answer.offset = exported.offset;
    for (DevicePiece& piece : exported.pieces) {
      auto& told = answer.piece[answer.pieces++];
      told.handle = piece.handle;
      told.bytes = piece.bytes;
      told.allocation_id = piece.allocation_id;
      if (piece.fd) fds.push_back(std::move(piece.fd));
    }
  }

  std::shared_ptr<VisibleDevices> devices_;
  std::shared_ptr<const Context> held_;
  std::optional<MadeMemory> memory_;
  std::optional<IpcEvent> event_;
};

int serve() {
  Served served;
  Order order;
  std::vector<UniqueFd> none;
  while (receive_packet(3, order, none)) {
    std::vector<UniqueFd> fds;
    const Answer answer = served.act(order, fds);
    std::vector<int> numbers;
    numbers.reserve(fds.size());
    for (const UniqueFd& fd : fds) numbers.push_back(fd.get());
    if (!send_packet(3, answer, numbers)) break;
  }
  return 0;
}

int state() {
  const DriverState found = Driver::state();
  const Result<const Driver*> driver = Driver::get();
  ::dprintf(3, "%d %d %d %d %s", static_cast<int>(found),
            driver ? 0 : static_cast<int>(driver.error().code),
            driver && (*driver)->memcpy_batch_12080 != nullptr ? 1 : 0,
            driver && (*driver)->memcpy_batch_13000 != nullptr ? 1 : 0,
            driver ? "" : driver.error().message.c_str());
  return 0;
}

}  // namespace
}  // namespace refit::cuda::test

int main(int argc, char** argv) {
  using namespace refit::cuda::test;
  const std::string word = argc > 1 ? argv[1] : "";
  if (word == "state again") static_cast<void>(refit::cuda::Driver::state());
  if (word == "state" || word == "state again") return state();
  cuda();  // the driver that the code under test finds then is this one
  return serve();
}
