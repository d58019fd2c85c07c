// The libtorch adapter on real modules and real shared memory; no daemon.
//
// One thread. What a refit moves is proven elsewhere; here, that tensors live where the manifest
// says, and go on living there while optimizers write.
#include "refit/torch.hpp"

#include <gtest/gtest.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>

#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

using refit::DType;
using refit::Errc;

struct NetImpl : torch::nn::Module {
  NetImpl()
      : first(register_module("first", torch::nn::Linear(8, 16))),
        norm(register_module("norm", torch::nn::BatchNorm1d(16))),
        last(register_module("last",
                             torch::nn::Linear(torch::nn::LinearOptions(16, 4).bias(false)))) {}
  torch::Tensor forward(const torch::Tensor& x) { return last(torch::relu(norm(first(x)))); }
  torch::nn::Linear first;
  torch::nn::BatchNorm1d norm;
  torch::nn::Linear last;
};
TORCH_MODULE(Net);

/// A module that registers whatever a test hands it.
struct Bag : torch::nn::Module {
  torch::Tensor parameter(const std::string& name, torch::Tensor tensor) {
    return register_parameter(name, std::move(tensor), false);
  }
  torch::Tensor buffer(const std::string& name, torch::Tensor tensor) {
    return register_buffer(name, std::move(tensor));
  }
};

Net make_net(std::uint64_t seed) {
  torch::manual_seed(seed);
  Net net;
  return net;
}

std::map<std::string, torch::Tensor> tensors_of(const torch::nn::Module& module) {
  std::map<std::string, torch::Tensor> all;
  for (const auto& item : module.named_parameters()) all[item.key()] = item.value();
  for (const auto& item : module.named_buffers()) all[item.key()] = item.value();
  return all;
}

std::map<std::string, torch::Tensor> copies_of(const torch::nn::Module& module) {
  auto all = tensors_of(module);
  for (auto& [name, tensor] : all) tensor = tensor.detach().clone();
  return all;
}

