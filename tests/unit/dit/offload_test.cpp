// The example's layer-wise offload: a model run through it computes the same bits, its blocks
// really are away, and every prefetch brings them somewhere else.
//
// No daemon: what a refit does to the places stands in conformance/places_test.cpp.

#include "dit/offload.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <set>

#include "dit/diffusion.hpp"

namespace dit {
namespace {

Config tiny() {
  Config config = *config_of("tiny");
  config.depth = 5;
  return config;
}

DiT make_model() {
  torch::manual_seed(3);
  DiT model(tiny());
  model->eval();
  return model;
}

std::unique_ptr<LayerwiseOffload> offload(DiT& model, std::size_t prefetch_blocks) {
  auto made = LayerwiseOffload::create(model, "transformer", prefetch_blocks);
  EXPECT_TRUE(made) << made.error().to_string();
  return std::move(*made);
}

const void* address_of(DiT& model, const std::string& name) {
  return model->named_parameters()[name].data_ptr();
}

// Goal: denoising through offload is denoising. Method: two equal models, one offloaded, sampled
// side by side; every bit of every output.
TEST(LayerwiseOffload, DenoisesToTheSameBits) {
  for (const std::size_t prefetch_blocks : {1U, 2U, 5U}) {
    DiT plain = make_model();
    DiT sut = make_model();
    const auto places = offload(sut, prefetch_blocks);
    const Diffusion diffusion(tiny());
    Sampler expected(diffusion, tiny(), 1, 6, 9);
    Sampler got(diffusion, tiny(), 1, 6, 9);
    for (int step = 0; step < 12; ++step) {
      expected.step(plain);
      got.step(sut);
      ASSERT_EQ(probe(plain), probe(sut)) << "step " << step << ", prefetch " << prefetch_blocks;
    }
    EXPECT_GT(places->prefetch_count(), 12U);
    EXPECT_LE(places->resident_blocks(), 2 * prefetch_blocks);
  }
}

// Goal: what is away is away. Method: parameters of absent blocks are the placeholder; those
// outside of blocks never move; a resident block lies elsewhere after each forward pass.
TEST(LayerwiseOffload, AbsentBlocksShareAPlaceholderAndResidentOnesMove) {
  DiT sut = make_model();
  const auto places = offload(sut, 1);
  const void* placeholder = address_of(sut, "blocks.2.mlp.fc1.weight");
  EXPECT_EQ(sut->named_parameters()["blocks.2.mlp.fc1.weight"].numel(), 1);
  EXPECT_EQ(address_of(sut, "blocks.3.attn.qkv.bias"), placeholder);
  const void* embedder = address_of(sut, "x_embedder.proj.weight");
  std::set<const void*> seen;
  const void* last = nullptr;
  for (int i = 0; i < 6; ++i) {
    probe(sut);
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (places->resident_blocks() == 0 && std::chrono::steady_clock::now() < deadline)
      std::this_thread::yield();
    ASSERT_EQ(places->resident_blocks(), 1U) << "block 0 was not brought back";
    const void* now = address_of(sut, "blocks.0.mlp.fc1.weight");
    EXPECT_NE(now, placeholder);
    EXPECT_NE(now, last);
    last = now;
    seen.insert(now);
    EXPECT_EQ(address_of(sut, "x_embedder.proj.weight"), embedder);
    EXPECT_EQ(address_of(sut, "blocks.2.mlp.fc1.weight"), placeholder);
  }
  EXPECT_GT(seen.size(), 1U);
}

// Goal: the packing is SGLang's. Method: every tensor of a block begins at a multiple of 32 bytes
// of its block's buffer, and the manifest has every tensor of the model once.
TEST(LayerwiseOffload, PacksEachBlockIntoOneBufferPerDtype) {
  DiT plain = make_model();
  DiT sut = make_model();
  const auto places = offload(sut, 1);
  const refit::ModuleSpec& spec = places->spec();
  EXPECT_EQ(spec.tensors().size(),
            plain->named_parameters().size() + plain->named_buffers().size());
  std::set<std::uint32_t> buffers;
  for (const refit::TensorSpec& tensor : spec.tensors()) {
    const bool in_block = tensor.name.rfind("blocks.", 0) == 0;
    EXPECT_EQ(tensor.layer_buffer != refit::kNoLayerBuffer, in_block) << tensor.name;
    if (!in_block) continue;
    buffers.insert(tensor.layer_buffer);
    EXPECT_EQ(tensor.layer_offset_bytes % 32, 0U) << tensor.name;
  }
  EXPECT_EQ(buffers.size(), 5U);
}

TEST(LayerwiseOffload, RefusesAPrefetchThatIsNotThere) {
  DiT model = make_model();
  EXPECT_FALSE(LayerwiseOffload::create(model, "transformer", 0));
  EXPECT_FALSE(LayerwiseOffload::create(model, "transformer", 6));
}

}  // namespace
}  // namespace dit
