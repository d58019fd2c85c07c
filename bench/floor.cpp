// Plain copies at the speed of memory. See floor.hpp.
//
// Entered by the driving thread and by the team's pinned workers. Must not use the daemon's copy
// code.
#include "floor.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <iterator>
#include <limits>
#include <mutex>
#include <numeric>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace refit::bench {
namespace {

constexpr std::size_t kChunkBytes = std::size_t{4} << 20;
constexpr std::size_t kLineBytes = 64;
constexpr std::size_t kGroupBytes = 4 * kLineBytes;

#if defined(__x86_64__)

/// May name bytes past the end: a prefetch never faults.
void prefetch_group(const std::byte* from) {
  constexpr std::size_t kAheadBytes = 2048;
  for (std::size_t line = 0; line < kGroupBytes; line += kLineBytes) {
    _mm_prefetch(from + kAheadBytes + line, _MM_HINT_NTA);
  }
}

template <bool kAhead>
__attribute__((target("avx512f"))) void stream_avx512(std::byte* to, const std::byte* from,
                                                      std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kGroupBytes) {
    if constexpr (kAhead) prefetch_group(from + i);
    const __m512i a = _mm512_loadu_si512(from + i);
    const __m512i b = _mm512_loadu_si512(from + i + 64);
    const __m512i c = _mm512_loadu_si512(from + i + 128);
    const __m512i d = _mm512_loadu_si512(from + i + 192);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 64), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 128), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i + 192), d);
  }
  _mm_sfence();
}

template <bool kAhead>
__attribute__((target("avx2"))) void stream_avx2(std::byte* to, const std::byte* from,
                                                 std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += kGroupBytes) {
    if constexpr (kAhead) prefetch_group(from + i);
    const auto* in = reinterpret_cast<const __m256i*>(from + i);
    auto* out = reinterpret_cast<__m256i*>(to + i);
    __m256i values[kGroupBytes / sizeof(__m256i)];
    for (std::size_t k = 0; k < std::size(values); ++k) values[k] = _mm256_loadu_si256(in + k);
    for (std::size_t k = 0; k < std::size(values); ++k) _mm256_stream_si256(out + k, values[k]);
  }
  _mm_sfence();
}

void rep_movsb(std::byte* to, const std::byte* from, std::size_t bytes) {
  asm volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

bool has_avx512() { return __builtin_cpu_supports("avx512f") != 0; }
bool has_avx2() { return __builtin_cpu_supports("avx2") != 0; }
constexpr bool kHasRepMovsb = true;

#else

template <bool>
void stream_avx512(std::byte*, const std::byte*, std::size_t) {}
template <bool>
void stream_avx2(std::byte*, const std::byte*, std::size_t) {}
void rep_movsb(std::byte*, const std::byte*, std::size_t) {}
bool has_avx512() { return false; }
bool has_avx2() { return false; }
constexpr bool kHasRepMovsb = false;

#endif

/// The streaming kinds take whole groups of lines at an aligned target; what is left over goes
/// through memcpy.
template <typename Kernel>
void stream(Kernel kernel, std::byte* to, const std::byte* from, std::size_t bytes) {
  const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(to) % kLineBytes;
  const std::size_t head = std::min(bytes, misaligned == 0 ? 0 : kLineBytes - misaligned);
  std::memcpy(to, from, head);
  const std::size_t body = (bytes - head) / kGroupBytes * kGroupBytes;
  kernel(to + head, from + head, body);
  std::memcpy(to + head + body, from + head + body, bytes - head - body);
}

void copy_range(CopyKind kind, std::byte* to, const std::byte* from, std::size_t bytes) {
  switch (kind) {
    case CopyKind::memcpy:
      std::memcpy(to, from, bytes);
      return;
    case CopyKind::stream_avx512:
      stream(stream_avx512<false>, to, from, bytes);
      return;
    case CopyKind::stream_avx512_ahead:
      stream(stream_avx512<true>, to, from, bytes);
      return;
    case CopyKind::stream_avx2:
      stream(stream_avx2<false>, to, from, bytes);
      return;
    case CopyKind::stream_avx2_ahead:
      stream(stream_avx2<true>, to, from, bytes);
      return;
    case CopyKind::rep_movsb:
      rep_movsb(to, from, bytes);
      return;
  }
}

std::vector<CopyMethod> methods(std::size_t cores) {
  std::vector<CopyKind> kinds{CopyKind::memcpy};
  if (has_avx512()) {
    kinds.insert(kinds.end(), {CopyKind::stream_avx512, CopyKind::stream_avx512_ahead});
  }
  if (has_avx2()) kinds.insert(kinds.end(), {CopyKind::stream_avx2, CopyKind::stream_avx2_ahead});
  if (kHasRepMovsb) kinds.push_back(CopyKind::rep_movsb);
  std::vector<CopyMethod> all;
  for (std::size_t threads = 1; threads <= cores; ++threads) {
    for (const CopyKind kind : kinds) {
      all.push_back({kind, threads, false});
      if (threads > 1) all.push_back({kind, threads, true});
    }
  }
  return all;
}

}  // namespace

