// Device memory that is none, is somebody else's, or is gone: refused by name before the first byte
// moves, by the library where it can tell and by the daemon whatever a client says.
//
// After every attack the target's digests are what they were, an honest trainer and engine beside
// it are refitted, and the daemon is the same process. What no library would say comes from a raw
// client.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <functional>
#include <thread>

#include "conformance/refit_fixture.hpp"
#include "memory/device_sharing.hpp"
#include "support/bystander.hpp"
#include "support/cuda/device_storage.hpp"
#include "support/cuda/exporter.hpp"
#include "support/other_user.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr std::uint64_t kTensorBytes = 64;

/// What a client says of its device memory; each test spoils one part.
struct Claim {
  RegionKind kind = RegionKind::cuda_legacy;
  std::uint64_t bytes = 0;
  std::uint64_t allocation = 0;
  DeviceUuid device;
  struct Piece {
    std::uint64_t bytes = 0;
    std::vector<std::uint8_t> handle;
    int fd = -1;
  };
  std::vector<Piece> pieces;
  std::vector<std::uint8_t> event;
};

Claim honest(const Exported& from) {
  Claim claim{from.kind, from.bytes, from.pieces.front().allocation_id, from.device, {}, {}};
  for (const DevicePiece& piece : from.pieces) {
    auto& one = claim.pieces.emplace_back();
    one.bytes = piece.bytes;
    if (from.kind == RegionKind::cuda_legacy)
      one.handle.assign(piece.handle.begin(), piece.handle.end());
    one.fd = piece.fd.get();
  }
  return claim;
}

Bytes register_device(const Claim& claim) {
  flatbuffers::FlatBufferBuilder fbb;
  std::vector<flatbuffers::Offset<wire::DevicePiece>> pieces;
  for (std::size_t i = 0; i < claim.pieces.size(); ++i) {
    pieces.push_back(wire::CreateDevicePiece(fbb, claim.pieces[i].bytes, 1 + i,
                                             fbb.CreateVector(claim.pieces[i].handle)));
  }
  const auto device = fbb.CreateVector(claim.device.bytes.data(), claim.device.bytes.size());
  const auto piece_list = fbb.CreateVector(pieces);
  std::vector<flatbuffers::Offset<wire::Region>> regions{
      wire::CreateRegion(fbb, 0, claim.bytes, false, static_cast<wire::RegionKind>(claim.kind),
                         device, piece_list, claim.allocation)};
  const auto tensor_name = fbb.CreateString("t");
  const auto shape = fbb.CreateVector(std::vector<std::uint64_t>{kTensorBytes});
  std::vector<flatbuffers::Offset<wire::Tensor>> tensors{wire::CreateTensor(
      fbb, tensor_name, static_cast<std::uint8_t>(DType::uint8), shape, 0, 0, 0)};
  const auto name = fbb.CreateString("transformer");
  const auto region_list = fbb.CreateVector(regions);
  const auto tensor_list = fbb.CreateVector(tensors);
  flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> event;
  flatbuffers::Offset<flatbuffers::Vector<std::uint8_t>> event_device;
  if (!claim.event.empty()) {
    event = fbb.CreateVector(claim.event);
    event_device = fbb.CreateVector(claim.device.bytes.data(), claim.device.bytes.size());
  }
  fbb.Finish(wire::CreateRegisterModule(fbb, name, region_list, tensor_list, 0, 0, nullptr, false,
                                        0, false, 0, 0, event, event_device));
  return {fbb.GetBufferPointer(), fbb.GetBufferPointer() + fbb.GetSize()};
}

class BadDeviceMemory : public Refit {
 protected:
  BadDeviceMemory() { target_.fill(2); }

  void SetUp() override {
    engine_.emplace(make_engine("flux", target_));
    before_ = digests("flux", "transformer");
  }
  void TearDown() override {
    EXPECT_EQ(digests("flux", "transformer"), before_) << "bytes moved";
    bystander_.goes_on();
    // What was refused left nothing behind that would stand in the way of what is right.
    Model source("transformer", small_tensors());
    source.fill(8);
    Trainer trainer = make_trainer(source);
    const WaitingEngine waiting(*engine_);
    const auto report = trainer.refit(kWhole, soon());
    EXPECT_TRUE(report) << text_of(report);
    EXPECT_TRUE(target_.equals(source));
  }

