#include "support/fake_cuda/event.hpp"

#include <unistd.h>

namespace fakecuda {

std::shared_ptr<Event> Event::create(Context* context, unsigned int flags, ProcessId creator) {
  std::shared_ptr<Event> event(new Event(context, flags));
  event->own_ = std::make_unique<EventPage>();
  event->page_ = event->own_.get();
  event->page_->creator_pid = creator.pid;
  event->page_->creator_instance = creator.instance;
  return event;
}

std::shared_ptr<Event> Event::create_shared(Context* context, unsigned int flags, ProcessId creator,
                                            std::uint64_t nonce, const std::string& path) {
  auto file = SharedFile::create(path, kPage);
  if (!file) return nullptr;
  std::shared_ptr<Event> event(new Event(context, flags));
  event->file_ = std::move(*file);
  event->page_ = event->file_.tail<EventPage>();
  event->page_->creator_pid = creator.pid;
  event->page_->creator_instance = creator.instance;
  event->page_->creator_uid = ::geteuid();
  event->page_->nonce = nonce;
  event->page_->magic = EventPage::kMagic;
  return event;
}

std::shared_ptr<Event> Event::import(Context* context, SharedFile file) {
  if (file.tail<EventPage>()->magic != EventPage::kMagic) return nullptr;
  // The flags that every interprocess event has; others do not travel.
  constexpr unsigned int kInterprocess = 0x2 | 0x4;
  std::shared_ptr<Event> event(new Event(context, kInterprocess));
  event->file_ = std::move(file);
  event->page_ = event->file_.tail<EventPage>();
  event->imported = true;
  return event;
}

std::uint64_t Event::begin_record(ProcessId recorder) {
  const std::uint64_t record = page_->next_record.fetch_add(1) + 1;
  EventPage::Slot& slot = page_->slot(record);
  slot.pid.store(recorder.pid);
  slot.instance.store(recorder.instance);
  slot.state.store(record << EventPage::kRecordShift);
  // Published last: who reads this number finds the slot filled. Two processes may record at once.
  std::uint64_t latest = page_->recorded.load();
  while (latest < record && !page_->recorded.compare_exchange_weak(latest, record)) {
  }
  return record;
}

void Event::complete(std::uint64_t record) {
  EventPage::Slot& slot = page_->slot(record);
  if (slot.state.load() >> EventPage::kRecordShift == record)
    slot.state.fetch_or(EventPage::kCompleted);
}

bool Event::is_complete(std::uint64_t record) const {
  const std::uint64_t state = page_->slot(record).state.load();
  return state >> EventPage::kRecordShift != record || (state & EventPage::kCompleted) != 0;
}

bool Event::is_demanded(std::uint64_t record) const {
  const std::uint64_t state = page_->slot(record).state.load();
  return state >> EventPage::kRecordShift == record && (state & EventPage::kDemanded) != 0;
}

void Event::demand(std::uint64_t record) {
  EventPage::Slot& slot = page_->slot(record);
  std::uint64_t state = slot.state.load();
  // Not by fetch_or: the slot may go to another record between the look and the deed.
  while (state >> EventPage::kRecordShift == record && (state & EventPage::kDemanded) == 0 &&
         !slot.state.compare_exchange_weak(state, state | EventPage::kDemanded)) {
  }
}

ProcessId Event::recorder(std::uint64_t record) const {
  const EventPage::Slot& slot = page_->slot(record);
  return {slot.pid.load(), slot.instance.load()};
}

std::uint64_t Event::record_in_the_way() const {
  const std::uint64_t next = page_->next_record.load() + 1;
  if (next <= EventPage::kSlots) return 0;
  const std::uint64_t old = next - EventPage::kSlots;
  return is_complete(old) ? 0 : old;
}

}  // namespace fakecuda
