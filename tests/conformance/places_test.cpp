// Several places of one tensor: a refit writes the host's and the device's, a digest reads either,
// and nothing else is touched.
//
// The device is another buffer of host memory. Expected digests are SHA-256 by OpenSSL over the
// trainer's bytes; nothing of the project's digest code is used to make them. Residency words that
// no client library writes come from a raw client.

#include <fcntl.h>
#include <openssl/evp.h>

#include <map>
#include <set>

#include "ipc/residency_word.hpp"
#include "ipc/state_word.hpp"
#include "support/daemon_test.hpp"
#include "support/offloaded_model.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kLayers = 6;
const RefitTarget kWhole{"flux", "transformer"};

Digest sha256(const std::byte* data, std::size_t bytes) {
  Digest digest;
  unsigned int length = 32;
  EVP_Digest(data, bytes, digest.bytes.data(), &length, EVP_sha256(), nullptr);
  digest.length = 32;
  return digest;
}

std::map<std::string, Digest> digests_of(const Model& model) {
  std::map<std::string, Digest> all;
  for (std::size_t i = 0; i < model.names().size(); ++i)
    all[model.names()[i]] = sha256(model.data(i), model.bytes(i));
  return all;
}

/// Names whose digest is not the expected one.
std::vector<std::string> wrong(const std::vector<NamedDigest>& got,
                               const std::map<std::string, Digest>& expected) {
  std::vector<std::string> names;
  for (const auto& [name, digest] : got) {
    if (expected.at(name) != digest) names.push_back(name);
  }
  return names;
}

class Places : public DaemonTest {
 protected:
  Places() {
    source_ = model_of(layered_tensors(kLayers), 1);
    start();
  }
  Engine make_offloaded(OffloadedModel& model) {
    Engine engine = must(Engine::connect("flux", options(), soon()));
    must(engine.register_module(model.spec(), soon()));
    engine.bind_to_this_thread();
    return engine;
  }
  Observer make_observer() { return must(Observer::connect("observer", options(), soon())); }

  static DigestReport digest(Observer& observer, Place place) {
    DigestRequest request{"flux", "transformer", DigestKind::raw};
    request.place = place;
    return must(observer.digest(request, soon()));
  }

  std::unique_ptr<Model> source_;
  OffloadedModel target_{"transformer", kLayers, 4};
};

TEST_F(Places, RefitWritesHostAndDeviceAndNothingElse) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(1);
  target_.fetch(4);
  const RefitReport report = must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  EXPECT_TRUE(target_.holds_exactly(*source_));
  std::uint64_t layer_bytes = 0;
  std::uint64_t all_bytes = 0;
  for (std::size_t i = 0; i < source_->names().size(); ++i) {
    all_bytes += source_->bytes(i);
    const bool resident = source_->names()[i].rfind("layers.1.", 0) == 0 ||
                          source_->names()[i].rfind("layers.4.", 0) == 0;
    layer_bytes += resident ? source_->bytes(i) : 0;
  }
  EXPECT_EQ(report.bytes, all_bytes);
  EXPECT_EQ(report.device_bytes, layer_bytes);

  Observer observer = make_observer();
  const auto expected = digests_of(*source_);
  const DigestReport host = digest(observer, Place::host);
  EXPECT_EQ(host.tensors.size(), expected.size());
  EXPECT_EQ(wrong(host.tensors, expected), std::vector<std::string>{});
  EXPECT_TRUE(host.device.empty() && host.absent.empty());
  const DigestReport device = digest(observer, Place::device);
  EXPECT_TRUE(device.tensors.empty());
  EXPECT_EQ(device.device.size(), 10U);
  EXPECT_EQ(wrong(device.device, expected), std::vector<std::string>{});
  EXPECT_EQ(device.absent.size(), expected.size() - 10);
  const DigestReport all = digest(observer, Place::all);
  EXPECT_EQ(all.tensors, host.tensors);
  EXPECT_EQ(all.device, device.device);
  EXPECT_EQ(all.absent, device.absent);
}