const refit::TensorSpec* find(const refit::ModuleSpec& spec, const std::string& name) {
  for (const refit::TensorSpec& tensor : spec.tensors()) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

const std::byte* place_of(const refit::ModuleSpec& spec, const refit::TensorSpec& tensor) {
  return spec.regions()[tensor.region]->data() + tensor.offset_bytes;
}

/// The bytes that another process sees of a tensor: read from the region, not through torch.
std::vector<std::byte> region_bytes(const refit::ModuleSpec& spec, const std::string& name) {
  const refit::TensorSpec& tensor = *find(spec, name);
  std::size_t bytes = refit::element_bytes(tensor.dtype);
  for (const std::uint64_t extent : tensor.shape) bytes *= extent;
  const std::byte* begin = place_of(spec, tensor);
  return {begin, begin + bytes};
}

std::vector<std::byte> torch_bytes(const torch::Tensor& tensor) {
  const torch::Tensor dense = tensor.detach().contiguous();
  std::vector<std::byte> bytes(dense.nbytes());
  if (!bytes.empty()) std::memcpy(bytes.data(), dense.data_ptr(), bytes.size());
  return bytes;
}

std::string joined(const refit::Error& error) { return error.to_string(); }

template <typename Optimizer>
void step(Net& net, Optimizer& optimizer) {
  const auto x = torch::linspace(-1, 1, 32).reshape({4, 8});
  optimizer.zero_grad();
  net(x).square().sum().backward();
  optimizer.step();
}

TEST(TorchModule, EveryTensorLivesInTheRegionWithItsValuesAndNames) {
  // Goal: nothing of the module is left outside, nothing changes its value, names are torch's.
  Net net = make_net(1);
  const auto before = copies_of(*net);
  auto sut = refit::share_torch_module(*net, "net");
  ASSERT_TRUE(sut) << joined(sut.error());

  EXPECT_EQ(sut->name(), "net");
  ASSERT_EQ(sut->regions().size(), 1U);
  std::vector<std::string> names;
  for (const auto& item : net->named_parameters()) names.push_back(item.key());
  for (const auto& item : net->named_buffers()) names.push_back(item.key());
  ASSERT_EQ(sut->tensors().size(), names.size());
  for (std::size_t i = 0; i < names.size(); ++i) {
    const refit::TensorSpec& spec = sut->tensors()[i];
    EXPECT_EQ(spec.name, names[i]);
    const torch::Tensor live = tensors_of(*net)[names[i]];
    EXPECT_TRUE(sut->regions()[0]->contains(live.data_ptr(), live.nbytes())) << names[i];
    EXPECT_EQ(live.data_ptr(), static_cast<const void*>(place_of(*sut, spec))) << names[i];
    EXPECT_TRUE(torch::equal(live, before.at(names[i]))) << names[i];
    EXPECT_EQ(live.requires_grad(), before.count(names[i]) != 0 && i < net->parameters().size())
        << names[i];
    EXPECT_TRUE(live.is_leaf());
    EXPECT_EQ(torch_bytes(live), region_bytes(*sut, names[i])) << names[i];
  }
}

/// Trains a shared and a plain copy of one network side by side; the optimizer of the shared one is
/// older than the move.
template <typename Optimizer, typename Options>
void expect_steps_in_the_region(const Options& options) {
  Net shared = make_net(2);
  Net plain = make_net(2);
  Optimizer shared_optimizer(shared->parameters(), options);
  Optimizer plain_optimizer(plain->parameters(), options);
  step(shared, shared_optimizer);
  step(plain, plain_optimizer);
  auto sut = refit::share_torch_module(*shared, "net");
  ASSERT_TRUE(sut) << joined(sut.error());

  for (int i = 0; i < 3; ++i) {
    std::map<std::string, std::vector<std::byte>> before;
    for (const auto& item : shared->named_parameters())
      before[item.key()] = region_bytes(*sut, item.key());
    step(shared, shared_optimizer);
    step(plain, plain_optimizer);
    const auto expected = tensors_of(*plain);
    for (const auto& item : shared->named_parameters()) {
      const auto seen = region_bytes(*sut, item.key());
      // first.bias feeds a batch norm, which removes it: its gradient is rounding noise and may
      // leave it as it is.
      if (item.key() != "first.bias") {
        EXPECT_NE(seen, before[item.key()]) << item.key() << " step " << i;
      }
      EXPECT_EQ(seen, torch_bytes(expected.at(item.key()))) << item.key() << " step " << i;
    }
    EXPECT_EQ(region_bytes(*sut, "norm.running_mean"),
              torch_bytes(expected.at("norm.running_mean")));
    EXPECT_EQ(region_bytes(*sut, "norm.num_batches_tracked"),
              torch_bytes(expected.at("norm.num_batches_tracked")));
  }
  EXPECT_TRUE(refit::check_torch_module(*shared, *sut));
}

TEST(TorchModule, SgdWithMomentumWritesIntoTheRegionWhatItWouldWriteElsewhere) {
  expect_steps_in_the_region<torch::optim::SGD>(torch::optim::SGDOptions(0.1).momentum(0.9));
}

TEST(TorchModule, AdamWWritesIntoTheRegionWhatItWouldWriteElsewhere) {
  expect_steps_in_the_region<torch::optim::AdamW>(torch::optim::AdamWOptions(0.01));
}

TEST(TorchModule, BytesWrittenIntoTheRegionAreWhatTorchComputesWith) {
  // The engine's side: the daemon writes the region behind torch's back.
  Net net = make_net(3);
  auto sut = refit::share_torch_module(*net, "net");
  ASSERT_TRUE(sut) << joined(sut.error());
  const refit::TensorSpec& weight = *find(*sut, "last.weight");
  std::memset(sut->regions()[0]->data() + weight.offset_bytes, 0, 16 * 4 * sizeof(float));
  EXPECT_EQ(net(torch::ones({4, 8})).abs().sum().item<float>(), 0.0F);
}

TEST(TorchModule, TiedParametersStayTiedAndAreListedOnceUnderTheirFirstName) {
  auto bag = std::make_shared<Bag>();
  auto head = std::make_shared<Bag>();
  const auto tied = bag->parameter("embedding", torch::randn({4, 3}));
  head->parameter("weight", tied);
  head->parameter("bias", torch::randn({4}));
  bag->register_module("head", head);

  auto sut = refit::share_torch_module(*bag, "tied");
  ASSERT_TRUE(sut) << joined(sut.error());
  ASSERT_EQ(sut->tensors().size(), 2U);
  EXPECT_NE(find(*sut, "embedding"), nullptr);
  EXPECT_EQ(find(*sut, "head.weight"), nullptr);
  EXPECT_NE(find(*sut, "head.bias"), nullptr);

  auto live = tensors_of(*bag);
  EXPECT_EQ(live["embedding"].data_ptr(), live["head.weight"].data_ptr());
  {
    const torch::NoGradGuard no_grad;
    live["head.weight"].fill_(7);
  }
  EXPECT_EQ(live["embedding"].sum().item<float>(), 84.0F);
  EXPECT_TRUE(refit::check_torch_module(*bag, *sut));
}

TEST(TorchModule, TwoTensorObjectsOverTheSameBytesStayTied) {
  // A tie made with detach() or set_data has two tensor objects and one storage.
  auto bag = std::make_shared<Bag>();
  const auto first = bag->parameter("first", torch::randn({5}));
  bag->buffer("second", first.detach());
  auto sut = refit::share_torch_module(*bag, "tied");
  ASSERT_TRUE(sut) << joined(sut.error());
  EXPECT_EQ(sut->tensors().size(), 1U);
  auto live = tensors_of(*bag);
  EXPECT_EQ(live["first"].data_ptr(), live["second"].data_ptr());
  EXPECT_TRUE(refit::check_torch_module(*bag, *sut));
}

TEST(TorchModule, ATensorThatIsPartOfAnotherIsRefusedWithBothNamesAndNothingMoves) {
  auto bag = std::make_shared<Bag>();
  const auto whole = bag->parameter("whole", torch::randn({6, 2}));
  bag->buffer("rows", whole.detach().narrow(0, 2, 2));
  const void* before = whole.data_ptr();
  auto sut = refit::share_torch_module(*bag, "overlap");
  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::bad_argument);
  ASSERT_EQ(sut.error().details.size(), 1U);
  EXPECT_NE(sut.error().details[0].find("\"whole\""), std::string::npos);
  EXPECT_NE(sut.error().details[0].find("\"rows\""), std::string::npos);
  EXPECT_EQ(tensors_of(*bag)["whole"].data_ptr(), before);
}

