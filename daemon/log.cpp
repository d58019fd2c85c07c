#include "log.hpp"

#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#define SD_JOURNAL_SUPPRESS_LOCATION  // ours is the caller's
#include <systemd/sd-journal.h>

namespace refit::daemon {
namespace {

struct EventClass {
  int priority;
  const char* id;
};

constexpr EventClass kEvents[] = {
#define REFIT_X(name, priority, id) {priority, id},
    REFIT_LOG_EVENTS(REFIT_X)
#undef REFIT_X
};

/// systemd says which file the journal reads; whoever was started with another stderr wants lines
/// there.
bool stderr_is_the_journal() {
  const char* const stream = std::getenv("JOURNAL_STREAM");
  if (stream == nullptr) return false;
  unsigned long long device = 0;
  unsigned long long inode = 0;
  if (std::sscanf(stream, "%llu:%llu", &device, &inode) != 2) return false;
  struct stat status {};
  return ::fstat(STDERR_FILENO, &status) == 0 && status.st_dev == device && status.st_ino == inode;
}

bool send_to_journal(const EventClass& event, const std::string& message, const LogFields& fields,
                     const std::experimental::source_location& where) {
  std::vector<std::string> entry{
      "MESSAGE=" + message,
      std::string("MESSAGE_ID=") + event.id,
      "PRIORITY=" + std::to_string(event.priority),
      std::string("CODE_FILE=") + where.file_name(),
      "CODE_LINE=" + std::to_string(where.line()),
      std::string("CODE_FUNC=") + where.function_name(),
  };
  if (fields.client_pid) entry.push_back("REFIT_CLIENT_PID=" + std::to_string(*fields.client_pid));
  if (fields.client_uid) entry.push_back("REFIT_CLIENT_UID=" + std::to_string(*fields.client_uid));
  if (!fields.engine.empty()) entry.push_back("REFIT_ENGINE=" + fields.engine);
  if (!fields.module.empty()) entry.push_back("REFIT_MODULE=" + fields.module);
  if (!fields.transaction.empty()) entry.push_back("REFIT_TRANSACTION=" + fields.transaction);
  if (fields.errc != Errc::ok) entry.push_back("REFIT_ERRC=" + std::string(errc_name(fields.errc)));
  if (fields.native != 0) entry.push_back("ERRNO=" + std::to_string(fields.native));
  std::vector<iovec> parts;
  parts.reserve(entry.size());
  for (std::string& field : entry) parts.push_back({field.data(), field.size()});
  return ::sd_journal_sendv(parts.data(), static_cast<int>(parts.size())) == 0;
}

}  // namespace

void log(LogEvent event, const std::string& message, const LogFields& fields,
         std::experimental::source_location where) noexcept {
  const EventClass& kind = kEvents[static_cast<std::size_t>(event)];
  if (stderr_is_the_journal() && send_to_journal(kind, message, fields, where)) return;
  // The prefix is for whoever collects the lines; a person at a terminal needs none.
  if (::isatty(STDERR_FILENO) == 1) {
    std::fprintf(stderr, "refitd: %s\n", message.c_str());
  } else {
    std::fprintf(stderr, "<%d>refitd: %s\n", kind.priority, message.c_str());
  }
}

}  // namespace refit::daemon
