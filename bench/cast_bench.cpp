// refit_cast_bench: the daemon's casts beside libtorch's copy_ of the same tensor, with as many
// threads.
//
// A pair is one of each, the first of them alternating, and its targets are equal byte by byte in
// the end. One thread drives both teams; neither runs while the other is timed.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <string>
#include <thread>
#include <vector>

#include "memory/copy_pool.hpp"
#include "stats.hpp"
#include "torch_cast.hpp"

namespace refit::bench {
namespace {

struct Case {
  DType from;
  DType to;
};

constexpr Case kCases[] = {
#define REFIT_X(from, to) {DType::from, DType::to},
    REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
};

void run(CopyPool& pool, CopyJob& job) {
  std::promise<void> ended;
  job.on_done(
      [](void* context, CopyOutcome) { static_cast<std::promise<void>*>(context)->set_value(); },
      &ended);
  pool.submit(job);
  ended.get_future().wait();
}

/// False if the two do not agree on a byte.
bool compare(CopyPool& pool, const Case& one, std::int64_t elements, int pairs) {
  TorchCast theirs(one.from, one.to, elements);
  const auto count = static_cast<std::size_t>(elements);
  std::vector<std::byte> target(count * element_bytes(one.to));
  CopyOp op;
  op.source = theirs.source();
  op.target = target.data();
  op.run_bytes = target.size();
  op.cast = *cast_between(one.from, one.to);
  CopyJob job;
  job.prepare(&op, 1);
  Samples ours_s;
  Samples theirs_s;
  for (int i = -1; i < pairs; ++i) {  // The first pair warms up.
    double our_time = 0;
    const auto time_ours = [&] { our_time = seconds_of([&] { run(pool, job); }); };
    if (i % 2 == 0) time_ours();
    const double their_time = seconds_of([&] { theirs.run(); });
    if (i % 2 != 0) time_ours();
    if (i < 0) continue;
    ours_s.push_back(our_time);
    theirs_s.push_back(their_time);
  }
  const std::string name =
      std::string(dtype_name(one.from)) + " to " + std::string(dtype_name(one.to));
  if (std::memcmp(target.data(), theirs.target(), target.size()) != 0) {
    std::fprintf(stderr, "%s: not what libtorch wrote\n", name.c_str());
    return false;
  }
  std::printf("%-32s %10.1f %10.1f %8.3f\n", name.c_str(), 1e3 * median(ours_s),
              1e3 * median(theirs_s), median(ratios(ours_s, theirs_s)));
  return true;
}

int main(int argc, char** argv) {
  const std::int64_t elements = (argc > 1 ? std::atoll(argv[1]) : 256) << 20;
  const int threads =
      argc > 2 ? std::atoi(argv[2]) : static_cast<int>(std::thread::hardware_concurrency());
  const int pairs = argc > 3 ? std::atoi(argv[3]) : 21;
  if (elements <= 0 || threads <= 0 || pairs <= 0) {
    std::fprintf(stderr, "usage: refit_cast_bench [MiELEMENTS [THREADS [PAIRS]]]\n");
    return 2;
  }
  TorchCast::use_threads(threads);
  auto pool = CopyPool::create(static_cast<unsigned>(threads));
  if (!pool) {
    std::fprintf(stderr, "%s\n", pool.error().to_string().c_str());
    return 1;
  }
  std::printf("%lld Mi elements, %d threads, medians of %d pairs\n\n%-32s %10s %10s %8s\n",
              static_cast<long long>(elements >> 20), threads, pairs, "cast", "refit ms",
              "torch ms", "ratio");
  bool equal = true;
  for (const Case& one : kCases) equal = compare(**pool, one, elements, pairs) && equal;
  return equal ? 0 : 1;
}

}  // namespace
}  // namespace refit::bench

int main(int argc, char** argv) { return refit::bench::main(argc, argv); }
