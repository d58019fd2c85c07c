#include "support/fake_cuda/engine.hpp"

#include <algorithm>
#include <cstring>

#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/kernels.hpp"

namespace fakecuda {
namespace {

template <typename... Functions>
struct Overloaded : Functions... {
  using Functions::operator()...;
};
template <typename... Functions>
Overloaded(Functions...) -> Overloaded<Functions...>;

}  // namespace

void for_each_access(const Work& work,
                     const std::function<void(std::uint64_t, std::uint64_t, bool)>& visit) {
  std::visit(
      Overloaded{[&](const Copy& copy) {
                   for (const Transfer& transfer : copy.transfers) {
                     visit(transfer.to, transfer.bytes, true);
                     if (!transfer.early) visit(transfer.from, transfer.bytes, false);
                   }
                 },
                 [&](const Fill& fill) { visit(fill.to, fill.bytes, true); }, [](const auto&) {}},
      work);
}

std::shared_ptr<Stream> Engine::create(Context* context, unsigned int flags, int priority) {
  prune();
  auto stream = std::make_shared<Stream>();
  stream->context = context;
  stream->flags = flags;
  stream->priority = priority;
  const auto& pattern = driver_.configuration.schedule;
  const std::uint64_t index = created_++;
  const Schedule schedule = pattern[index % pattern.size()];
  stream->eager = schedule == Schedule::eager ||
                  (schedule == Schedule::mixed && driver_.draw("schedule", index).below(2) == 0);
  streams_.push_back(stream);
  return stream;
}

void Engine::prune() {
  std::erase_if(streams_,
                [](const auto& stream) { return stream->destroyed && stream->queue.empty(); });
}

void Engine::enqueue(Stream& stream, Work work) {
  stream.queue.push_back({++enqueued_, std::move(work)});
  if (stream.eager) advance(stream, kAll, /*demand=*/false);
}

void Engine::run_now(Context* context, Work work) {
  Stream passing;
  passing.context = context;
  run(passing, {++enqueued_, std::move(work)});
}

bool Engine::advance(Stream& stream, std::uint64_t number, bool demand) {
  while (!stream.queue.empty() && stream.queue.front().number <= number) {
    if (const auto* wait = std::get_if<WaitFor>(&stream.queue.front().work)) {
      // A copy: what it waits for may lose the device, and with it this queue.
      const WaitFor awaited = *wait;
      if (!may_pass(awaited, demand)) return false;
      if (stream.queue.empty()) return true;
    }
    const Operation operation = std::move(stream.queue.front());
    stream.queue.pop_front();
    run(stream, operation);
  }
  return true;
}

bool Engine::may_pass(const WaitFor& wait, bool demand) {
  Event& event = *wait.event;
  if (event.is_complete(wait.record)) return true;
  const ProcessId recorder = event.recorder(wait.record);
  if (driver_.process.is_self(recorder)) return demand && advance_to(event, wait.record);
  if (!driver_.process.is_alive(recorder)) {
    // Its device went away with it. That the bytes are not what was promised is for the waiter to
    // know; to wait longer helps nobody.
    driver_.process.add(Tally::orphaned_waits);
    event.complete(wait.record);
    return true;
  }
  if (demand && !event.is_demanded(wait.record)) {
    event.demand(wait.record);
    driver_.doorbell.ring();
  }
  return false;
}

bool Engine::advance_to(const Event& event, std::uint64_t record) {
  for (const auto& stream : streams_) {
    for (const Operation& operation : stream->queue) {
      const auto* complete = std::get_if<Complete>(&operation.work);
      if (complete == nullptr || complete->record != record || !complete->event->is_same(event))
        continue;
      const auto held = stream;
      return advance(*held, operation.number, /*demand=*/true);
    }
  }
  return event.is_complete(record);
}

template <typename Try>
void Engine::until(Try&& attempt) {
  for (;;) {
    const std::uint32_t observed = driver_.doorbell.observe();
    if (attempt() || driver_.sticky != CUDA_SUCCESS || driver_.stopping) return;
    driver_.wait(observed, /*may_die=*/true);
  }
}

void Engine::finish(const std::shared_ptr<Stream>& stream) {
  const std::uint64_t last = enqueued_;
  until([&] { return advance(*stream, last, /*demand=*/true); });
}

void Engine::finish(const std::shared_ptr<Event>& event, std::uint64_t record) {
  until([&] { return may_pass({event, record}, /*demand=*/true); });
}

void Engine::finish_all(Context* context, bool blocking_only) {
  std::vector<std::shared_ptr<Stream>> concerned;
  for (const auto& stream : streams_) {
    const bool blocking = (stream->flags & CU_STREAM_NON_BLOCKING) == 0;
    if (stream->context == context && (blocking || !blocking_only)) concerned.push_back(stream);
  }
  shuffled(concerned.size(), draw("streams", enqueued_),
           [&](std::uint64_t i) { finish(concerned[i]); });
  prune();
}

Draw Engine::draw(std::string_view purpose, std::uint64_t number) const {
  return driver_.draw(purpose, number - numbered_from_);
}

unsigned int Engine::stubborn_queries(std::uint64_t number) const {
  return 1 + static_cast<unsigned int>(draw("queries", number).below(3));
}

bool Engine::query(const std::shared_ptr<Stream>& stream) {
  const std::uint64_t last = enqueued_;
  bool done = stream->queue.empty();
  if (!done && ++stream->queries > stubborn_queries(stream->queue.front().number))
    done = advance(*stream, last, /*demand=*/true);
  if (done) stream->queries = 0;
  return done;
}

bool Engine::query(const std::shared_ptr<Event>& event) {
  const std::uint64_t record = event->latest();
  bool done = record == 0 || event->is_complete(record);
  if (!done && ++event->queries > stubborn_queries(numbered_from_ + record))
    done = may_pass({event, record}, /*demand=*/true);
  if (done) event->queries = 0;
  return done;
}

bool Engine::serve_others() {
  std::vector<std::pair<std::shared_ptr<Stream>, std::uint64_t>> demanded;
  for (const auto& stream : streams_) {
    for (const Operation& operation : stream->queue) {
      const auto* complete = std::get_if<Complete>(&operation.work);
      if (complete != nullptr && complete->event->is_demanded(complete->record))
        demanded.emplace_back(stream, operation.number);
    }
  }
  bool done = true;
  for (const auto& [stream, number] : demanded)
    done = advance(*stream, number, /*demand=*/true) && done;
  return done;
}

bool Engine::is_pending(std::uint64_t base, std::uint64_t bytes) const {
  bool found = false;
  for (const auto& stream : streams_) {
    for (const Operation& operation : stream->queue) {
      for_each_access(operation.work, [&](std::uint64_t address, std::uint64_t size, bool) {
        found = found || (address < base + bytes && base < address + size);
      });
    }
  }
  return found;
}

std::size_t Engine::pending() const {
  std::size_t sum = 0;
  for (const auto& stream : streams_) sum += stream->queue.size();
  return sum;
}

void Engine::drop_everything() {
  for (const auto& stream : streams_) {
    for (const Operation& operation : stream->queue) {
      if (const auto* complete = std::get_if<Complete>(&operation.work))
        complete->event->complete(complete->record);
      if (const auto* free = std::get_if<PoolFree>(&operation.work))
        driver_.release_range(free->base);
    }
    stream->queue.clear();
  }
  driver_.doorbell.ring();
}

void Engine::run(Stream& stream, const Operation& operation) {
  driver_.process.add(Tally::operations);
  ++driver_.last_access;
  std::visit(
      Overloaded{[&](const Copy& copy) { run_copy(stream, operation.number, copy); },
                 [&](const Fill& fill) { run_fill(stream, fill); },
                 [&](const std::shared_ptr<const Launch>& launch) { run_launch(stream, *launch); },
                 [&](const PoolFree& free) { driver_.release_range(free.base); },
                 [](const WaitFor&) {},
                 [&](const Complete& complete) {
                   complete.event->complete(complete.record);
                   if (complete.event->is_shared()) driver_.doorbell.ring();
                 }},
      operation.work);
}

void Engine::run_copy(const Stream& stream, std::uint64_t number, const Copy& copy) {
  constexpr std::uint64_t kChunk = 4096;
  const int device = stream.context->device;
  shuffled(copy.transfers.size(), draw("copies", number), [&](std::uint64_t i) {
    const Transfer& transfer = copy.transfers[i];
    std::byte* to = driver_.touch(transfer.to, transfer.bytes, /*write=*/true, device);
    if (to == nullptr) return;
    const std::byte* from = transfer.early != nullptr ? transfer.early->data()
                                                      : driver_.touch(transfer.from, transfer.bytes,
                                                                      /*write=*/false, device);
    if (from == nullptr) return;
    // No part of a copy is before another: a reader that does not wait sees any mix.
    const std::uint64_t chunks = (transfer.bytes + kChunk - 1) / kChunk;
    shuffled(chunks, draw("chunks", number + i), [&](std::uint64_t chunk) {
      const std::uint64_t offset = chunk * kChunk;
      std::memmove(to + offset, from + offset, std::min(kChunk, transfer.bytes - offset));
    });
  });
}

void Engine::run_fill(const Stream& stream, const Fill& fill) {
  std::byte* to = driver_.touch(fill.to, fill.bytes, /*write=*/true, stream.context->device);
  if (to != nullptr) std::memset(to, fill.value, fill.bytes);
}

void Engine::run_launch(const Stream& stream, const Launch& launch) { launch.run(*stream.context); }

}  // namespace fakecuda
