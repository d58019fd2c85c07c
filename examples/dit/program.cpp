// Commands, events and options of the example programs. See program.hpp.

#include "dit/program.hpp"

#include <openssl/evp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <map>

#include "dit/models.hpp"

namespace dit {
namespace {

constexpr std::size_t kValuesShown = 4;

std::string sha256_hex(const void* data, std::size_t bytes) {
  std::array<unsigned char, EVP_MAX_MD_SIZE> value{};
  unsigned int length = 0;
  EVP_Digest(data, bytes, value.data(), &length, EVP_sha256(), nullptr);
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    constexpr const char* kDigits = "0123456789abcdef";
    text += kDigits[value[i] >> 4U];
    text += kDigits[value[i] & 15U];
  }
  return text;
}

}  // namespace

void emit(const Json& event) {
  const std::string line = event.dump() + "\n";
  std::fwrite(line.data(), 1, line.size(), stdout);
  std::fflush(stdout);
}

int report(const refit::Error& error) {
  emit({{"event", "error"},
        {"code", refit::errc_name(error.code)},
        {"message", error.message},
        {"details", error.details}});
  return 1;
}

std::optional<std::size_t> Commands::line_end() const {
  const std::size_t end = buffer_.find('\n');
  if (end == std::string::npos) return std::nullopt;
  return end;
}

Commands::Wake Commands::wait(int descriptor, int timeout_ms) {
  for (;;) {
    if (line_end()) return Wake::command;
    if (ended_) return Wake::end;
    std::array<pollfd, 2> watched{{{STDIN_FILENO, POLLIN, 0}, {descriptor, POLLIN, 0}}};
    const int ready = ::poll(watched.data(), watched.size(), timeout_ms);
    if (ready < 0 && errno == EINTR) continue;
    if (ready <= 0) return ready == 0 ? Wake::timeout : Wake::end;
    if (watched[0].revents != 0) {
      std::array<char, 4096> chunk{};
      const ssize_t count = ::read(STDIN_FILENO, chunk.data(), chunk.size());
      if (count > 0) buffer_.append(chunk.data(), static_cast<std::size_t>(count));
      if (count == 0 || (count < 0 && errno != EINTR)) ended_ = true;
      continue;
    }
    return Wake::descriptor;
  }
}

std::string Commands::take() {
  const std::size_t end = line_end().value_or(buffer_.size());
  std::string line = buffer_.substr(0, end);
  buffer_.erase(0, std::min(end + 1, buffer_.size()));
  return line;
}

void add_common_options(CLI::App& app, CommonOptions& options) {
  static const std::map<std::string, refit::Waiting> kWaiting = {
      {"off", refit::Waiting::off},
      {"adaptive", refit::Waiting::adaptive},
      {"always", refit::Waiting::always}};
  app.add_option("--model", options.model, "Size of the DiT; trainer and engine need the same")
      ->check(CLI::IsMember(model_names()))
      ->capture_default_str();
  app.add_option(
      "--socket", options.connection.socket_path,
      "Where refitd listens (default: $REFIT_SOCKET, else the user's or the system's daemon)");
  app.add_option("--engine", options.engine, "The engine's name at the daemon")
      ->capture_default_str();
  app.add_option("--module", options.module, "The module's name")->capture_default_str();
  app.add_option("--seed", options.seed, "Seed of the initial weights and of the random draws")
      ->capture_default_str();
  app.add_option_function<std::string>(
         "--waiting",
         [&options](const std::string& name) { options.connection.waiting = kWaiting.at(name); },
         "How to wait for the daemon")
      ->check(CLI::IsMember({"off", "adaptive", "always"}))
      ->default_str("adaptive");
}

Json ready_event(const refit::ModuleSpec& spec) {
  Json tensors = Json::array();
  std::uint64_t bytes = 0;
  for (const refit::TensorSpec& tensor : spec.tensors()) {
    std::uint64_t tensor_bytes = refit::element_bytes(tensor.dtype);
    for (const std::uint64_t extent : tensor.shape) tensor_bytes *= extent;
    bytes += tensor_bytes;
    tensors.push_back({{"name", tensor.name},
                       {"dtype", refit::dtype_name(tensor.dtype)},
                       {"shape", tensor.shape},
                       {"offset", tensor.offset_bytes},
                       {"bytes", tensor_bytes}});
  }
  return {{"event", "ready"},
          {"pid", ::getpid()},
          {"module", spec.name()},
          {"fd", dynamic_cast<const refit::SharedMemory&>(*spec.regions().front()).fd()},
          {"bytes", bytes},
          {"region_bytes", spec.regions().front()->bytes()},
          {"tensors", std::move(tensors)}};
}

Json forward_event(const std::vector<float>& values) {
  const auto shown = static_cast<std::ptrdiff_t>(std::min(kValuesShown, values.size()));
  return {{"event", "forward"},
          {"sha256", sha256_hex(values.data(), values.size() * sizeof(float))},
          {"count", values.size()},
          {"values", std::vector<float>(values.begin(), values.begin() + shown)}};
}

}  // namespace dit
