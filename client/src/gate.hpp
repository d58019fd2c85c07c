// The engine's side of the gate: when it holds still, when it may go on, what it knows when the
// daemon dies.
//
// One thread at a time, but step_allowed() and the state readers, which any thread may call. Never
// blocks; Engine and Trainer do the waiting. See ipc/state_word.hpp for the words.
#pragma once

#include <atomic>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "held_state.hpp"
#include "ipc/state_word.hpp"
#include "refit/engine.hpp"
#include "regions.hpp"

namespace refit {

class Gate {
 public:
  Gate() = default;
  ~Gate();
  Gate(const Gate&) = delete;
  Gate& operator=(const Gate&) = delete;

  /// Starts over with a new session: no epoch has been answered, every module must be registered
  /// again.
  void attach(Regions* session);
  /// The session is over and its daemon cannot write any more: keeps what the state words said
  /// last.
  void detach();
  [[nodiscard]] bool attached() const noexcept { return session_ != nullptr; }

  /// The number of the first of as many residency words as `spec` has layer buffers, none of which
  /// a registered module uses. Errors: Errc::quota.
  [[nodiscard]] Result<std::uint32_t> free_words(const ModuleSpec& spec) const;

  /// A module was registered under `index` of the state words, and its layers say where they are in
  /// the residency words from `words` on.
  void put(ModuleSpec spec, std::uint32_t index, std::uint32_t words = 0);
  /// The same of a module that is known and sleeps.
  void put_asleep(const std::string& module, std::uint32_t index);
  void remove(const std::string& module);
  /// A registration of `spec` ended without an answer: the daemon may have done it, and refits may
  /// reach the module.
  void put_in_doubt(ModuleSpec spec, std::uint32_t words = 0);
  /// What this side knows of a module's bytes, for registering it again. Fresh if it is not known.
  [[nodiscard]] HeldState held(const std::string& module) const;
  [[nodiscard]] std::vector<ModuleSpec> specs() const;

  /// The engine gave its memory up: lets go of every module's, keeps what is known of its bytes.
  void fall_asleep();
  void wake() noexcept { asleep_.store(false); }
  [[nodiscard]] bool asleep() const noexcept { return asleep_.load(); }

  enum class Progress { idle, holding, released };

  /// One step: answers `prepare` with ready, notices the release. Released means an event may wait
  /// in take_event().
  Progress pump();
  /// True if pump() has something to do. One load.
  [[nodiscard]] bool due() const noexcept;
  /// The epoch that the daemon asks for and that was not answered yet, or 0.
  [[nodiscard]] std::uint64_t asked_epoch() const noexcept;
  [[nodiscard]] bool holding() const noexcept { return holding_.load(); }
  /// The daemon said that what follows takes long: block, do not spin.
  [[nodiscard]] bool long_copy() const noexcept;

  /// Steps back from the gate. False if bytes are being written: then only the daemon's word or its
  /// death opens it.
  /// What was committed before stands in take_event().
  bool withdraw();
  /// Answers a question of the daemon with no, so that its trainer need not wait for the deadline.
  void refuse(std::uint64_t epoch) noexcept;

  /// Once the daemon is dead: waits for what devices still do for it and leaves the gate; what it
  /// had committed stands in take_event().
  void leave();

  std::optional<GateEvent> take_event();

  // Any thread.
  [[nodiscard]] bool step_allowed() const;
  [[nodiscard]] ModuleState state(const std::string& module) const;
  [[nodiscard]] std::uint64_t version(const std::string& module) const;

 private:
  static constexpr std::uint32_t kNoIndex = kModulesMax;
  static constexpr std::uint32_t kInDoubt = kModulesMax + 1;

  struct Slot {
    ModuleSpec spec;
    std::uint32_t index = kNoIndex;
    std::uint32_t words = 0;  ///< number of its first residency word
    HeldState held;           ///< what is known of the bytes when no daemon vouches for them
  };

  [[nodiscard]] const ModuleBlock* block(const Slot& slot) const noexcept;
  [[nodiscard]] const ModuleBlock* block_of(const std::string& module) const noexcept;
  [[nodiscard]] ModuleState state_of(const Slot& slot) const noexcept;
  [[nodiscard]] HeldState held_of(const Slot& slot) const noexcept;
  [[nodiscard]] const Slot* find(const std::string& module) const noexcept;
  /// Layers hold still exactly while the engine does.
  void hold_still();
  void go_on();
  /// No module's layers speak any more: the session's words are not there, or mean nothing.
  void fall_silent() noexcept;
  [[nodiscard]] SharedWord<std::uint64_t>* words_at(std::uint32_t number) const noexcept;
  /// Leaves the gate and collects what was committed under the answered epoch.
  void release();
  [[nodiscard]] bool any_word_is_writing() const noexcept;

  /// Guards session_ and slots_ against the readers of other threads; the engine's own thread alone
  /// changes them.
  mutable std::mutex mutex_;
  Regions* session_ = nullptr;
  std::vector<Slot> slots_;
  std::uint64_t answered_epoch_ = 0;
  std::uint32_t words_floor_ = 0;  ///< residency words below may be those of a module in doubt
  std::uint8_t answered_flags_ = 0;
  std::atomic<bool> holding_{false};
  std::atomic<bool> asleep_{false};
  std::optional<GateEvent> event_;
};

}  // namespace refit
