#pragma once

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define REFIT_THREAD_SANITIZER
#endif
#elif defined(__SANITIZE_THREAD__)
#define REFIT_THREAD_SANITIZER
#endif

#ifdef REFIT_THREAD_SANITIZER
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
}
#endif

namespace refit::daemon {

/// A scope whose reads may meet a writer on purpose: a proof reads live bytes while the next refit
/// writes them, and throws its answer away when it finds the module's word moved. That is a race
/// as ThreadSanitizer sees it, which is told to leave this thread's reads alone meanwhile.
class RacingReads {
 public:
  RacingReads() noexcept {
#ifdef REFIT_THREAD_SANITIZER
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
#endif
  }
  ~RacingReads() {
#ifdef REFIT_THREAD_SANITIZER
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
  RacingReads(const RacingReads&) = delete;
  RacingReads& operator=(const RacingReads&) = delete;
};

}  // namespace refit::daemon
