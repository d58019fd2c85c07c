#include "other_daemon.hpp"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "refit/observer.hpp"

namespace refit {
namespace {

constexpr std::chrono::milliseconds kLookMax{200};

bool same_socket(const std::string& a, const std::string& b) {
  struct stat one {};
  struct stat other {};
  return a == b || (::stat(a.c_str(), &one) == 0 && ::stat(b.c_str(), &other) == 0 &&
                    one.st_dev == other.st_dev && one.st_ino == other.st_ino);
}

bool has_engine(const std::string& socket, const std::string& engine) {
  if (::access(socket.c_str(), F_OK) != 0) return false;
  const Deadline deadline = Deadline::in(kLookMax);
  ConnectOptions options;
  options.socket_path = socket;
  auto observer = Observer::connect("looking-for-" + engine.substr(0, 64), options, deadline);
  if (!observer) return false;
  const auto status = observer->status(deadline);
  return status && std::any_of(status->sessions.begin(), status->sessions.end(),
                               [&](const SessionStatus& session) {
                                 return session.role == Role::engine && session.name == engine &&
                                        session.uid == ::geteuid();
                               });
}

}  // namespace

std::string system_socket_path() {
  const char* path = std::getenv("REFIT_SYSTEM_SOCKET");
  return path != nullptr && *path != '\0' ? path : "/run/refitd/refitd.sock";
}

std::string user_socket_path() {
  const char* directory = std::getenv("XDG_RUNTIME_DIR");
  const std::string folder = directory != nullptr && *directory != '\0'
                                 ? directory
                                 : "/run/user/" + std::to_string(::geteuid());
  return folder + "/refit/refitd.sock";
}

void tell_where_to_look(Error& error, const std::string& asked, const std::string& engine) {
  if (error.code != Errc::no_such_engine) return;
  for (const std::string& other : {system_socket_path(), user_socket_path()}) {
    if (same_socket(other, asked) || !has_engine(other, engine)) continue;
    std::string line = "engine ";
    line.append(engine).append(" is registered with the daemon at ").append(other);
    line += "; set REFIT_SOCKET or ConnectOptions::socket_path to it";
    if (std::find(error.details.begin(), error.details.end(), line) == error.details.end())
      error.details.push_back(std::move(line));
  }
}

}  // namespace refit