std::string CopyMethod::to_string() const {
  const auto name = [this] {
    switch (kind) {
      case CopyKind::memcpy:
        return "memcpy";
      case CopyKind::stream_avx512:
        return "non-temporal avx512";
      case CopyKind::stream_avx512_ahead:
        return "non-temporal avx512, prefetch";
      case CopyKind::stream_avx2:
        return "non-temporal avx2";
      case CopyKind::stream_avx2_ahead:
        return "non-temporal avx2, prefetch";
      case CopyKind::rep_movsb:
        return "rep movsb";
    }
    return "unknown";
  };
  return name() + (" x " + std::to_string(threads)) + (threads == 1 ? " thread" : " threads") +
         (chunks ? ", chunks" : "");
}

std::vector<int> allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(static_cast<std::size_t>(core), &set)) cores.push_back(core);
    }
  }
  if (cores.empty()) cores.push_back(0);
  return cores;
}

cpu_set_t only_core(int core) noexcept {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(core), &set);
  return set;
}

struct CopyTeam::Shared {
  std::mutex mutex;
  std::condition_variable begin, done;
  std::uint64_t round = 0;
  std::size_t running = 0;
  bool stop = false;

  CopyMethod method;
  std::byte* to = nullptr;
  const std::byte* from = nullptr;
  std::size_t bytes = 0;
  std::atomic<std::size_t> next{0};

  std::vector<std::thread> workers;

  void work(std::size_t worker) {
    std::uint64_t seen = 0;
    std::unique_lock lock(mutex);
    while (true) {
      begin.wait(lock, [&] { return stop || round != seen; });
      if (stop) return;
      seen = round;
      if (worker >= method.threads) continue;
      lock.unlock();
      copy_share(worker);
      lock.lock();
      if (--running == 0) done.notify_one();
    }
  }

  void copy_share(std::size_t worker) {
    if (!method.chunks) {
      const std::size_t share = (bytes / method.threads + kLineBytes - 1) / kLineBytes * kLineBytes;
      const std::size_t first = std::min(bytes, worker * share);
      const std::size_t last =
          worker + 1 == method.threads ? bytes : std::min(bytes, first + share);
      copy_range(method.kind, to + first, from + first, last - first);
      return;
    }
    while (true) {
      const std::size_t first = next.fetch_add(kChunkBytes);
      if (first >= bytes) return;
      copy_range(method.kind, to + first, from + first, std::min(kChunkBytes, bytes - first));
    }
  }
};

CopyTeam::CopyTeam() : shared_(std::make_unique<Shared>()) {
  const std::vector<int> cores = allowed_cores();
  for (std::size_t i = 0; i < cores.size(); ++i) {
    shared_->workers.emplace_back([shared = shared_.get(), i] { shared->work(i); });
    const cpu_set_t set = only_core(cores[i]);
    ::pthread_setaffinity_np(shared_->workers.back().native_handle(), sizeof set, &set);
  }
}

CopyTeam::~CopyTeam() {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->stop = true;
  }
  shared_->begin.notify_all();
  for (std::thread& worker : shared_->workers) worker.join();
}

