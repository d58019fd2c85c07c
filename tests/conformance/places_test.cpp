// What is said of the places of layers: to a daemon that comes after another, and by a client that
// says what no library would, written by hand.
//
// What a refit makes of them is in offload_test.cpp.

#include <fcntl.h>

#include "ipc/residency_word.hpp"
#include "ipc/state_word.hpp"
#include "support/daemon_test.hpp"
#include "support/offloaded_model.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kLayers = 6;

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

  std::unique_ptr<Model> source_;
  OffloadedModel target_{"transformer", kLayers, 4};
};

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
