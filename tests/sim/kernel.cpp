#include "kernel.hpp"

#include <sys/eventfd.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace refit::sim {
namespace {

constexpr std::size_t kStackBytes = std::size_t{512} << 10;
constexpr microseconds kTurnTakes{1};

Kernel* current = nullptr;

}  // namespace

struct Kernel::Fiber {
  std::shared_ptr<Process> process;
  std::function<void()> body;
  std::function<bool()> ready;  ///< empty: may run
  Time until = kNever;
  bool ended = false;
  std::unique_ptr<std::byte[]> stack;
  ucontext_t context{};
  ucontext_t back{};
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack = nullptr;
  void* fake_stack_back = nullptr;
  const void* stack_back = nullptr;
  std::size_t stack_back_bytes = 0;
#endif
};

bool Process::socket_closed() const noexcept { return now() >= socket_closes; }
bool Process::dead() const noexcept { return now() >= dies; }

Kernel::Kernel(std::uint64_t seed, bool trace) : chance(seed), trace_(trace) { current = this; }

Kernel::~Kernel() {
  stop();
  current = nullptr;
}

void Kernel::stop() {
  for (const auto& process : processes_) process->dying = true;
  for (std::size_t i = 0; i < fibers_.size(); ++i) {
    while (!fibers_[i]->ended) resume(*fibers_[i]);
  }
  fibers_.clear();
}

bool Kernel::has_fibers(const Process& process) const noexcept {
  return std::any_of(fibers_.begin(), fibers_.end(),
                     [&](const auto& fiber) { return fiber->process.get() == &process; });
}

std::shared_ptr<Process> Kernel::start(std::string name) {
  auto process = std::make_shared<Process>();
  process->name = std::move(name);
  process->pidfd = UniqueFd::adopt(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  processes_.push_back(process);
  return process;
}

void Kernel::spawn(const std::shared_ptr<Process>& process, std::function<void()> body) {
  auto fiber = std::make_unique<Fiber>();
  fiber->process = process;
  fiber->body = std::move(body);
  if (stacks_.empty()) {
    fiber->stack.reset(new std::byte[kStackBytes]);
  } else {
    fiber->stack = std::move(stacks_.back());
    stacks_.pop_back();
  }
  ::getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(fiber.get());
  ::makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Kernel::enter), 2,
                static_cast<unsigned>(address), static_cast<unsigned>(address >> 32));
  fibers_.push_back(std::move(fiber));
}

void Kernel::enter(unsigned low, unsigned high) {
  auto& fiber =
      *reinterpret_cast<Fiber*>(std::uintptr_t{low} | static_cast<std::uintptr_t>(high) << 32);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &fiber.stack_back, &fiber.stack_back_bytes);
#endif
  if (!fiber.process->dying) fiber.body();
  fiber.body = nullptr;
  fiber.ended = true;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(nullptr, fiber.stack_back, fiber.stack_back_bytes);
#endif
  ::setcontext(&fiber.back);
}

void Kernel::resume(Fiber& fiber) {
  running_ = &fiber;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fiber.fake_stack_back, fiber.stack.get(), kStackBytes);
#endif
  ::swapcontext(&fiber.back, &fiber.context);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack_back, nullptr, nullptr);
#endif
  running_ = nullptr;
}

void Kernel::suspend() noexcept {
  Fiber& fiber = *running_;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&fiber.fake_stack, fiber.stack_back, fiber.stack_back_bytes);
#endif
  ::swapcontext(&fiber.context, &fiber.back);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &fiber.stack_back, &fiber.stack_back_bytes);
#endif
}

const std::shared_ptr<Process>& Kernel::self() const { return running_->process; }

bool Kernel::dying() const noexcept {
  return mute || (running_ != nullptr && running_->process->dying);
}

void Kernel::kill(const std::shared_ptr<Process>& process) {
  if (process->dying) return;
  note("kill " + process->name);
  process->dying = true;
  process->frozen_until = {};
  process->socket_closes = now_ + chance.us(0, 20);
  process->dies = process->socket_closes + chance.us(0, 20);
  const std::uint64_t one = 1;
  [[maybe_unused]] const auto written = ::write(process->pidfd.get(), &one, sizeof one);
}