  static DeviceKind kind() {
    return GetParam() == MemoryKind::cuda_legacy ? DeviceKind::legacy : DeviceKind::vmm;
  }
  /// Memory of this test, and what its client would say of it.
  struct Shared {
    DeviceAllocation memory{kind(), 0, kTensorBytes * 64};
    std::shared_ptr<SharedDeviceMemory> shared =
        must(share_device_memory(memory.pointer(), memory.bytes(), "the test's"));
    [[nodiscard]] Claim claim() const { return honest(shared->exported()); }
  };

  /// Sends a claim as an engine, and expects a refusal that says all of `parts`.
  void expect_refused(const Claim& claim, Errc code, const std::vector<std::string>& parts) {
    RawClient client = RawClient::joined(socket_, Role::engine, "wrong");
    for (std::size_t i = 0; i < claim.pieces.size(); ++i) {
      if (claim.pieces[i].fd >= 0) client.send_ticket(1 + i, claim.pieces[i].fd);
    }
    const auto reply = client.call(wire::Opcode::register_module, register_device(claim));
    ASSERT_TRUE(reply) << "no reply";
    std::string text = reply->message;
    for (const std::string& line : reply->details) text += "\n" + line;
    EXPECT_EQ(reply->code, code) << text;
    for (const std::string& part : parts)
      EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
  }

  Bystander bystander_{socket_, daemon_.pid()};
  Model target_{"transformer", small_tensors()};
  std::optional<Engine> engine_;
  std::map<std::string, std::string> before_;
};

// ---- what the library refuses

template <typename T>
void expect_bad_region(const Result<T>& result, const std::string& part) {
  EXPECT_EQ(code_of(result), Errc::bad_region) << text_of(result);
  EXPECT_NE(text_of(result).find(part), std::string::npos) << text_of(result);
}

TEST_P(BadDeviceMemory, HostPointersAreRefusedByTheLibrary) {
  std::vector<std::byte> pageable(4096);
  expect_bad_region(DeviceMemory::share(pageable.data(), pageable.size(), "weights"),
                    "no CUDA memory");
  const cuda::Current current(0);
  void* pinned = nullptr;
  cuda::must(cuda::Driver::get().cuMemHostAlloc(&pinned, 4096, 0), "cuMemHostAlloc");
  expect_bad_region(DeviceMemory::share(pinned, 4096, "weights"), "pinned host memory");
  cuda::must(cuda::Driver::get().cuMemFreeHost(pinned), "cuMemFreeHost");
}

TEST_P(BadDeviceMemory, ManagedMemoryIsRefusedByTheLibrary) {
  const cuda::Current current(0);
  CUdeviceptr managed = 0;
  cuda::must(cuda::Driver::get().cuMemAllocManaged(&managed, 4096, CU_MEM_ATTACH_GLOBAL),
             "cuMemAllocManaged");
  expect_bad_region(DeviceMemory::share(reinterpret_cast<void*>(managed), 4096, "weights"),
                    "managed memory");
  cuda::must(cuda::Driver::get().cuMemFree(managed), "cuMemFree");
}