TEST(TorchModule, NeighboursInOneStorageMoveApart) {
  auto bag = std::make_shared<Bag>();
  const auto storage = torch::arange(12, torch::kFloat32).reshape({6, 2});
  bag->buffer("low", storage.narrow(0, 0, 3));
  bag->buffer("high", storage.narrow(0, 3, 3));
  auto sut = refit::share_torch_module(*bag, "neighbours");
  ASSERT_TRUE(sut) << joined(sut.error());
  EXPECT_EQ(sut->tensors().size(), 2U);
  EXPECT_TRUE(torch::equal(tensors_of(*bag)["high"],
                           torch::arange(6, 12, torch::kFloat32).reshape({3, 2})));
}

TEST(TorchModule, ATensorThatIsNotContiguousBecomesContiguousWithItsValues) {
  auto bag = std::make_shared<Bag>();
  const auto transposed = torch::arange(12, torch::kFloat32).reshape({3, 4}).t();
  const auto expected = transposed.clone();
  ASSERT_FALSE(transposed.is_contiguous());
  bag->parameter("transposed", transposed);
  bag->buffer("expanded", torch::arange(3).unsqueeze(0).expand({2, 3}));
  auto sut = refit::share_torch_module(*bag, "strided");
  ASSERT_TRUE(sut) << joined(sut.error());
  auto live = tensors_of(*bag);
  EXPECT_TRUE(live["transposed"].is_contiguous());
  EXPECT_TRUE(torch::equal(live["transposed"], expected));
  EXPECT_EQ(find(*sut, "transposed")->shape, (refit::Dims{4, 3}));
  EXPECT_EQ(region_bytes(*sut, "transposed"), torch_bytes(expected));
  EXPECT_EQ(region_bytes(*sut, "expanded").size(), 6 * sizeof(std::int64_t));
}