void Kernel::freeze(const std::shared_ptr<Process>& process, microseconds how_long) {
  note("freeze " + process->name);
  process->frozen_until = now_ + how_long;
}

void Kernel::violate(const std::string& what) noexcept {
  if (!violation_.empty()) return;
  violation_ = what;
  note("VIOLATION: " + what);
}

void Kernel::note(std::string_view text) {
  for (const char c : text) mix(static_cast<unsigned char>(c));
  mix(static_cast<std::uint64_t>(now_.time_since_epoch().count()));
  if (trace_) tell(text);
}

void Kernel::tell(std::string_view text) const {
  const auto us = std::chrono::duration_cast<microseconds>(now_ - Time{seconds(1)}).count();
  std::printf("%9" PRId64 " us  %-10s %.*s\n", static_cast<std::int64_t>(us),
              running_ == nullptr ? "" : running_->process->name.c_str(),
              static_cast<int>(text.size()), text.data());
}

void Kernel::turn() noexcept {
  if (running_ == nullptr || looking_ || mute || running_->process->dying) return;
  ++turns_;
  now_ += kTurnTakes;
  looking_ = true;
  if (on_turn) on_turn();
  looking_ = false;
  if (chance.one_in(3) || !violation_.empty()) suspend();
}

void Kernel::give_way() noexcept {
  if (running_ == nullptr || looking_ || mute || running_->process->dying) return;
  ++turns_;
  now_ += kTurnTakes;
  suspend();
}

bool Kernel::wait(const std::function<bool()>& ready, Time until) {
  while (!running_->process->dying) {
    if (ready()) return true;
    if (now_ >= until) return false;
    running_->ready = ready;
    running_->until = until;
    suspend();
    running_->ready = nullptr;
    running_->until = kNever;
  }
  return false;
}

bool Kernel::run(const std::function<bool()>& done, std::uint64_t turns_max) {
  turns_max_ = turns_ + turns_max;
  std::vector<Fiber*> runnable;
  for (;;) {
    looking_ = true;
    if (on_turn) on_turn();
    const Time wanted = between_turns ? between_turns() : kNever;
    const bool is_done = done();
    looking_ = false;
    if (!violation_.empty()) throw Violation(violation_);
    if (is_done) return true;
    if (turns_ > turns_max_) return false;
    // A dying process's fibers end before anybody else moves.
    for (std::size_t i = 0; i < fibers_.size(); ++i) {
      while (fibers_[i]->process->dying && !fibers_[i]->ended) resume(*fibers_[i]);
    }
    std::erase_if(fibers_, [this](auto& fiber) {
      if (fiber->ended) stacks_.push_back(std::move(fiber->stack));
      return fiber->ended;
    });
    runnable.clear();
    Time next = wanted;
    for (const auto& fiber : fibers_) {
      const Time thaws = fiber->process->frozen_until;
      if (thaws > now_) {
        next = std::min(next, thaws);
      } else if (!fiber->ready || now_ >= fiber->until || fiber->ready()) {
        runnable.push_back(fiber.get());
      } else {
        next = std::min(next, fiber->until);
      }
    }
    if (runnable.empty()) {
      // Deaths are news too.
      for (const auto& process : processes_) {
        for (const Time event : {process->socket_closes, process->dies}) {
          if (event > now_) next = std::min(next, event);
        }
      }
      if (next == kNever) return false;
      now_ = next;
      ++turns_;
      continue;
    }
    const std::size_t pick = chance.below(runnable.size());
    mix(pick);
    ++switches_;
    resume(*runnable[pick]);
  }
}

Kernel& kernel() noexcept { return *current; }
void turn() noexcept {
  if (current != nullptr) current->turn();
}
void give_way() noexcept {
  if (current != nullptr) current->give_way();
}
bool dying() noexcept { return current != nullptr && current->dying(); }
Time now() noexcept { return current == nullptr ? Time{} : current->now(); }
bool planted(std::string_view bug) noexcept { return current != nullptr && current->bug == bug; }

}  // namespace refit::sim