// Goal: a selection writes both places of what it names and leaves the rest of a layer alone.
TEST_F(Places, SelectionWritesBothPlacesOfItsTensorsOnly) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(2);
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  auto mixed = model_of(layered_tensors(kLayers), 1);
  source_->fill(7);
  RefitTarget part = kWhole;
  for (std::size_t i = 0; i < mixed->names().size(); ++i) {
    const std::string& name = mixed->names()[i];
    if (name != "layers.2.b" && name != "layers.3.h") continue;
    part.selection.push_back(name);
    std::memcpy(mixed->data(i), source_->data(i), source_->bytes(i));
  }
  must(trainer.refit(part, soon()));
  must(sut.poll(soon()));
  EXPECT_TRUE(target_.holds_exactly(*mixed));
}

// Goal: what checks say of each place. Method: a device place that is spoilt behind everybody's
// back is found there and only there; what is not resident is absent, not wrong.
TEST_F(Places, CheckSaysWhichPlaceIsWrong) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(0);
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  Observer observer = make_observer();
  CheckRequest request{"flux", "transformer", DigestKind::raw};
  for (const auto& [name, digest] : digests_of(*source_))
    request.expected.emplace_back(name, digest);
  const auto check = [&](Place place) {
    request.place = place;
    return must(observer.check(request, soon()));
  };
  const auto count = static_cast<std::uint32_t>(request.expected.size());
  CheckReport report = check(Place::all);
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.verified, count);
  EXPECT_EQ(report.absent.size(), count - 5U);
  report = check(Place::device);
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.verified, 5U);
  EXPECT_EQ(report.absent.size(), count - 5U);

  // The first byte of the pool is layer 0's first: tensor layers.0.a.
  target_.pool()->data()[0] ^= std::byte{1};
  EXPECT_TRUE(check(Place::host).ok());
  report = check(Place::device);
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(report.verified, 4U);
  EXPECT_TRUE(report.mismatched.empty());
  EXPECT_EQ(report.device_mismatched, std::vector<std::string>{"layers.0.a"});
  report = check(Place::all);
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(report.verified, count - 1);
  EXPECT_EQ(report.device_mismatched, std::vector<std::string>{"layers.0.a"});

  request.expected = {{"embed", request.expected.front().second},
                      {"nowhere", request.expected.front().second}};
  report = check(Place::device);
  EXPECT_EQ(report.missing, std::vector<std::string>{"nowhere"});
  EXPECT_EQ(report.absent, std::vector<std::string>{"embed"});
}

// Goal: the sentence of the whole feature. Method: a thread moves layers in and out of the device
// all the time; after each of 1,000 refits of other bytes every digest of either place is the
// trainer's, and every byte of host and pool is what it must be, padding and empty places included.
TEST_F(Places, ThousandRefitsUnderPrefetchLeaveBothPlacesRight) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_offloaded(target_);
  Observer observer = make_observer();
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  std::map<std::string, int> seen_on_device;
  std::size_t device_bytes = 0;
  {
    const Prefetcher prefetcher(target_);
    for (std::uint64_t round = 1; round <= 1'000; ++round) {
      source_->fill(100 + round);
      // On a busy machine a thread may not get on for many rounds.
      const int moves = prefetcher.moves();
      while (prefetcher.moves() < moves + 3) std::this_thread::sleep_for(50us);
      const RefitReport report = must(trainer.refit(kWhole, soon()));
      device_bytes += report.device_bytes;
      must(sut.poll(soon()));
      const auto expected = digests_of(*source_);
      const DigestReport all = digest(observer, Place::all);
      ASSERT_EQ(all.version, round + 1);
      ASSERT_EQ(all.tensors.size(), expected.size());
      ASSERT_EQ(wrong(all.tensors, expected), std::vector<std::string>{})
          << "host, round " << round;
      ASSERT_EQ(wrong(all.device, expected), std::vector<std::string>{})
          << "device, round " << round;
      for (const auto& [name, digest] : all.device) ++seen_on_device[name];
      const auto still = target_.still();
      ASSERT_TRUE(target_.holds_exactly(*source_)) << "round " << round;
    }
  }
  EXPECT_GT(device_bytes, 0U);
  EXPECT_EQ(seen_on_device.size(), kLayers * 5) << "not every tensor was ever read on the device";
}

