// The daemon's one way to say something to its operator.
//
// Any thread; in practice the loop's. One line at start, one at stop, and between them only what
// somebody must know: clients that misbehave or are denied, and trouble. Never a tensor's bytes.
// Keeps no state: under systemd an entry goes to the journal with its fields, elsewhere a line goes
// to stderr. Every event has a text for operators in systemd/refitd.catalog.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <experimental/source_location>  // clang 14 finds no std::source_location in libstdc++ 12
#include <optional>
#include <string>

#include "refit/result.hpp"

namespace refit::daemon {

// X(name, priority as in syslog, MESSAGE_ID)
#define REFIT_LOG_EVENTS(X)                                                                    \
  X(started, 6, "09063d9635ba4d1ead063c941cdf24ef")                                            \
  X(stopped, 6, "b4e6b2e9646f443db90c13ab8fa3532b")                                            \
  X(draining, 6, "0ca590e11f6e42a79622ef6a54445ccc")                                           \
  X(failed, 3, "819ab530e39d475392a4e68eb4c193e1")          /* ends with an exit code */       \
  X(client_refused, 4, "2bcf0c75280c47e5943d382769c2664e")  /* a HELLO answered by NAK */      \
  X(protocol_broken, 4, "ec2290629a014505a945d42a06daf03e") /* a session ended for it */       \
  X(request_denied, 4, "dd8abf668d744b4eb86a8834a21b4b5a")  /* permission or quota */          \
  X(memory_faulted, 4, "71342f328e804a6b94aa3d73d78420e6")  /* a module may be poisoned */     \
  X(proof_refuted, 2, "5d0a4f3f1c9e4c1b8f5e6a2d7b903e14")   /* a module was poisoned for it */ \
  X(out_of_descriptors, 3, "4cefcbe21b7b4bc3b6d0270db5323acb")                                 \
  X(worker_hangs, 3, "0736acdd15914738bf0ad7cb8b2c6b87")                                       \
  X(reloaded, 5, "40177dadcac04b7fa6600e747331860b")                                           \
  X(reload_refused, 4, "bf17b615e9da45109581ac5bae9a72eb")                                     \
  X(session, 6, "69214a75b6b74b239ab4814e10ef7c62") /* only where verbose */

enum class LogEvent : std::uint8_t {
#define REFIT_X(name, priority, id) name,
  REFIT_LOG_EVENTS(REFIT_X)
#undef REFIT_X
};

/// What the journal shows beside the text, as far as it is known.
struct LogFields {
  std::optional<pid_t> client_pid{};
  std::optional<uid_t> client_uid{};
  std::string engine{};
  std::string module{};
  std::string transaction{};
  Errc errc = Errc::ok;
  int native = 0;  ///< errno
};

/// `message` is whole by itself: nobody need look at fields to understand it.
void log(LogEvent event, const std::string& message, const LogFields& fields = {},
         std::experimental::source_location where =
             std::experimental::source_location::current()) noexcept;

}  // namespace refit::daemon
