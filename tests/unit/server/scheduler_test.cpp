// Which operation may touch which engine: alone, shared, in the order of arrival, and never stuck.

#include "server/scheduler.hpp"

#include <gtest/gtest.h>
#include <sys/socket.h>

#include <functional>
#include <string>

namespace refit::daemon {
namespace {

class Fake final : public Operation {
 public:
  Fake(std::string name, bool alone, std::vector<std::shared_ptr<Session>> wanted,
       std::vector<std::string>& log)
      : name_(std::move(name)), alone_(alone), log_(log) {
    engines = std::move(wanted);
  }
  [[nodiscard]] bool exclusive() const noexcept override { return alone_; }
  [[nodiscard]] bool runnable() const override { return ready; }
  void start() override {
    log_.push_back(name_);
    if (on_start) on_start();
  }

  bool ready = true;
  std::function<void()> on_start;

 private:
  std::string name_;
  bool alone_;
  std::vector<std::string>& log_;
};

class SchedulerTest : public ::testing::Test {
 protected:
  using Log = std::vector<std::string>;

  static std::shared_ptr<Session> engine(const std::string& name) {
    int ends[2] = {-1, -1};
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends), 0);
    auto session = Session::open(1, UniqueFd::adopt(ends[0]), {}, {}, Role::engine, name,
                                 Waiting::off, ends[1]);
    ::close(ends[1]);
    EXPECT_TRUE(session);
    return *session;
  }
  Fake alone(const std::string& name, std::vector<std::shared_ptr<Session>> wanted) {
    return {name, true, std::move(wanted), log_};
  }
  Fake sharing(const std::string& name, std::vector<std::shared_ptr<Session>> wanted) {
    return {name, false, std::move(wanted), log_};
  }

  std::shared_ptr<Session> a_ = engine("a");
  std::shared_ptr<Session> b_ = engine("b");
  Log log_;
  Scheduler sut_;
};

TEST_F(SchedulerTest, StartsAtOnceWhatFindsItsEngineFree) {
  Fake refit = alone("refit", {a_});
  sut_.enqueue(refit);
  EXPECT_EQ(log_, Log{"refit"});
}

TEST_F(SchedulerTest, KeepsTwoRefitsOfOneEngineApartAndInOrder) {
  Fake first = alone("first", {a_});
  Fake second = alone("second", {a_});
  Fake third = alone("third", {a_});
  sut_.enqueue(first);
  sut_.enqueue(second);
  sut_.enqueue(third);
  EXPECT_EQ(log_, Log{"first"});
  sut_.leave(first);
  EXPECT_EQ(log_, (Log{"first", "second"}));
  sut_.leave(second);
  EXPECT_EQ(log_, (Log{"first", "second", "third"}));
}

TEST_F(SchedulerTest, RunsDisjointEnginesInParallel) {
  Fake first = alone("first", {a_});
  Fake second = alone("second", {b_});
  sut_.enqueue(first);
  sut_.enqueue(second);
  EXPECT_EQ(log_, (Log{"first", "second"}));
}

TEST_F(SchedulerTest, LetsChecksShareAnEngineAndARefitWaitForAllOfThem) {
  Fake check = sharing("check", {a_});
  Fake other = sharing("other", {a_});
  Fake refit = alone("refit", {a_});
  sut_.enqueue(check);
  sut_.enqueue(other);
  sut_.enqueue(refit);
  EXPECT_EQ(log_, (Log{"check", "other"}));
  sut_.leave(check);
  EXPECT_EQ(log_, (Log{"check", "other"}));
  sut_.leave(other);
  EXPECT_EQ(log_, (Log{"check", "other", "refit"}));
}

// Goal: a stream of checks cannot starve a refit. Method: a check that comes after a waiting refit
// waits behind it, although it could share.
TEST_F(SchedulerTest, CheckBehindAWaitingRefitDoesNotOvertakeIt) {
  Fake check = sharing("check", {a_});
  Fake refit = alone("refit", {a_});
  Fake late = sharing("late", {a_});
  sut_.enqueue(check);
  sut_.enqueue(refit);
  sut_.enqueue(late);
  EXPECT_EQ(log_, Log{"check"});
  sut_.leave(check);
  EXPECT_EQ(log_, (Log{"check", "refit"}));
  sut_.leave(refit);
  EXPECT_EQ(log_, (Log{"check", "refit", "late"}));
}

TEST_F(SchedulerTest, TakesAllEnginesOrNone) {
  Fake first = alone("first", {b_});
  Fake both = alone("both", {a_, b_});
  Fake later = alone("later", {a_});
  sut_.enqueue(first);
  sut_.enqueue(both);
  sut_.enqueue(later);
  EXPECT_EQ(log_, Log{"first"}) << "`later` must not take an engine that `both` waits for";
  EXPECT_FALSE(a_->lock.exclusive);
  sut_.leave(first);
  EXPECT_EQ(log_, (Log{"first", "both"}));
  sut_.leave(both);
  EXPECT_EQ(log_, (Log{"first", "both", "later"}));
}

TEST_F(SchedulerTest, WhatIsNotRunnableYetKeepsItsPlaceUntilItIs) {
  Fake populating = alone("populating", {a_});
  populating.ready = false;
  Fake behind = alone("behind", {a_});
  Fake elsewhere = alone("elsewhere", {b_});
  sut_.enqueue(populating);
  sut_.enqueue(behind);
  sut_.enqueue(elsewhere);
  EXPECT_EQ(log_, Log{"elsewhere"});
  populating.ready = true;
  sut_.advance();
  EXPECT_EQ(log_, (Log{"elsewhere", "populating"}));
}

TEST_F(SchedulerTest, OneThatGivesUpLetsTheNextGo) {
  Fake first = alone("first", {a_});
  Fake tired = alone("tired", {a_, b_});
  Fake next = alone("next", {b_});
  sut_.enqueue(first);
  sut_.enqueue(tired);
  sut_.enqueue(next);
  EXPECT_EQ(log_, Log{"first"});
  sut_.withdraw(tired);
  EXPECT_EQ(log_, (Log{"first", "next"}));
  EXPECT_TRUE(a_->lock.exclusive);
}

// Goal: an operation that ends inside its own start neither recurses nor loses those behind it.
TEST_F(SchedulerTest, OperationsThatEndAtOnceLetAllOthersStartInOrder) {
  std::vector<std::unique_ptr<Fake>> many;
  Fake first = alone("first", {a_});
  sut_.enqueue(first);
  Log expected{"first"};
  for (int i = 0; i < 100; ++i) {
    const std::string name = std::to_string(i);
    many.push_back(std::make_unique<Fake>(alone(name, {a_})));
    Fake& one = *many.back();
    one.on_start = [this, &one] { sut_.leave(one); };
    sut_.enqueue(one);
    expected.push_back(name);
  }
  sut_.leave(first);
  EXPECT_EQ(log_, expected);
  EXPECT_FALSE(a_->lock.exclusive);
  EXPECT_FALSE(a_->lock.blocked);
}

}  // namespace
}  // namespace refit::daemon
