#include "support/fake_cuda/process.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace fakecuda {

bool Process::open(const Configuration& configuration) {
  directory_ = configuration.directory;
  on_violation_ = configuration.on_violation;
  const std::string path = directory_ + "/p-" + std::to_string(::getpid());
  const std::string unready = path + ".new";
  // The fd stays open on purpose: it holds the lock until the process is gone.
  const int fd = ::open(unready.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0 || ::flock(fd, LOCK_EX | LOCK_NB) != 0 || ::ftruncate(fd, sizeof(ProcessPage)) != 0)
    return false;
  void* bytes = ::mmap(nullptr, sizeof(ProcessPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (bytes == MAP_FAILED) return false;
  page_ = static_cast<ProcessPage*>(bytes);
  page_->pid = ::getpid();
  if (::getrandom(&page_->instance, sizeof page_->instance, 0) != sizeof page_->instance)
    return false;
  page_->magic = ProcessPage::kMagic;
  // Others see it complete and locked, or not at all.
  return ::rename(unready.c_str(), path.c_str()) == 0;
}

bool Process::is_alive(ProcessId other) const {
  if (is_self(other)) return true;
  const std::string path = directory_ + "/p-" + std::to_string(other.pid);
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  std::uint64_t instance = 0;
  const bool read =
      ::pread(fd, &instance, sizeof instance, offsetof(ProcessPage, instance)) == sizeof instance;
  const bool locked = ::flock(fd, LOCK_SH | LOCK_NB) != 0;
  ::close(fd);
  return read && instance == other.instance && locked;
}

void Process::for_each_other(const std::function<void(const ProcessPage&)>& visit) const {
  DIR* directory = ::opendir(directory_.c_str());
  if (directory == nullptr) return;
  while (const dirent* entry = ::readdir(directory)) {
    const std::string_view name = entry->d_name;
    if (name.rfind("p-", 0) != 0 || name.find('.') != std::string_view::npos) continue;
    const auto pid = static_cast<pid_t>(std::atol(entry->d_name + 2));
    if (pid == page_->pid) continue;
    const auto report = ProcessReport::open(directory_, pid);
    if (report && is_alive({pid, (*report)->instance})) visit(*report->operator->());
  }
  ::closedir(directory);
}

void Process::violation(const std::string& description) {
  std::fprintf(stderr, "fakecuda: violation: %s\n", description.c_str());
  add(Tally::violations);
  const std::size_t used = page_->text_bytes.load();
  const std::size_t room = sizeof page_->text - used;
  const std::size_t bytes = std::min(room, description.size() + 1);
  std::memcpy(page_->text + used, (description + '\n').data(), bytes);
  page_->text_bytes.store(used + bytes);
  if (on_violation_ == OnViolation::abort) std::abort();
}

void Process::violation_after_fork() {
  constexpr std::string_view kLine =
      "fakecuda: violation: a driver call in the child of a fork, without exec\n";
  [[maybe_unused]] const ssize_t written = ::write(2, kLine.data(), kLine.size());
  add(Tally::violations);
}

void Process::forget_violations() {
  page_->tallies[static_cast<std::size_t>(Tally::violations)].store(0);
  page_->text_bytes.store(0);
}

}  // namespace fakecuda
