// The registry of outcome codes: what can go wrong in a refit, as every peer names it.
//
// The numbers travel on the wire (Reply.code and Nak.code in schema/refit.fbs) and through exit
// paths of tools, so they are never renumbered and never reused. One table: the enum, the names and
// their numbers come from it.
#pragma once

#include <cstdint>
#include <string_view>

// X(name, number)
#define REFIT_ERRC_TABLE(X)                                                                   \
  X(ok, 0)                                                                                    \
  X(os, 1)                 /* a system call failed; Error::native is errno */                 \
  X(cuda, 2)               /* a driver call failed; Error::native is the CUresult */          \
  X(deadline, 3)           /* the caller's deadline passed; says nothing about the weights */ \
  X(daemon_gone, 4)        /* the daemon died or closed the session */                        \
  X(protocol_version, 5)   /* the peers speak different versions or layouts */                \
  X(protocol, 6)           /* a message broke the protocol; the session ends */               \
  X(permission, 7)         /* this uid may not do this */                                     \
  X(quota, 8)              /* a limit was reached; the message names it */                    \
  X(shutting_down, 9)      /* the daemon drains */                                            \
  X(name_taken, 10)        /* another session holds the engine's name */                      \
  X(no_such_engine, 11)    /* no session holds that engine name */                            \
  X(no_such_module, 12)    /* the engine or the trainer registered no such module */          \
  X(bad_manifest, 13)      /* a manifest is wrong by itself; details list everything */       \
  X(manifest_mismatch, 14) /* source and target do not fit; details list everything */        \
  X(bad_region, 15)        /* memory that cannot be used; the message says why */             \
  X(unknown_ticket, 16)    /* a descriptor names an fd that never arrived */                  \
  X(engine_not_ready, 17)  /* the engine did not reach its gate in time; nothing changed */   \
  X(engine_gone, 18)       /* the engine's session ended during the call */                   \
  X(poisoned, 19)          /* the module's bytes may be a mix; only a full refit is taken */  \
  X(digest_mismatch, 20)   /* the checker found other bytes; details list them */             \
  X(memory_fault, 21)      /* client memory faulted (SIGBUS) while it was copied or hashed */ \
  X(not_enough_cores, 22)  /* waiting mode `always` needs a core for each spinner */          \
  X(bad_argument, 23)      /* the caller's argument is wrong; the message says which */       \
  X(already_running, 24)   /* another daemon serves this socket */                            \
  X(unsupported, 25)       /* known, but not built here; the message says what is */          \
  X(busy, 26)              /* one call at a time on this object */                            \
  X(engine_asleep, 27)     /* the engine gave its memory up until it wakes */                 \
  X(bad_configuration, 28) /* the daemon's configuration is wrong; details list everything */

namespace refit {

enum class Errc : std::uint16_t {
#define REFIT_X(name, number) name = number,
  REFIT_ERRC_TABLE(REFIT_X)
#undef REFIT_X
};

/// The code's name as written in the table, or "unknown" for a number that no release had.
constexpr std::string_view errc_name(Errc code) noexcept {
  switch (code) {
#define REFIT_X(name, number) \
  case Errc::name:            \
    return #name;
    REFIT_ERRC_TABLE(REFIT_X)
#undef REFIT_X
  }
  return "unknown";
}

}  // namespace refit