TEST_P(BadDeviceMemory, SegmentsWithoutAShareableHandleAreRefusedByTheLibrary) {
  const DeviceAllocation memory(DeviceKind::vmm, 0, 4096, /*shareable=*/false);
  expect_bad_region(DeviceMemory::share(memory.pointer(), 4096, "weights"),
                    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR");
}

TEST_P(BadDeviceMemory, MoreThanTheAllocationIsRefusedByTheLibrary) {
  const DeviceAllocation memory(kind(), 0, 4096);
  expect_bad_region(DeviceMemory::share(memory.pointer(), memory.bytes() + 1, "weights"),
                    "lie in its allocation");
}

// Goal: memory that was freed and allocated anew at its old address is other memory.
TEST_P(BadDeviceMemory, AnAddressThatIsAllocatedAnewIsRefusedByTheLibrary) {
  const auto reuse_addresses = [](bool on) {
    if (!cuda::Driver::fake()) return;  // a real driver does as it likes
    ::setenv("FAKECUDA_REUSE_ADDRESSES", on ? "1" : "0", 1);
    cuda::Driver::fake()->reload();
  };
  reuse_addresses(true);
  ModuleSpec spec("vae");
  auto memory = std::make_unique<DeviceAllocation>(kind(), 0, 4096);
  std::byte* const address = memory->pointer();
  const auto shared = must(DeviceMemory::share(address, 4096, "weights"));
  must(spec.add("t", DType::uint8, {64}, shared, address));
  memory.reset();
  expect_bad_region(engine_->register_module(spec, soon()), "");
  memory = std::make_unique<DeviceAllocation>(kind(), 0, 4096);
  if (memory->pointer() != address) REFIT_FAKE_ONLY("this driver takes another address then");
  ASSERT_EQ(memory->pointer(), address) << "the driver did not use the address again";
  expect_bad_region(engine_->register_module(spec, soon()), "has been freed");
  reuse_addresses(false);
}

// ---- what the daemon refuses

TEST_P(BadDeviceMemory, GarbageHandlesAreRefused) {
  const Shared mine;
  for (int byte = 0; byte < 256; byte += 85) {
    Claim claim = mine.claim();
    claim.kind = RegionKind::cuda_legacy;
    claim.pieces.resize(1);
    claim.pieces[0].bytes = claim.bytes;
    claim.pieces[0].handle.assign(64, static_cast<std::uint8_t>(byte));
    expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0", "cuIpcOpenMemHandle"});
  }
}

TEST_P(BadDeviceMemory, FdsThatAreNoDeviceMemoryAreRefused) {
  const Shared mine;
  constexpr std::uint64_t kSegment = 2 << 20;  // no other size is a segment's on a real device
  const UniqueFd memfd = honest_memfd(kSegment, 0);
  const UniqueFd null = UniqueFd::adopt(::open("/dev/null", O_RDWR | O_CLOEXEC));
  for (const int fd : {memfd.get(), null.get()}) {
    Claim claim = mine.claim();
    claim.kind = RegionKind::cuda_vmm;
    claim.bytes = kSegment;
    claim.pieces.assign(1, {claim.bytes, {}, fd});
    expect_refused(claim, Errc::bad_region,
                   {"wrong/transformer: region 0", "cuMemImportFromShareableHandle"});
  }
}

/// A socket whose last close waits for a peer that does not read.
struct LingeringSocket {
  LingeringSocket() {
    const UniqueFd listener = UniqueFd::adopt(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* const name = reinterpret_cast<sockaddr*>(&address);
    EXPECT_EQ(::bind(listener.get(), name, length), 0);
    EXPECT_EQ(::listen(listener.get(), 1), 0);
    EXPECT_EQ(::getsockname(listener.get(), name, &length), 0);
    near = UniqueFd::adopt(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    EXPECT_EQ(::connect(near.get(), name, length), 0);
    far = UniqueFd::adopt(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const linger patience{1, 600};
    EXPECT_EQ(::setsockopt(near.get(), SOL_SOCKET, SO_LINGER, &patience, sizeof patience), 0);
    const std::vector<char> bytes(1 << 16);
    while (::send(near.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
    }
  }
  UniqueFd near;
  UniqueFd far;
};

// Goal: an fd whose close takes for ever holds nobody up. Method: more of them than there are
// threads that make memory ready; an honest module is registered beside them.
TEST_P(BadDeviceMemory, FdsThatCannotBeClosedHoldNobodyUp) {
  const Shared mine;
  std::vector<LingeringSocket> sockets(std::thread::hardware_concurrency() + 1);
  for (LingeringSocket& socket : sockets) {
    Claim claim = mine.claim();
    claim.kind = RegionKind::cuda_vmm;
    claim.bytes = 1 << 20;
    claim.pieces.assign(1, {claim.bytes, {}, -1});
    RawClient client = RawClient::joined(socket_, Role::engine, "wrong");
    client.send_ticket(1, socket.near.get());
    socket.near.reset();  // the daemon's is the last one
    const auto reply = client.call(wire::Opcode::register_module, register_device(claim));
    ASSERT_TRUE(reply) << "no reply";
    EXPECT_EQ(reply->code, Errc::bad_region) << reply->message;
  }
  Model honest("vae", small_tensors());
  EXPECT_TRUE(engine_->register_module(honest.spec(), soon()));
}

TEST_P(BadDeviceMemory, MoreBytesThanTheAllocationHasAreRefused) {
  const Shared mine;
  Claim claim = mine.claim();
  // A multiple of what segments are multiples of, and more than a small allocation's block.
  claim.bytes += 64 << 20;
  claim.pieces.back().bytes += 64 << 20;
  expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0"});
  // More than any device has: no address space is reserved for that.
  claim = mine.claim();
  claim.bytes += std::uint64_t{1} << 40;
  claim.pieces.back().bytes += std::uint64_t{1} << 40;
  expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0"});
}

TEST_P(BadDeviceMemory, DevicesThatTheDaemonDoesNotSeeAreRefused) {
  const Shared mine;
  Claim claim = mine.claim();
  claim.device.bytes.fill(0xab);
  expect_refused(claim, Errc::bad_region,
                 {"wrong/transformer: region 0", "does not see", "CUDA_VISIBLE_DEVICES"});
}

TEST_P(BadDeviceMemory, MemoryOfSeveralDevicesThatIsOfAnotherThanIsSaidIsRefused) {
  REFIT_NEEDS_DEVICES(2);
  const Shared mine;
  const DeviceAllocation other(kind(), 1, kTensorBytes);
  const auto other_shared = must(share_device_memory(other.pointer(), kTensorBytes, "the test's"));
  Claim claim = mine.claim();
  claim.device = other_shared->exported().device;
  expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0", "another device"});
}

TEST_P(BadDeviceMemory, AnAddressOfTheClientItselfIsRefused) {
  const Shared mine;
  Claim claim = mine.claim();
  claim.kind = RegionKind::cuda_local;
  claim.pieces.resize(1);
  claim.pieces[0].bytes = claim.bytes;
  claim.pieces[0].handle.assign(8, 0x11);
  expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0", "this very process"});
}

TEST_P(BadDeviceMemory, GarbageEventsAreRefusedAndTheMemoryIsLetGo) {
  const Shared mine;
  for (int byte = 0; byte < 256; byte += 85) {
    Claim claim = mine.claim();
    claim.event.assign(64, static_cast<std::uint8_t>(byte));
    expect_refused(claim, Errc::bad_argument, {"wrong/transformer"});
  }
  if (!cuda::Driver::fake()) return;  // what the daemon holds is not to be seen
  auto report = fakecuda::ProcessReport::open(std::getenv("FAKECUDA_DIR"), daemon_.pid());
  ASSERT_TRUE(report);
  Model again("transformer", small_tensors());
  EXPECT_TRUE(eventually([&] {
    // The target's own three pieces.
    return (*report)->gauge(fakecuda::Gauge::imports) +
               (*report)->gauge(fakecuda::Gauge::mappings) ==
           3;
  })) << (*report)->gauge(fakecuda::Gauge::imports)
      << ", " << (*report)->gauge(fakecuda::Gauge::mappings);
}

TEST_P(BadDeviceMemory, MemoryOfAProcessThatDiedIsRefused) {
  CudaExporter exporter;
  const Claim claim = honest(exporter.exported());
  exporter.kill_now();
  expect_refused(claim, Errc::bad_region, {"wrong/transformer: region 0", "cuIpcOpenMemHandle"});
}

// ---- what is honest, at a bad moment

// Goal: a trainer whose device work never ends does not hold an engine, which would be `writing`
// until its own death. Method: its process is stopped with the work queued; the refit runs into its
// deadline.
TEST_P(BadDeviceMemory, WorkThatNeverEndsIsNotWaitedForInTheMiddleOfWriting) {
  CudaExporter trainer;
  trainer.stop_now();
  Model target("transformer", {{"t", DType::uint8, {kTensorBytes}}});
  target.fill(3);
  Engine engine = make_engine("held", target);
  const auto before = digests("held", "transformer");
  RawClient client = RawClient::joined(socket_, Role::trainer, "hung");
  Claim claim = honest(trainer.exported());
  claim.event.assign(trainer.event().begin(), trainer.event().end());
  const auto taken = client.call(wire::Opcode::register_module, register_device(claim));
  ASSERT_TRUE(taken && taken->code == Errc::ok) << (taken ? taken->message : "no reply");
  {
    const WaitingEngine waiting(engine);
    const auto reply = client.call(
        wire::Opcode::refit,
        refit_message(TransactionId::random(), {{"held", "transformer", "transformer"}}, 500'000));
    ASSERT_TRUE(reply) << "no reply";
    EXPECT_EQ(reply->code, Errc::engine_not_ready) << reply->message;
    for (const char* part : {"fence of hung/transformer", "nothing was changed"})
      EXPECT_NE(reply->message.find(part), std::string::npos) << reply->message;
  }
  must(engine.poll(soon()));
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_EQ(engine.state("transformer"), ModuleState::initial);
  EXPECT_EQ(digests("held", "transformer"), before);
}

// Goal: an engine may register other memory whenever it likes: a refit is of the one or of the
// other, or is called off. Method: refits run all the time while the module moves between two
// models; what was committed last is in the one that is registered.
TEST_P(BadDeviceMemory, ModulesThatAreRegisteredAnewUnderRefitsAreWholeOrUntouched) {
  Model source("transformer", small_tensors());
  Model first("transformer", small_tensors());
  Model second("transformer", small_tensors());
  source.fill(4);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("moving", first);
  std::atomic<bool> stop{false};
  std::atomic<bool> done{false};
  std::atomic<int> committed{0};
  std::thread refits([&] {
    while (!stop.load()) {
      const auto report = trainer.refit({"moving", "transformer"}, soon());
      if (report) {
        ++committed;
      } else {
        const Errc code = report.error().code;
        EXPECT_TRUE(code == Errc::engine_not_ready || code == Errc::busy ||
                    code == Errc::no_such_module)
            << report.error().to_string();
      }
    }
    done.store(true);
  });
  int moves = 0;
  for (int i = 0; i < 60; ++i) {
    Model& next = i % 2 == 0 ? second : first;
    // Sometimes with a refit at the gate, sometimes between two.
    for (int polls = 0; polls < i % 5; ++polls) must(engine.poll(soon()));
    const auto moved = engine.register_module(next.spec(), soon());
    ASSERT_TRUE(moved || code_of(moved) == Errc::busy) << text_of(moved);
    if (!moved) continue;
    ++moves;
    const int before = committed.load();
    ASSERT_TRUE(eventually([&] {
      must(engine.poll(soon()));
      return committed.load() > before + 1;
    }));
    EXPECT_TRUE(next.equals(source));
  }
  stop.store(true);
  while (!done.load()) must(engine.poll(soon()));
  refits.join();
  EXPECT_GT(moves, 10);
}

INSTANTIATE_TEST_SUITE_P(Memory, BadDeviceMemory, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

// ---- whose it is

/// Without memory of its own: the other user is forked, and no driver survives that.
class ForeignDeviceMemory : public Refit {
 protected:
  void SetUp() override {
    if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can be several users";
    ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
    ASSERT_EQ(::chmod(socket_.c_str(), 0666), 0);
  }
};

// Goal: a legacy handle is a bearer secret; one of another user is not even tried.
// Method: the handle is honest, of a process of this user; the session that brings it is not.
TEST_P(ForeignDeviceMemory, LegacyHandlesOfAnotherUserAreRefused) {
  constexpr uid_t kStranger = 12345;
  CudaExporter exporter;
  const Bytes message = register_device(honest(exporter.exported()));
  OtherUser stranger(kStranger, {kStranger}, [&](OtherUser::Talk& talk) {
    RawClient client = RawClient::joined(socket_, Role::engine, "foreign");
    const auto reply = client.call(wire::Opcode::register_module, message);
    talk.say(reply ? std::string(errc_name(reply->code)) + ": " + reply->message : "no reply");
  });
  const std::string answer = stranger.hear();
  EXPECT_EQ(answer.rfind("permission: ", 0), 0U) << answer;
  for (const char* part : {"foreign/transformer: region 0", "12345", "cuda.legacy_across_uids"})
    EXPECT_NE(answer.find(part), std::string::npos) << part << " is not in: " << answer;
  if (!cuda::Driver::fake()) return;
  const auto report = fakecuda::ProcessReport::open(std::getenv("FAKECUDA_DIR"), daemon_.pid());
  ASSERT_TRUE(report);
  EXPECT_EQ((*report)->calls_of("cuIpcOpenMemHandle"), 0U);
}

INSTANTIATE_TEST_SUITE_P(Memory, ForeignDeviceMemory, ::testing::Values(MemoryKind::cuda_legacy),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
