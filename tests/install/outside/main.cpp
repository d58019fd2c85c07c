// A stranger's program: trainer, engine and observer in one process, with the installed headers and
// library alone. Exits 0 if one refit through the daemon at argv[1] moved the bytes, or, with
// "nobody" as argv[2], if connecting to that socket fails as documented. Valid C++17 and C++20.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <refit/checker.hpp>
#include <refit/connection.hpp>
#include <refit/engine.hpp>
#include <refit/errc.hpp>
#include <refit/memory.hpp>
#include <refit/module.hpp>
#include <refit/observer.hpp>
#include <refit/result.hpp>
#include <refit/trainer.hpp>
#include <refit/types.hpp>
#include <string>

namespace {

constexpr std::size_t kBytes = 64 * sizeof(float);

refit::Deadline soon() { return refit::Deadline::in(std::chrono::seconds(60)); }

refit::Result<void> expect(bool condition, const char* what) {
  if (!condition) return refit::fail(refit::Errc::bad_argument, what);
  return {};
}

refit::Result<void> nobody_listens(const refit::ConnectOptions& options) {
  const auto trainer = refit::Trainer::connect("outside-trainer", options, soon());
  REFIT_TRY(expect(!trainer, "connected to nobody"));
  REFIT_TRY(expect(trainer.error().code == refit::Errc::os, "another error than os"));
  return expect(trainer.error().message.find(options.socket_path) != std::string::npos,
                "the error does not name the socket");
}

refit::Result<void> one_refit(const refit::ConnectOptions& options) {
  REFIT_TRY_ASSIGN(const auto ours, refit::SharedMemory::allocate(kBytes, "outside-trainer"));
  REFIT_TRY_ASSIGN(const auto theirs, refit::SharedMemory::allocate(kBytes, "outside-engine"));
  std::memset(ours->data(), 42, kBytes);
  refit::ModuleSpec source("net");
  REFIT_TRY(source.add("weight", refit::DType::float32, {8, 8}, ours, ours->data()));
  refit::ModuleSpec target("net");
  REFIT_TRY(target.add("weight", refit::DType::float32, {8, 8}, theirs, theirs->data()));
  REFIT_TRY(expect(refit::shape_repr(target.tensors()[0].shape) == "(8, 8)", "another shape"));

  REFIT_TRY_ASSIGN(auto engine, refit::Engine::connect("outside", options, soon()));
  REFIT_TRY(engine.register_module(target, soon()));
  engine.bind_to_this_thread();
  REFIT_TRY_ASSIGN(auto trainer, refit::Trainer::connect("outside-trainer", options, soon()));
  REFIT_TRY(trainer.register_module(source, soon()));

  refit::RefitOptions refit_options;
  refit_options.transaction = refit::TransactionId::random();
  REFIT_TRY_ASSIGN(const auto report,
                   trainer.refit(refit::RefitTarget{"outside", "net"}, soon(), refit_options));
  REFIT_TRY(expect(report.transaction == refit_options.transaction, "another transaction"));
  REFIT_TRY(expect(std::memcmp(ours->data(), theirs->data(), kBytes) == 0, "other bytes"));
  REFIT_TRY_ASSIGN(const auto event, engine.poll(soon()));
  REFIT_TRY(expect(event && event->modules.size() == 1, "the engine was told nothing"));
  REFIT_TRY(expect(engine.step_allowed() && engine.version("net") == 1, "another version"));

  REFIT_TRY_ASSIGN(auto observer, refit::Observer::connect("outside-observer", options, soon()));
  REFIT_TRY_ASSIGN(const auto digests,
                   observer.digest(refit::DigestRequest{"outside", "net"}, soon()));
  REFIT_TRY(expect(digests.tensors.size() == 1, "another number of digests"));
  std::printf("%s %s\n", digests.tensors[0].first.c_str(),
              digests.tensors[0].second.to_hex().c_str());
  return {};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return 2;
  refit::ConnectOptions options;
  options.socket_path = argv[1];
  const bool nobody = argc > 2 && std::strcmp(argv[2], "nobody") == 0;
  const auto done = nobody ? nobody_listens(options) : one_refit(options);
  if (!done) std::fprintf(stderr, "outside: %s\n", done.error().to_string().c_str());
  return done ? 0 : 1;
}
