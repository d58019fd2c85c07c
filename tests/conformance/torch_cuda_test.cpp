// A torch module on a CUDA device, refitted where it lies through the adapter and a real daemon.
//
// On a real driver the tensors are torch's own, by whichever allocator PYTORCH_CUDA_ALLOC_CONF
// chooses. No torch runs on the fake driver: there the tensors are objects over memory of the
// test's, of which the adapter only asks where and what they are.

#include <gtest/gtest.h>
#include <torch/cuda.h>
#include <torch/nn/module.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "refit/engine.hpp"
#include "refit/torch.hpp"
#include "refit/trainer.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/daemon_process.hpp"
#include "support/must.hpp"

namespace refit::test {
namespace {

using Bytes = std::vector<unsigned char>;
using Sizes = std::vector<std::int64_t>;

Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }

/// A tensor of `device`; `strides` in elements, of a tensor without gaps.
torch::Tensor make_tensor(const Sizes& sizes, torch::ScalarType type, int device = 0,
                          const Sizes& strides = {}) {
  const auto options = torch::TensorOptions().dtype(type).device(
      torch::kCUDA, static_cast<torch::DeviceIndex>(device));
  if (!cuda::Driver::fake()) {
    return strides.empty() ? torch::empty(sizes, options)
                           : torch::empty_strided(sizes, strides, options);
  }
  std::int64_t elements = 1;
  for (const std::int64_t size : sizes) elements *= size;
  const auto bytes = static_cast<std::uint64_t>(elements) * c10::elementSize(type);
  auto memory = std::make_shared<DeviceAllocation>(DeviceKind::legacy, device, bytes + 4096);
  std::byte* const place = memory->pointer() + 512;
  at::TensorMaker maker = at::for_blob(place, sizes);
  maker.deleter([memory](void*) {}).options(options).target_device(options.device());
  if (!strides.empty()) maker.strides(strides);
  return maker.make_tensor();
}

struct Weights : torch::nn::Module {
  void add(const std::string& name, const torch::Tensor& tensor) { register_buffer(name, tensor); }
};

/// Two allocations, one of them dense in another order, and what lies nowhere or on the host.
std::shared_ptr<Weights> make_weights() {
  auto weights = std::make_shared<Weights>();
  weights->add("weight", make_tensor({64, 33}, torch::kBFloat16));
  weights->add("channels_last", make_tensor({4, 6}, torch::kFloat32, 0, {1, 4}));
  weights->add("empty", cuda::Driver::fake()
                            ? torch::empty({0, 4})
                            : torch::empty({0, 4}, torch::TensorOptions().device(torch::kCUDA)));
  weights->add("steps", torch::zeros({3}, torch::kInt64));
  return weights;
}

std::uint64_t bytes_of(const torch::Tensor& tensor) {
  return static_cast<std::uint64_t>(tensor.numel()) *
         static_cast<std::uint64_t>(tensor.element_size());
}

void write(const torch::Tensor& tensor, const Bytes& bytes) {
  if (tensor.device().is_cpu()) {
    std::memcpy(tensor.data_ptr(), bytes.data(), bytes.size());
    return;
  }
  const cuda::Current current(tensor.device().index());
  cuda::must(cuda::Driver::get().cuMemcpyHtoD(reinterpret_cast<CUdeviceptr>(tensor.data_ptr()),
                                              bytes.data(), bytes.size()),
             "cuMemcpyHtoD");
  cuda::must(cuda::Driver::get().cuCtxSynchronize(), "cuCtxSynchronize");
}

Bytes read(const torch::Tensor& tensor) {
  Bytes bytes(bytes_of(tensor));
  if (tensor.device().is_cpu()) {
    std::memcpy(bytes.data(), tensor.data_ptr(), bytes.size());
    return bytes;
  }
  const cuda::Current current(tensor.device().index());
  cuda::must(cuda::Driver::get().cuMemcpyDtoH(
                 bytes.data(), reinterpret_cast<CUdeviceptr>(tensor.data_ptr()), bytes.size()),
             "cuMemcpyDtoH");
  return bytes;
}

/// The bytes of every tensor that has some.
std::map<std::string, Bytes> fill(const Weights& weights, unsigned seed) {
  std::mt19937 random(seed);
  std::map<std::string, Bytes> all;
  for (const auto& item : weights.named_buffers()) {
    if (item.value().numel() == 0) continue;
    Bytes& bytes = all[item.key()];
    bytes.resize(bytes_of(item.value()));
    for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
    write(item.value(), bytes);
  }
  return all;
}

class TorchCuda : public ::testing::Test {
 protected:
  TorchCuda() : daemon_(socket_) {}
  void SetUp() override {
    if (cuda::Driver::fake()) return;
    ASSERT_TRUE(torch::cuda::is_available()) << "this torch finds no CUDA device";
  }

