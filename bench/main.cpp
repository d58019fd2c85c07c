// refit_bench: what a refit costs beside one copy of the same bytes, with the real daemon and real
// client processes.
//
// Parses options, runs the parts one after the other, reports. The same program, started by itself
// with --role, is the trainer or the engine. Must not measure anything here.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>

#include "bench.hpp"
#include "report.hpp"
#include "roles.hpp"

namespace refit::bench {
namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;
constexpr int kExitNoDriver = 3;

constexpr const char* kFooter = R"(
Examples:
  refit_bench --manifest bench/manifests/wan2.1-t2v-1.3b.json --json wan.json
  refit_bench --manifest bench/manifests/qwen-image.json --scale 0.3 --json qwen.json
  refit_bench --manifest bench/manifests/wan2.1-t2v-1.3b.json --only overhead,ring --json o.json
  refit_bench --manifest bench/manifests/wan2.1-t2v-1.3b.json --memory cuda --json cuda.json

A manifest is JSON with "model", "dtype", "name_map", "source" and "target"; tensors are
["name", [dims]], and "target" may be "same as source". --scale multiplies every dimension.

Every refit is timed as the trainer sees it, beside a copy of the same bytes between the
same pages by the fastest method of this machine, and every digest is compared in the end.
--memory says where trainer and engine have their tensors:
  host      shared host memory; the floor is the fastest plain copy of this machine
  cuda      cuMemAlloc, shared by legacy handles; the floor is cuMemcpyDtoD
  cuda-vmm  cuMemCreate, shared by fds; the floor is cuMemcpyDtoD
  offload   the trainer's in cuMemAlloc; the engine's in pinned host memory, and of every other
            layer ("offload" in the manifest) also on the device; the floor is cuMemcpyDtoH and
            cuMemcpyDtoD
All but host take the first device of the libcuda.so.1 that the loader finds, in all processes.
Without a GPU this project's fake driver shows that everything runs, and counts calls; its times
mean nothing, and the report says so at each:
  export FAKECUDA_DIR=$(mktemp -d -p /dev/shm) LD_LIBRARY_PATH=build/release/tests/support/fake_cuda
  refit_bench --manifest bench/manifests/wan2.1-t2v-1.3b.json --scale 0.1 --memory cuda
  rm -r "$FAKECUDA_DIR"

The exit status says whether everything ran and was verified, not whether a bar was reached:
0 verified, 1 failed, 2 wrong arguments, 3 skipped because there is no CUDA driver.)";

std::string beside_this_program() {
  const std::filesystem::path folder = std::filesystem::path(own_path()).parent_path();
  for (const auto& candidate : {folder / "refitd", folder.parent_path() / "daemon" / "refitd"}) {
    if (std::filesystem::exists(candidate)) return candidate.string();
  }
  return "";
}

Result<void> measure(Bench& bench) {
  REFIT_TRY(measure_small(bench));
  REFIT_TRY(measure_ring(bench));
  return measure_full(bench);
}

int run(const Options& options) {
  auto bench = Bench::make(options);
  if (!bench) {
    std::fprintf(stderr, "refit_bench: %s\n", bench.error().to_string().c_str());
    if (bench.error().code == Errc::unsupported) return kExitNoDriver;
    return bench.error().code == Errc::bad_argument ? kExitUsage : kExitFailure;
  }
  catch_interrupts();
  if (auto measured = measure(*bench); !measured) {
    std::fprintf(stderr, "refit_bench: %s\n", measured.error().to_string().c_str());
    return kExitFailure;
  }
  judge(bench->figures);
  print_tables(bench->figures);
  if (!options.json_path.empty()) {
    if (auto written = write_json(bench->figures, options.json_path); !written) {
      std::fprintf(stderr, "refit_bench: %s\n", written.error().to_string().c_str());
      return kExitFailure;
    }
  }
  return 0;
}

}  // namespace
}  // namespace refit::bench

int main(int argc, char** argv) {
  namespace bench = refit::bench;
  bench::Options options;
  std::string role;
  CLI::App app("Measures what a refit costs beside one copy of the same bytes.");
  app.footer(bench::kFooter);
  app.add_option("--manifest", options.manifest,
                 "the model: names and shapes (bench/manifests/*.json)")
      ->type_name("FILE");
  app.add_option("--scale", options.scale, "multiply every dimension by this; at least 1 remains")
      ->capture_default_str();
  app.add_option("--memory", options.memory, "where the tensors are; see below")
      ->capture_default_str()
      ->check(CLI::IsMember(
          std::set<std::string>(bench::kMemoryKinds.begin(), bench::kMemoryKinds.end())));
  app.add_option("--steps", options.steps, "pairs of refit and copy; 30 is the least for a figure")
      ->capture_default_str()
      ->check(CLI::Range(1, 100'000));
  app.add_option("--only", options.only,
                 "parts to run: overhead, ring, register, attach, refit, check, counts, reconnect")
      ->delimiter(',')
      ->check(
          CLI::IsMember(std::set<std::string>(std::begin(bench::kParts), std::end(bench::kParts))));
  app.add_option("--json", options.json_path, "write every figure and verdict to this file")
      ->type_name("FILE");
  app.add_option("--refitd", options.refitd,
                 "the daemon to measure; default: the one built beside this program");
  app.add_flag("--quick", options.quick,
               "few repetitions: shows that everything runs, judges nothing");
  app.add_flag("--quiet", options.quiet, "no progress on stderr");
  app.add_option("--role", role)->group("");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : bench::kExitUsage;
  }
  if (!role.empty()) {
    bench::Channel channel(refit::UniqueFd::adopt(bench::kInheritedFd));
    return role == "trainer" ? bench::run_trainer(std::move(channel))
                             : bench::run_engine(std::move(channel));
  }
  if (options.manifest.empty()) {
    std::fprintf(stderr, "refit_bench: --manifest is missing; see refit_bench --help\n");
    return bench::kExitUsage;
  }
  if (options.refitd.empty()) options.refitd = bench::beside_this_program();
  if (options.refitd.empty()) {
    std::fprintf(stderr,
                 "refit_bench: no refitd was built beside this program; build the target refitd, "
                 "or name one "
                 "with --refitd PATH\n");
    return bench::kExitUsage;
  }
  return bench::run(options);
}