// Goal: a refit that is called off, and one that is refused, let the prefetcher go on.
TEST_F(Places, PrefetchGoesOnAfterARefitThatWasCalledOff) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = must(Engine::connect("flux", options(), soon()));
  must(sut.register_module(target_.spec(), soon()));
  Engine other = must(Engine::connect("slow", options(), soon()));
  OffloadedModel slow("transformer", kLayers, 4);
  must(other.register_module(slow.spec(), soon()));
  {
    // The other engine never answers, so that this one holds still in vain.
    BackgroundRefit refit(trainer, {kWhole, {"slow", "transformer"}}, Deadline::in(500ms));
    EXPECT_FALSE(must(sut.wait(Deadline::in(2s))));
    EXPECT_EQ(code_of(refit.outcome()), Errc::engine_not_ready);
  }
  target_.fetch(3);
  EXPECT_TRUE(target_.resident(3));
}

// Goal: a new daemon is told where the layers are. Method: two modules with layers, so that each
// has its own words; layers move while nobody serves.
TEST_F(Places, OutliveTheDaemon) {
  Engine sut = make_offloaded(target_);
  OffloadedModel other("refiner", kLayers, 4);
  must(sut.register_module(other.spec(), soon()));
  target_.fetch(0);
  other.fetch(1);
  for (std::uint64_t life = 1; life <= 3; ++life) {
    Trainer trainer = make_trainer(*source_);
    auto source = model_of(layered_tensors(kLayers), 40 + life, "refiner");
    must(trainer.register_module(source->spec(), soon()));
    source_->fill(50 + life);
    must(trainer.refit_all({kWhole, {"flux", "refiner"}}, soon()));
    must(sut.poll(soon()));
    EXPECT_TRUE(target_.holds_exactly(*source_)) << "life " << life;
    EXPECT_TRUE(other.holds_exactly(*source)) << "life " << life;
    daemon_->kill_now();
    target_.fetch(life);
    other.drop(life);
    start();
    must(sut.reconnect(soon()));
  }
}

// ---- an engine that says what no library would

class RawPlaces : public Places {
 protected:
  static constexpr std::size_t kPoolBytes = 4096;
  static constexpr std::uint32_t kBase = 17;

  RawPlaces() : trainer_(make_trainer_of_two()) {}

  Trainer make_trainer_of_two() {
    two_ = model_of({{"a", DType::uint8, {64}}, {"b", DType::uint8, {64}}}, 5);
    return make_trainer(*two_);
  }

  /// Two tensors of 64 bytes, each a layer buffer; region 0 is theirs, region 1 the pool.
  RawClient join() {
    RawClient client = RawClient::joined(socket_, Role::engine, "flux");
    const int seals = F_SEAL_SHRINK | F_SEAL_GROW;
    host_fd_ = honest_memfd(4096, seals);
    pool_fd_ = honest_memfd(kPoolBytes, seals);
    client.send_ticket(1, host_fd_.get());
    client.send_ticket(2, pool_fd_.get());
    const auto reply = client.call(wire::Opcode::register_module, message());
    EXPECT_TRUE(reply && reply->code == Errc::ok) << (reply ? reply->message : "no reply");
    return client;
  }
  Bytes message() const {
    std::vector<TensorSpec> tensors{byte_tensor("a", 64), byte_tensor("b", 64)};
    tensors[1].offset_bytes = 64;
    tensors[0].layer_buffer = 0;
    tensors[1].layer_buffer = 1;
    return register_message("transformer", {{1, 4096}, {2, kPoolBytes}}, tensors, {},
                            {{1}, {64, 64}, kBase});
  }
  static std::uint64_t at(std::uint64_t offset, std::uint8_t region = 1) {
    return ResidencyWord{ResidencyState::resident, region, 3, offset}.pack();
  }
  static std::uint64_t away() { return ResidencyWord{ResidencyState::absent, 0, 3, 0}.pack(); }

  /// One refit, which this client's gate lets through with these words.
  Result<RefitReport> refit(RawClient& client, std::uint64_t first, std::uint64_t second) {
    client.request().residency[kBase].store(first);
    client.request().residency[kBase + 1].store(second);
    BackgroundRefit refit(trainer_, {kWhole}, soon());
    EXPECT_TRUE(eventually([&] {
      const GateWord gate = GateWord::unpack(client.response().gate.load());
      return gate.state == GateState::prepare && gate.epoch > answered_;
    }));
    answered_ = GateWord::unpack(client.response().gate.load()).epoch;
    client.request().gate_answer.store(AnswerWord{answered_, AnswerState::ready}.pack());
    client.ring();
    return refit.outcome();
  }
  static std::vector<std::byte> read(int fd, std::size_t bytes) {
    std::vector<std::byte> data(bytes);
    EXPECT_EQ(::pread(fd, data.data(), bytes, 0), static_cast<ssize_t>(bytes));
    return data;
  }

