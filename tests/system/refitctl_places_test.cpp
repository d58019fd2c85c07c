// refitctl and engines whose layers come and go, or which sleep: what --place shows, and what
// status says of an engine without memory. See support/refitctl_system.hpp.

#include "support/offloaded_model.hpp"
#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

/// Two layers, the second one resident.
class RefitctlPlaces : public RefitctlSystem {
 protected:
  void start() {
    daemon_->start();
    engine_.emplace(must(Engine::connect("engine0", {socket_path_, Waiting::off}, soon())));
    must(engine_->register_module(model_.spec(), soon()));
    model_.fetch(1);
  }
  OffloadedModel model_{"transformer", 2, 2};
};

TEST_F(RefitctlPlaces, DigestsOfEitherPlaceAreShown) {
  start();
  const json all = parsed(refitctl({"digest", "engine0/transformer", "--place", "all", "--json"}));
  ASSERT_EQ(all.at("device").size(), 5U);
  EXPECT_EQ(all.at("tensors").size(), 12U);
  EXPECT_EQ(all.at("absent").size(), 7U);
  for (const auto& [name, digest] : all.at("device").items()) {
    EXPECT_EQ(name.rfind("layers.1.", 0), 0U) << name;
    EXPECT_EQ(all.at("tensors").at(name), digest) << name;
  }
  const json host = parsed(refitctl({"digest", "engine0/transformer", "--json"}));
  EXPECT_EQ(host.at("tensors"), all.at("tensors"));
  EXPECT_FALSE(host.contains("device"));
  const Finished text = refitctl({"digest", "engine0/transformer", "--place", "device"});
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, "layers.1.a (device)")) << text.out;
  EXPECT_TRUE(contains(text.out, "layers.0.a")) << text.out;
  EXPECT_EQ(refitctl({"digest", "engine0/transformer", "--place", "gpu"}).status, 2);
}

// Goal: a check says which place is wrong. Method: the manifest is what `digest` wrote; then one
// byte of the device's place is spoilt.
TEST_F(RefitctlPlaces, CheckLooksWhereItIsTold) {
  start();
  const std::string manifest =
      file("now.json", refitctl({"digest", "engine0/transformer", "--place", "all", "--json"}).out);
  for (const char* place : {"host", "device", "all"}) {
    const Finished checked = refitctl({"check", manifest, "--place", place});
    EXPECT_EQ(checked.status, 0) << place << checked.out << checked.err;
  }
  model_.spoil_pool(0);
  EXPECT_EQ(refitctl({"check", manifest}).status, 0);
  for (const char* place : {"device", "all"}) {
    const Finished checked = refitctl({"check", manifest, "--place", place, "--json"});
    EXPECT_EQ(checked.status, 1);
    EXPECT_EQ(parsed(checked).at("device_mismatched"), json({"layers.1.a"}));
    EXPECT_EQ(parsed(checked).at("mismatched"), json::array());
  }
  model_.drop(1);
  EXPECT_EQ(refitctl({"check", manifest, "--place", "device"}).status, 1)
      << "nothing was there to be verified";
}

TEST_F(RefitctlPlaces, SleepIsShown) {
  start();
  must(engine_->sleep(soon()));
  EXPECT_TRUE(contains(refitctl({"status"}).out, "asleep"));
  EXPECT_EQ(parsed(refitctl({"modules", "--json"})).at("modules").at(0).at("asleep"), true);
  const Finished refused = refitctl({"digest", "engine0/transformer"});
  EXPECT_EQ(refused.status, 1);
  EXPECT_TRUE(contains(refused.err, "engine engine0 sleeps")) << refused.err;
}

}  // namespace
}  // namespace refit::test