TEST(TorchModule, ZeroDimensionalAndEmptyTensorsAreListedInsideTheRegion) {
  auto bag = std::make_shared<Bag>();
  bag->buffer("scalar", torch::tensor(7.0F));
  bag->buffer("empty", torch::empty({0}));
  bag->buffer("empty_matrix", torch::empty({3, 0, 2}, torch::kBFloat16));
  auto sut = refit::share_torch_module(*bag, "small");
  ASSERT_TRUE(sut) << joined(sut.error());
  ASSERT_EQ(sut->tensors().size(), 3U);
  EXPECT_EQ(find(*sut, "scalar")->shape, refit::Dims{});
  EXPECT_EQ(find(*sut, "empty")->shape, refit::Dims{0});
  EXPECT_EQ(find(*sut, "empty_matrix")->shape, (refit::Dims{3, 0, 2}));
  EXPECT_EQ(tensors_of(*bag)["scalar"].item<float>(), 7.0F);
  EXPECT_EQ(tensors_of(*bag)["empty_matrix"].sizes(), (std::vector<std::int64_t>{3, 0, 2}));
  for (const refit::TensorSpec& tensor : sut->tensors()) {
    EXPECT_TRUE(sut->regions()[0]->contains(place_of(*sut, tensor), 0)) << tensor.name;
  }
  EXPECT_TRUE(refit::check_torch_module(*bag, *sut));
}

TEST(TorchModule, AModuleOfOneEmptyTensorHasARegion) {
  auto bag = std::make_shared<Bag>();
  bag->buffer("empty", torch::empty({0}));
  auto sut = refit::share_torch_module(*bag, "empty");
  ASSERT_TRUE(sut) << joined(sut.error());
  EXPECT_EQ(sut->regions().size(), 1U);
}

TEST(TorchModule, EveryDtypeKeepsItsNumberAndBytes) {
  const std::vector<std::pair<torch::ScalarType, DType>> table = {
      {torch::kFloat64, DType::float64}, {torch::kFloat32, DType::float32},
      {torch::kFloat16, DType::float16}, {torch::kBFloat16, DType::bfloat16},
      {torch::kInt64, DType::int64},     {torch::kInt32, DType::int32},
      {torch::kInt16, DType::int16},     {torch::kInt8, DType::int8},
      {torch::kUInt8, DType::uint8},     {torch::kBool, DType::boolean}};
  auto bag = std::make_shared<Bag>();
  for (const auto& [type, dtype] : table) {
    bag->buffer(torch::toString(type), (torch::arange(5) - 1).remainder(3).to(type));
  }
  const auto before = copies_of(*bag);
  auto sut = refit::share_torch_module(*bag, "dtypes");
  ASSERT_TRUE(sut) << joined(sut.error());
  for (const auto& [type, dtype] : table) {
    const std::string name = torch::toString(type);
    ASSERT_NE(find(*sut, name), nullptr) << name;
    EXPECT_EQ(find(*sut, name)->dtype, dtype) << name;
    EXPECT_EQ(region_bytes(*sut, name), torch_bytes(before.at(name))) << name;
    EXPECT_EQ(tensors_of(*bag)[name].scalar_type(), type) << name;
  }
}