  std::unique_ptr<Model> two_;
  Trainer trainer_;
  UniqueFd host_fd_, pool_fd_;
  std::uint64_t answered_ = 0;
};

// Goal: nothing in a residency word is trusted. Method: each kind of nonsense refuses the refit by
// name with every byte as it was, and the next honest words let it through.
TEST_F(RawPlaces, BadResidencyRefusesTheRefitBeforeTheFirstByte) {
  struct Case {
    std::uint64_t first, second;
    const char* what;
  };
  const std::vector<Case> cases{
      {0, away(), "layer buffer 0 (tensor 'a'): the engine does not say"},
      {away(), 0, "layer buffer 1 (tensor 'b'): the engine does not say"},
      {std::uint64_t{3} << 62, away(), "nonsense"},
      {at(0, 0), away(), "region 0, which is no pool"},
      {at(0, 2), away(), "region 2, which is no pool"},
      {at(0, 63), away(), "region 63, which is no pool"},
      {at(kPoolBytes - 32), away(), "which has 4096 bytes"},
      {at(kPoolBytes), away(), "which has 4096 bytes"},
      {at(ResidencyWord::kOffsetMax), away(), "which has 4096 bytes"},
      {at(ResidencyWord::kOffsetMax - 31), away(), "which has 4096 bytes"},
      {at(8), away(), "no multiple of 32"},
      {at(0), at(0), "in the same bytes"},
      {at(64), at(32), "in the same bytes"},
      {at(64), at(96), "in the same bytes"}};
  RawClient sut = join();
  for (const Case& bad : cases) {
    const auto host = read(host_fd_.get(), 4096);
    const auto pool = read(pool_fd_.get(), kPoolBytes);
    const auto refused = refit(sut, bad.first, bad.second);
    EXPECT_EQ(code_of(refused), Errc::bad_region) << bad.what;
    EXPECT_NE(text_of(refused).find("flux/transformer"), std::string::npos) << text_of(refused);
    EXPECT_NE(text_of(refused).find(bad.what), std::string::npos) << text_of(refused);
    EXPECT_EQ(read(host_fd_.get(), 4096), host) << bad.what;
    EXPECT_EQ(read(pool_fd_.get(), kPoolBytes), pool) << bad.what;
  }
  const auto taken = refit(sut, at(64), at(128));
  ASSERT_TRUE(taken) << text_of(taken);
  EXPECT_EQ(taken->device_bytes, 128U);
  const auto pool = read(pool_fd_.get(), kPoolBytes);
  EXPECT_EQ(std::memcmp(pool.data() + 64, two_->data(0), 64), 0);
  EXPECT_EQ(std::memcmp(pool.data() + 128, two_->data(1), 64), 0);
  EXPECT_EQ(pool[63], std::byte{0});
  EXPECT_EQ(pool[192], std::byte{0});
}

// Goal: a digest of a place that the engine lies about is an error, not a digest.
TEST_F(RawPlaces, DigestOfABadPlaceIsRefused) {
  RawClient sut = join();
  Observer observer = make_observer();
  DigestRequest request{"flux", "transformer", DigestKind::raw};
  request.place = Place::device;
  sut.request().residency[kBase].store(at(8));
  sut.request().residency[kBase + 1].store(away());
  const auto refused = observer.digest(request, soon());
  EXPECT_EQ(code_of(refused), Errc::bad_region);
  EXPECT_NE(text_of(refused).find("no multiple of 32"), std::string::npos) << text_of(refused);
  sut.request().residency[kBase].store(at(32));
  const DigestReport report = must(observer.digest(request, soon()));
  EXPECT_EQ(report.device.size(), 1U);
  EXPECT_EQ(report.absent, std::vector<std::string>{"b"});
}

}  // namespace
}  // namespace refit::test