  void TearDown() override {
    if (stream_ == nullptr) return;
    const cuda::Current current(0);
    cuda::must(cuda::Driver::get().cuStreamDestroy(stream_), "cuStreamDestroy");
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  DaemonProcess daemon_;
  CUstream stream_ = nullptr;
};

TEST_F(TorchCuda, TensorsAreRefittedWhereTheyLie) {
  const auto source = make_weights();
  const auto target = make_weights();
  std::map<std::string, const void*> places;
  for (const auto& item : target->named_buffers()) places[item.key()] = item.value().data_ptr();
  TorchModuleOptions options;
  if (cuda::Driver::fake()) {  // which takes no work on the default stream
    const cuda::Current current(0);
    CUstream stream = nullptr;
    cuda::must(cuda::Driver::get().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING),
               "cuStreamCreate");
    options.stream = stream_ = stream;
  }
  const ModuleSpec source_spec = must(share_torch_module(*source, "transformer", options));
  const ModuleSpec target_spec = must(share_torch_module(*target, "transformer", options));
  EXPECT_NE(source_spec.fence(), nullptr);
  Trainer trainer = must(Trainer::connect("trainer", {socket_}, soon()));
  Engine engine = must(Engine::connect("flux", {socket_}, soon()));
  must(trainer.register_module(source_spec, soon()));
  must(engine.register_module(target_spec, soon()));
  engine.bind_to_this_thread();
  for (unsigned step = 1; step <= 3; ++step) {
    const auto expected = fill(*source, step);
    fill(*target, 1000 + step);
    const auto report = trainer.refit({"flux", "transformer"}, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    if (step == 1) {
      std::printf("torch's memory is refitted as %s\n", report->guarantee == Guarantee::atomic
                                                            ? "segments by fd (atomic)"
                                                            : "legacy IPC (poisoned_on_failure)");
    }
    for (const auto& item : target->named_buffers()) {
      if (item.value().numel() == 0) continue;
      EXPECT_EQ(read(item.value()), expected.at(item.key())) << item.key() << ", step " << step;
      if (item.value().device().is_cuda()) {
        EXPECT_EQ(item.value().data_ptr(), places[item.key()]) << item.key() << " moved";
      }
    }
  }
  EXPECT_TRUE(check_torch_module(*target, target_spec));
  must(engine.unregister_module("transformer", soon()));
  must(trainer.unregister_module("transformer", soon()));
}

// Goal: what torch has queued before refit() is in what the engine gets, and what the engine has
// queued before it lets the refit through is over. Method: real work on torch's own stream, and
// nobody waits for it.
using TorchOnARealDriver = TorchCuda;
TEST_F(TorchOnARealDriver, WorkOnItsStreamIsWaitedFor) {
  if (cuda::Driver::fake()) GTEST_SKIP() << "real only: torch's own work";
  const auto on_device = torch::TensorOptions().device(torch::kCUDA);
  auto source = std::make_shared<Weights>();
  auto target = std::make_shared<Weights>();
  // Some milliseconds of work on it, so that whoever does not wait is too early.
  constexpr std::int64_t kSide = 4096;
  const torch::Tensor written = torch::zeros({kSide, kSide}, on_device);
  torch::Tensor overwritten = torch::zeros({kSide, kSide}, on_device);
  source->add("weight", written);
  target->add("weight", overwritten);
  Trainer trainer = must(Trainer::connect("trainer", {socket_}, soon()));
  Engine engine = must(Engine::connect("flux", {socket_}, soon()));
  must(trainer.register_module(must(share_torch_module(*source, "transformer")), soon()));
  must(engine.register_module(must(share_torch_module(*target, "transformer")), soon()));
  engine.bind_to_this_thread();
  const torch::NoGradGuard no_grad;
  const torch::Tensor factor = torch::eye(kSide, on_device);
  for (int step = 1; step <= 10; ++step) {
    for (int i = 0; i < 8; ++i) torch::mm_out(overwritten, written, factor);
    written.fill_(step - 0.5);
    torch::Tensor copy = written;
    for (int i = 0; i < 8; ++i) copy = torch::mm(copy, factor);
    written.copy_(copy.add_(0.5));
    const auto report = trainer.refit({"flux", "transformer"}, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_TRUE(overwritten.eq(static_cast<float>(step)).all().item<bool>()) << "step " << step;
  }
  must(engine.unregister_module("transformer", soon()));
  must(trainer.unregister_module("transformer", soon()));
}

TEST_F(TorchCuda, ManifestKeepsTheTensorsMemory) {
  auto weights = std::make_shared<Weights>();
  const torch::Tensor tensor = make_tensor({512}, torch::kFloat32);
  weights->add("weight", tensor);
  {
    const ModuleSpec sut = must(share_torch_module(*weights, "net"));
    weights = nullptr;
    EXPECT_EQ(tensor.use_count(), 2U) << "this one and the manifest's";
  }
  EXPECT_EQ(tensor.use_count(), 1U);
}

TEST_F(TorchCuda, ExpandedTensorsAreRefusedByName) {
  Weights weights;
  weights.add("wide", make_tensor({4, 8}, torch::kFloat32, 0, {0, 1}));
  const auto sut = share_torch_module(weights, "net");
  ASSERT_FALSE(sut);
  ASSERT_EQ(sut.error().details.size(), 1U);
  EXPECT_NE(sut.error().details[0].find("\"wide\" is expanded"), std::string::npos);
}

TEST_F(TorchCuda, TensorsOfSeveralDevicesAreRefusedByName) {
  REFIT_NEEDS_DEVICES(2);
  Weights weights;
  weights.add("here", make_tensor({4}, torch::kFloat32, 0));
  weights.add("there", make_tensor({4}, torch::kFloat32, 1));
  const auto sut = share_torch_module(weights, "net");
  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::bad_argument);
  ASSERT_EQ(sut.error().details.size(), 1U);
  EXPECT_NE(sut.error().details[0].find("\"there\" is on device cuda:1"), std::string::npos);
}

}  // namespace
}  // namespace refit::test