double CopyTeam::copy(const CopyMethod& method, std::byte* to, const std::byte* from,
                      std::size_t bytes) {
  Shared& shared = *shared_;
  // Waking a worker would cost more than a small copy; the caller is as good as any other one
  // thread.
  if (method.threads == 1) return seconds_of([&] { copy_range(method.kind, to, from, bytes); });
  std::unique_lock lock(shared.mutex);
  shared.method = method;
  shared.to = to;
  shared.from = from;
  shared.bytes = bytes;
  shared.next = 0;
  shared.running = method.threads;
  return seconds_of([&] {
    ++shared.round;
    shared.begin.notify_all();
    shared.done.wait(lock, [&] { return shared.running == 0; });
  });
}

CopyTeam::Calibration CopyTeam::calibrate(std::byte* to, const std::byte* from, std::size_t bytes,
                                          int rounds) {
  constexpr double kFarBehind = 1.35;
  struct Candidate {
    CopyMethod method;
    Samples samples;
  };
  std::vector<Candidate> candidates;
  for (const CopyMethod& method : methods(shared_->workers.size()))
    candidates.push_back({method, {}});

  copy(candidates.front().method, to, from, bytes);
  double best = std::numeric_limits<double>::max();
  for (int round = 0; round < rounds; ++round) {
    for (Candidate& candidate : candidates) {
      if (round > 0 && smallest(candidate.samples) > best * kFarBehind) continue;
      candidate.samples.push_back(copy(candidate.method, to, from, bytes));
    }
    for (const Candidate& candidate : candidates)
      best = std::min(best, smallest(candidate.samples));
  }

  Calibration result;
  result.best_s = best;
  double winner = std::numeric_limits<double>::max();
  for (const Candidate& candidate : candidates) {
    const double middle = median(candidate.samples);
    result.medians_s.emplace_back(candidate.method.to_string(), middle);
    if (candidate.samples.size() == static_cast<std::size_t>(rounds) && middle < winner) {
      winner = middle;
      result.winner = candidate.method;
    }
  }
  return result;
}

namespace {

/// Loads all of `kStreams` equal parts, a line of each in turn. A prefetch never faults.
template <std::size_t kStreams, std::size_t kAheadBytes = 0>
std::uint64_t read_lines(const std::byte* data, std::size_t bytes) {
  const std::size_t part = bytes / kStreams / kLineBytes * kLineBytes;
  std::uint64_t sums[kLineBytes / 8] = {};
  const auto add_line = [&sums](const std::byte* line) {
    if constexpr (kAheadBytes != 0) __builtin_prefetch(line + kAheadBytes, 0, 0);
    std::uint64_t words[kLineBytes / 8];
    std::memcpy(words, line, sizeof words);
    for (std::size_t i = 0; i < std::size(words); ++i) sums[i] += words[i];
  };
  for (std::size_t at = 0; at < part; at += kLineBytes) {
    for (std::size_t i = 0; i < kStreams; ++i) add_line(data + i * part + at);
  }
  for (std::size_t at = kStreams * part; at + kLineBytes <= bytes; at += kLineBytes)
    add_line(data + at);
  return std::accumulate(std::begin(sums), std::end(sums), std::uint64_t{0});
}

}  // namespace

double read_all(const std::byte* data, std::size_t bytes) {
  static std::atomic<std::uint64_t> seen{0};  // so that nothing of it is left out
  const auto timed = [&](auto read) {
    return seconds_of([&] {
      on_all_cores((bytes + kChunkBytes - 1) / kChunkBytes, [&](std::size_t chunk) {
        const std::size_t first = chunk * kChunkBytes;
        seen += read(data + first, std::min(kChunkBytes, bytes - first));
      });
    });
  };
  static constexpr std::size_t kFourPages = std::size_t{4} << 12;
  const auto four_pages_at_once = [](const std::byte* from, std::size_t length) {
    std::uint64_t sum = 0;
    for (std::size_t at = 0; at < length; at += kFourPages)
      sum += read_lines<4>(from + at, std::min(kFourPages, length - at));
    return sum;
  };
  return std::min({timed(read_lines<1>), timed(read_lines<1, 2048>), timed(four_pages_at_once)});
}

void on_all_cores(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::atomic<std::size_t> next{0};
  const auto loop = [&] {
    for (std::size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> helpers;
  for (std::size_t i = 1; i < std::min(count, allowed_cores().size()); ++i)
    helpers.emplace_back(loop);
  loop();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace refit::bench
