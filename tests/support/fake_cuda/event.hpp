// Event: the words of an EventPage, in the heap or in a file that other processes map.
//
// Used under the driver's lock; the page itself is also written by other processes at any time.
#pragma once

#include <memory>
#include <string>

#include "support/fake_cuda/process.hpp"
#include "support/fake_cuda/shared_file.hpp"

namespace fakecuda {

struct Context;

class Event {
 public:
  static std::shared_ptr<Event> create(Context* context, unsigned int flags, ProcessId creator);
  /// Interprocess: its page is the file FAKECUDA_DIR/e-<number>.
  static std::shared_ptr<Event> create_shared(Context* context, unsigned int flags,
                                              ProcessId creator, std::uint64_t nonce,
                                              const std::string& path);
  static std::shared_ptr<Event> import(Context* context, SharedFile file);

  Context* context;
  unsigned int flags;
  std::uint64_t number = 0;  ///< of the file
  bool imported = false;
  unsigned int queries = 0;  ///< that were answered with "not ready" in a row

  [[nodiscard]] EventPage& page() const { return *page_; }
  [[nodiscard]] bool is_shared() const { return file_.fd() >= 0; }
  /// One event may be imported several times.
  [[nodiscard]] bool is_same(const Event& other) const {
    return page_ == other.page_ || (is_shared() && page_->nonce == other.page_->nonce);
  }

  /// The number of a new record, which is pending from now on.
  std::uint64_t begin_record(ProcessId recorder);
  void complete(std::uint64_t record);
  [[nodiscard]] std::uint64_t latest() const { return page_->recorded.load(); }
  /// A record whose place was taken by a later one has completed: see record_in_the_way.
  [[nodiscard]] bool is_complete(std::uint64_t record) const;
  [[nodiscard]] bool is_demanded(std::uint64_t record) const;
  void demand(std::uint64_t record);
  [[nodiscard]] ProcessId recorder(std::uint64_t record) const;
  /// The record that would lose its place to the next one, while it is still pending; else 0.
  [[nodiscard]] std::uint64_t record_in_the_way() const;

 private:
  Event(Context* its_context, unsigned int its_flags) : context(its_context), flags(its_flags) {}

  SharedFile file_;
  std::unique_ptr<EventPage> own_;
  EventPage* page_ = nullptr;
};

}  // namespace fakecuda