TEST(TorchModule, ThePrefixStandsBeforeEveryName) {
  Net net = make_net(4);
  refit::TorchModuleOptions options;
  options.prefix = "model.";
  auto sut = refit::share_torch_module(*net, "net", options);
  ASSERT_TRUE(sut) << joined(sut.error());
  EXPECT_NE(find(*sut, "model.first.weight"), nullptr);
  EXPECT_NE(find(*sut, "model.norm.num_batches_tracked"), nullptr);
  EXPECT_EQ(find(*sut, "first.weight"), nullptr);
  EXPECT_TRUE(refit::check_torch_module(*net, *sut, "model."));
}

TEST(TorchModule, EveryTensorThatCannotMoveIsNamedAndNothingMoves) {
  auto bag = std::make_shared<Bag>();
  const auto good = bag->parameter("good", torch::randn({3}));
  bag->buffer("complex", torch::zeros({2}, torch::kComplexFloat));
  bag->buffer("elsewhere", torch::empty({2}, torch::device(torch::kMeta)));
  bag->buffer("sparse", torch::eye(3).to_sparse());
  const void* before = good.data_ptr();
  auto sut = refit::share_torch_module(*bag, "bad");
  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::bad_argument);
  ASSERT_EQ(sut.error().details.size(), 3U) << joined(sut.error());
  EXPECT_NE(sut.error().details[0].find("\"complex\" has dtype ComplexFloat"), std::string::npos);
  EXPECT_NE(sut.error().details[1].find("\"elsewhere\" is on device meta"), std::string::npos);
  EXPECT_NE(sut.error().details[2].find("\"sparse\" is not a dense tensor"), std::string::npos);
  EXPECT_EQ(tensors_of(*bag)["good"].data_ptr(), before);
}

TEST(TorchModule, AModuleWithoutTensorsIsRefused) {
  Bag bag;
  auto sut = refit::share_torch_module(bag, "nothing");
  ASSERT_FALSE(sut);
  EXPECT_EQ(sut.error().code, Errc::bad_argument);
  EXPECT_NE(sut.error().message.find("\"nothing\""), std::string::npos);
}

TEST(TorchModule, TensorsKeepTheirMemoryAfterTheManifestIsGone) {
  Net net = make_net(5);
  std::weak_ptr<refit::Memory> memory;
  const auto before = copies_of(*net);
  {
    auto sut = refit::share_torch_module(*net, "net");
    ASSERT_TRUE(sut) << joined(sut.error());
    memory = sut->regions()[0];
  }
  EXPECT_FALSE(memory.expired());
  EXPECT_TRUE(torch::equal(tensors_of(*net)["first.weight"], before.at("first.weight")));
  net = nullptr;
  EXPECT_TRUE(memory.expired());
}

TEST(TorchModule, CheckNamesTensorsThatMoveToAnotherDtypeTookAway) {
  Net net = make_net(6);
  auto sut = refit::share_torch_module(*net, "net");
  ASSERT_TRUE(sut) << joined(sut.error());
  ASSERT_TRUE(refit::check_torch_module(*net, *sut));
  net->last->to(torch::kFloat64);
  const auto checked = refit::check_torch_module(*net, *sut);
  ASSERT_FALSE(checked);
  EXPECT_EQ(checked.error().code, Errc::bad_region);
  ASSERT_EQ(checked.error().details.size(), 1U);
  EXPECT_NE(checked.error().details[0].find("\"last.weight\""), std::string::npos);
}

TEST(TorchModule, SharingAgainAfterTensorsLeftBringsThemBack) {
  Net net = make_net(7);
  auto first = refit::share_torch_module(*net, "net");
  ASSERT_TRUE(first) << joined(first.error());
  std::stringstream file;
  torch::save(net, file);
  torch::load(net, file);
  auto sut = refit::share_torch_module(*net, "net");
  ASSERT_TRUE(sut) << joined(sut.error());
  EXPECT_TRUE(refit::check_torch_module(*net, *sut));
  EXPECT_FALSE(refit::check_torch_module(*net, *first));
}

}  // namespace
