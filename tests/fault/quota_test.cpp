// What one uid may use: each limit refuses by name at its bound, says which setting it is, and
// leaves the other uid alone.
//
// Two real uids: the child is at its limit, the test itself (root) refits beside it. Needs root;
// says so where it cannot run, which is no pass.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <deque>
#include <fstream>

#include "support/bystander.hpp"
#include "support/daemon_test.hpp"
#include "support/other_user.hpp"
#include "support/raw_client.hpp"

namespace refit::test {
namespace {

constexpr uid_t kGreedy = 12345;
constexpr const char* kOk = "ok: ";

class Quota : public DaemonTest {
 protected:
  void SetUp() override {
    if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can be several users";
  }
  /// Runs `greedy` as another uid under `limits`; what it says must be a refusal that names
  /// `setting`, `numbers` and the file. While the greedy one holds what it has, the other uid
  /// connects, registers and refits.
  void expect_refused(const std::string& limits, const std::string& setting,
                      const std::vector<std::string>& numbers,
                      const std::function<std::string()>& greedy) {
    const std::string file = directory_.path() + "/refitd.toml";
    std::ofstream(file) << "[limits]\n" << limits;
    DaemonOptions how;
    how.arguments = {"--config", file};
    start(how);
    ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
    ASSERT_EQ(::chmod(socket_.c_str(), 0666), 0);
    OtherUser sut(kGreedy, {kGreedy}, [&](OtherUser::Talk& talk) {
      talk.say(greedy());
      ::pause();
    });
    const std::string answer = sut.hear();
    EXPECT_NE(answer.find("uid 12345"), std::string::npos) << answer;
    EXPECT_NE(answer.find("limits." + setting + " in " + file), std::string::npos) << answer;
    for (const std::string& number : numbers)
      EXPECT_NE(answer.find(number), std::string::npos) << number << " is not in: " << answer;
    Bystander bystander(socket_, daemon_->pid());
    bystander.goes_on();
  }
  static std::string text_of(const std::optional<RawClient::Reply>& reply) {
    if (!reply) return "no reply";
    std::string text = std::string(errc_name(reply->code)) + ": " + reply->message;
    for (const std::string& line : reply->details) text += " | " + line;
    return text;
  }
  /// Registers a module of `regions` regions of `bytes` each, with `tensors` tensors in the first.
  std::string register_one(RawClient& client, const std::string& module, std::size_t regions,
                           std::uint64_t bytes, std::size_t tensors) {
    std::vector<RawRegion> claims;
    for (std::size_t i = 0; i < regions; ++i) {
      const UniqueFd fd = honest_memfd(bytes, F_SEAL_SHRINK);
      client.send_ticket(++ticket_, fd.get());
      claims.push_back({ticket_, bytes});
    }
    std::vector<TensorSpec> specs;
    for (std::size_t i = 0; i < tensors; ++i)
      specs.push_back(byte_tensor("t" + std::to_string(i), 1));
    return text_of(
        client.call(wire::Opcode::register_module, register_message(module, claims, specs)));
  }
  RawClient& join(const std::string& name = "greedy") {
    kept_.push_back(RawClient::joined(socket_, Role::trainer, name));
    return kept_.back();
  }

  std::deque<RawClient> kept_;
  std::uint64_t ticket_ = 100;
};

TEST_F(Quota, Sessions) {
  expect_refused("sessions_per_uid = 3\n", "sessions_per_uid", {"3 of 3 sessions", "1 more"}, [&] {
    for (int i = 0; i < 3; ++i) join();
    RawClient sut(socket_);
    sut.hello(Role::trainer, "fourth");
    return sut.answer().message;
  });
}

TEST_F(Quota, Regions) {
  expect_refused("regions_per_uid = 5\n", "regions_per_uid", {"4 of 5 regions", "2 more"}, [&] {
    std::string made = register_one(join(), "a", 2, 4096, 1);
    if (made == kOk) made = register_one(join(), "a", 2, 4096, 1);
    // Replacing a module takes only what is more than it had.
    if (made == kOk) made = register_one(kept_.back(), "a", 3, 4096, 1);
    if (made == kOk) made = register_one(kept_.back(), "a", 2, 4096, 1);
    return made != kOk ? made : register_one(join(), "b", 2, 4096, 1);
  });
}

TEST_F(Quota, RegisteredBytes) {
  expect_refused("registered_bytes_per_uid = \"16 MiB\"\n", "registered_bytes_per_uid",
                 {"12582912 of 16777216 registered bytes", "8388608 more"}, [&] {
                   const std::string made = register_one(join(), "a", 1, 12 << 20, 1);
                   return made != kOk ? made : register_one(join(), "a", 1, 8 << 20, 1);
                 });
}

TEST_F(Quota, Tensors) {
  expect_refused("tensors_per_uid = 20\n", "tensors_per_uid", {"17 of 20 tensors", "4 more"}, [&] {
    const std::string made = register_one(join(), "a", 1, 4096, 17);
    return made != kOk ? made : register_one(join(), "a", 1, 4096, 4);
  });
}

TEST_F(Quota, TensorsOfOneModule) {
  expect_refused("tensors_per_module = 10\n", "tensors_per_module", {"0 of 10", "11 more"}, [&] {
    const std::string made = register_one(join(), "a", 1, 4096, 10);
    return made != kOk ? made : register_one(kept_.back(), "b", 1, 4096, 11);
  });
}

// The socket has no answers: the request that names the fd gets the refusal.
TEST_F(Quota, UnclaimedFds) {
  expect_refused("unclaimed_fds_per_uid = 6\n", "unclaimed_fds_per_uid",
                 {"6 of 6 unclaimed fds", "1 more"}, [&] {
                   const UniqueFd fd = honest_memfd(4096, F_SEAL_SHRINK);
                   for (int i = 0; i < 2; ++i) {
                     RawClient& client = join();
                     for (std::uint64_t ticket = 1; ticket <= 3; ++ticket)
                       client.send_ticket(ticket, fd.get());
                     // Claims an unknown ticket, so that the daemon reads the socket before it
                     // answers.
                     client.call(wire::Opcode::register_module,
                                 register_message("a", {{99, 4096}}, {byte_tensor("t", 1)}));
                   }
                   return register_one(join(), "a", 1, 4096, 1);
                 });
}

// Goal: requests that wait for an engine count until they are answered. Method: the greedy uid's
// own engine never answers its gate, so that all of its refits wait.
TEST_F(Quota, UnansweredRequests) {
  expect_refused("requests_per_uid = 5\n", "requests_per_uid",
                 {"5 of 5 unanswered requests", "1 more"}, [&] {
                   kept_.push_back(RawClient::joined(socket_, Role::engine, "deaf"));
                   std::string made = register_one(kept_.back(), "m", 1, 4096, 1);
                   RawClient& first = join();
                   if (made == kOk) made = register_one(first, "m", 1, 4096, 1);
                   RawClient& second = join();
                   if (made == kOk) made = register_one(second, "m", 1, 4096, 1);
                   if (made != kOk) return made;
                   const auto refit = [](RawClient& client, std::uint64_t id) {
                     client.post(wire::Opcode::refit, refit_message({1, id}, {{"deaf", "m", "m"}}));
                   };
                   refit(second, 1);
                   refit(second, 2);
                   second.call(wire::Opcode::ping, empty_message());  // both were taken
                   for (std::uint64_t id = 3; id <= 5; ++id) refit(first, id);
                   return text_of(first.call(wire::Opcode::ping, empty_message()));
                 });
}

}  // namespace
}  // namespace refit::test
