// The state of one run and the pairs of processes that measure. See bench.hpp.
//
// Entered by the orchestrating thread. Must not measure anything itself.
#include "bench.hpp"

#include <sys/utsname.h>

#include <cstdio>
#include <fstream>

#include "floor.hpp"
#include "memory/device_survey.hpp"

namespace refit::bench {
namespace {

/// In the name of every device of the driver in tests/support/fake_cuda, and of no NVIDIA GPU.
constexpr const char* kFakeDeviceName = "Fake GPU";
constexpr const char* kFakeTimes =
    "times and ratios of the fake driver mean nothing about hardware; counts and digests are real";

using nlohmann::json;
using nlohmann::ordered_json;

std::string first_line_value(const std::string& path, const std::string& key) {
  std::ifstream stream(path);
  std::string line;
  while (std::getline(stream, line)) {
    if (line.rfind(key, 0) != 0) continue;
    const auto begin = line.find_first_not_of(" \t:", key.size());
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

ordered_json machine() {
  utsname name{};
  ::uname(&name);
  const std::string flags = first_line_value("/proc/cpuinfo", "flags") + ' ';
  return {{"cpu", first_line_value("/proc/cpuinfo", "model name")},
          {"sha_ni", flags.find(" sha_ni ") != std::string::npos},
          {"cores", allowed_cores().size()},
          {"memory", first_line_value("/proc/meminfo", "MemTotal")},
          {"kernel", name.release},
          {"shmem_huge_pages",
           first_line_value("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "")}};
}

ordered_json empty_figures(const Model& model, const Options& options) {
  ordered_json figures;
  figures["model"] = model.name;
  figures["tensors"] = model.target.size();
  figures["bytes"] = model.bytes;
  figures["memory"] = options.memory;
  figures["driver"] = nullptr;
  for (const char* key : {"page_bytes",
                          "refit_s",
                          "memcpy_s",
                          "refit_over_memcpy",
                          "first_refit_over_memcpy",
                          "fixed_overhead_us",
                          "register_ms",
                          "populate_ms_per_GB",
                          "check_s",
                          "check_GBps",
                          "sha256_one_stream_GBps",
                          "check_xxh3_GBps",
                          "read_GBps",
                          "ring_rtt_ns",
                          "reconnect_ms",
                          "proof",
                          "daemon_private_MiB",
                          "daemon_memfd_MiB",
                          "allocations_per_refit",
                          "page_faults_per_refit",
                          "syscalls_per_refit",
                          "yields_per_refit",
                          "opens_per_refit",
                          "driver_calls_per_refit",
                          "driver_copies_per_refit",
                          "driver_opens_per_refit",
                          "refit_over_memcpy_pairs",
                          "register_source_ms",
                          "fixed_overhead_busy_us",
                          "adaptive_over_off",
                          "madvise_ms_per_GB",
                          "populate_over_madvise",
                          "populate_4k_ms_per_GB",
                          "populate_4k_over_madvise",
                          "check_over_floor",
                          "check_xxh3_over_read",
                          "daemon_page_tables_MiB",
                          "tensor_huge_page_fraction",
                          "memcpy_methods_s",
                          "digests_verified",
                          "engine_stepped_back",
                          "syscalls_by_name",
                          "driver_calls_by_name"}) {
    figures[key] = nullptr;
  }
  figures["scale"] = options.scale;
  figures["quick"] = options.quick;
  figures["machine"] = machine();
  figures["skipped"] = ordered_json::array();
  return figures;
}

/// Names the driver and the device that everything runs on, the first one, as every process of the
/// bench sees it.
Result<void> find_driver(Bench& bench) {
  const DeviceSurvey survey = survey_devices();
  if (!survey.driver_there) {
    return fail(Errc::unsupported, "--memory " + bench.options.memory +
                                       " was skipped, which is not passed: " + survey.why_not);
  }
  const SurveyedDevice& device = survey.devices.front();
  bench.fake_driver = device.label.find(kFakeDeviceName) != std::string::npos;
  bench.figures["driver"] = {{"kind", bench.fake_driver ? "fake" : "hardware"},
                             {"device", device.label},
                             {"cuda_version", survey.driver_version}};
  if (bench.fake_driver) {
    bench.figures["driver"]["times"] = kFakeTimes;
    bench.progress("the driver is this project's fake one (" + device.label + "): " + kFakeTimes);
  }
  return {};
}

}  // namespace

Result<Bench> Bench::make(Options options) {
  REFIT_TRY_ASSIGN(Model model, load_model(options.manifest, options.scale));
  REFIT_TRY_ASSIGN(TemporaryDirectory directory, TemporaryDirectory::make());
  Bench bench(std::move(options), std::move(model), std::move(directory));
  bench.figures = empty_figures(bench.model, bench.options);
  if (bench.on_devices()) REFIT_TRY(find_driver(bench));
  return bench;
}

bool Bench::wants(const std::string& part) const {
  if (options.only.empty()) return true;
  for (const std::string& name : options.only) {
    if (name == part) return true;
  }
  return false;
}

void Bench::progress(const std::string& text) const {
  if (options.quiet) return;
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - begin_;
  std::fprintf(stderr, "[%6.1f s%s] %s\n", elapsed.count(), fake_driver ? ", fake driver" : "",
               text.c_str());
}

void Bench::skip(const std::string& key, const std::string& reason) {
  figures["skipped"].push_back({{"key", key}, {"reason", reason}});
}

json Bench::model_fields(bool cut) const {
  return {{"manifest", options.manifest},
          {"scale", options.scale},
          {"cut", cut},
          {"memory", options.memory}};
}

Result<Pair> Pair::start(const Bench& bench, bool cut) {
  REFIT_TRY_ASSIGN(Peer engine, Peer::start("engine"));
  REFIT_TRY_ASSIGN(Peer trainer, Peer::start("trainer"));
  json command = bench.model_fields(cut);
  command["command"] = "allocate";
  REFIT_TRY_ASSIGN(const Message memory, engine.call(command));
  REFIT_TRY(trainer.call(command));
  REFIT_TRY(trainer.call({{"command", "map_target"}, {"address", memory.body.at("address")}},
                         memory.fd.get()));
  return Pair{std::move(engine), std::move(trainer)};
}

Result<double> Pair::attach(const std::string& socket, const std::string& waiting) {
  const json connect = {{"command", "connect"}, {"socket", socket}, {"waiting", waiting}};
  double seconds = 0;
  for (Peer* peer : {&engine, &trainer}) {
    REFIT_TRY(peer->call(connect));
    REFIT_TRY_ASSIGN(const Message registered, peer->call({{"command", "register"}}));
    seconds += registered.body.at("seconds").get<double>();
  }
  REFIT_TRY(open_gate(0));
  return seconds;
}

Result<void> Pair::detach() {
  for (Peer* peer : {&trainer, &engine}) REFIT_TRY(peer->call({{"command", "disconnect"}}));
  return {};
}

Result<void> Pair::end() {
  for (Peer* peer : {&trainer, &engine}) REFIT_TRY(peer->end());
  return {};
}

Result<void> Pair::open_gate(int step_us) {
  REFIT_TRY(engine.call({{"command", "gate"}, {"idle", false}, {"step_us", step_us}}));
  return {};
}

Result<void> Pair::close_gate() {
  REFIT_TRY(engine.call({{"command", "gate"}, {"idle", true}}));
  return {};
}

Result<std::vector<double>> Pair::refits(int count) {
  REFIT_TRY_ASSIGN(const Message message, trainer.call({{"command", "refits"}, {"count", count}}));
  return message.body.at("seconds").get<std::vector<double>>();
}

}  // namespace refit::bench
