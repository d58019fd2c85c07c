#include "support/other_user.hpp"

#include <fcntl.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace refit::test {

void OtherUser::Talk::say(const std::string& line) const {
  std::string text = line;
  for (char& c : text) c = c == '\n' ? ' ' : c;
  text += '\n';
  if (::write(to_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) ::_exit(1);
}

void OtherUser::Talk::wait() const {
  char byte = 0;
  if (::read(from_, &byte, 1) != 1) ::_exit(0);
}

OtherUser::OtherUser(uid_t uid, const std::vector<gid_t>& groups,
                     const std::function<void(Talk&)>& body) {
  int commands[2] = {-1, -1};
  int answers[2] = {-1, -1};
  EXPECT_EQ(::pipe2(commands, O_CLOEXEC), 0);
  EXPECT_EQ(::pipe2(answers, O_CLOEXEC), 0);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0) {
    ::close(commands[1]);
    ::close(answers[0]);
    Talk talk(answers[1], commands[0]);
    if (::setgroups(groups.size() - 1, groups.data() + 1) != 0 || ::setgid(groups.front()) != 0 ||
        ::setuid(uid) != 0) {
      ::_exit(1);
    }
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // after setuid, which clears it
    if (::getppid() != parent) ::_exit(1);
    body(talk);
    ::_exit(0);
  }
  ::close(commands[0]);
  ::close(answers[1]);
  to_ = commands[1];
  from_.adopt(answers[0]);
}

OtherUser::~OtherUser() {
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  ::close(to_);
}

std::string OtherUser::hear() { return from_.next(); }

void OtherUser::go() const { EXPECT_EQ(::write(to_, "g", 1), 1); }

}  // namespace refit::test
