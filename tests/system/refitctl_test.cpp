// refitctl as an operator uses it: the real tool and the real daemon as processes of their own, on
// a private socket. The test's process is the engine and the trainer, through the client library.
//
// One thread, and one that Engine::serve() owns. Knows the tool by its arguments, texts, JSON and
// exit status alone.
#include <fcntl.h>
#include <pty.h>

#include <array>
#include <cerrno>
#include <csignal>

#include "support/eventually.hpp"
#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

// sha256sum and xxh128sum of 64 times "*".
constexpr const char* kStarsSha256 =
    "4ac5b1038ff9a79b5ed7a8cbbb97f2b658871d6a02c0d12e1aec4bba51ec19d9";
constexpr const char* kStarsXxh3 = "afa9a28f5b7fe2699c7fae802125e66b";

TEST_F(RefitctlSystem, IdleDaemonShowsItself) {
  daemon_->start();

  const Finished text = refitctl({"status"});
  const json root = parsed(refitctl({"status", "--json"}));

  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.err, "");
  EXPECT_TRUE(contains(text.out, "pid " + std::to_string(daemon_->pid()))) << text.out;
  EXPECT_TRUE(contains(text.out, socket_path_)) << text.out;
  EXPECT_TRUE(contains(text.out, "no engine has registered one")) << text.out;
  EXPECT_FALSE(contains(text.out, "\x1b"));
  const json& daemon = root.at("daemon");
  EXPECT_EQ(daemon.at("pid"), daemon_->pid());
  EXPECT_EQ(daemon.at("socket"), socket_path_);
  EXPECT_EQ(daemon.at("draining"), false);
  EXPECT_GT(daemon.at("uptime_us"), 0);
  EXPECT_GT(daemon.at("copy_threads"), 0);
  EXPECT_NE(daemon.at("copy_kernel"), "");
  EXPECT_NE(daemon.at("version"), "");
  EXPECT_TRUE(daemon.at("waiting") == "off" || daemon.at("waiting") == "adaptive" ||
              daemon.at("waiting") == "always");
  EXPECT_EQ(root.at("modules"), json::array());
  EXPECT_TRUE(contains(refitctl({"modules"}).out, "No module is registered"));
}

TEST_F(RefitctlSystem, StatusShowsTheLastRefit) {
  daemon_->start();
  const std::vector<std::string> names{"a", "b"};
  start_engine(names);
  const auto report = refit_once(names, '+');
  ASSERT_TRUE(report) << report.error().to_string();
  // The daemon proves it in the background.
  ASSERT_TRUE(eventually([&] {
    return parsed(refitctl({"modules", "--json"})).at("modules").at(0).at("proven_version") ==
           report->version;
  }));

  const Finished text = refitctl({"status"});
  const json root = parsed(refitctl({"status", "--json"}));

  ASSERT_EQ(text.status, 0) << text.err;
  for (const std::string& part :
       {std::string("engine0/transformer"), std::string("committed"),
        std::string("trainer0/transformer"), report->transaction.to_string().substr(0, 8),
        std::string("WAIT"), std::string("GATE"), std::string("COPY"), std::string("CHECK"),
        std::string("TOTAL")}) {
    EXPECT_TRUE(contains(text.out, part)) << part << "\n" << text.out;
  }
  EXPECT_EQ(root.at("daemon").at("refits"), 1);
  ASSERT_EQ(root.at("modules").size(), 1U);
  const json& module = root.at("modules").at(0);
  EXPECT_EQ(module.at("engine"), "engine0");
  EXPECT_EQ(module.at("module"), "transformer");
  EXPECT_EQ(module.at("state"), "committed");
  EXPECT_EQ(module.at("version"), report->version);
  EXPECT_EQ(module.at("source"), "trainer0/transformer");
  EXPECT_EQ(module.at("transaction"), report->transaction.to_string());
  EXPECT_EQ(module.at("tensors"), 2);
  EXPECT_EQ(module.at("bytes"), 2 * kTensorBytes);
  EXPECT_EQ(module.at("refits"), 1);
  EXPECT_EQ(module.at("populated"), true);
  const json& last = module.at("last_refit");
  EXPECT_EQ(last.at("bytes"), 2 * kTensorBytes);
  for (const char* phase : {"wait_us", "gate_us", "copy_us", "check_us", "total_us"}) {
    EXPECT_GE(last.at(phase), 0) << phase;
  }
  EXPECT_GE(last.at("total_us").get<double>(), last.at("copy_us").get<double>());
  bool engine_listed = false;
  for (const json& session : root.at("sessions")) {
    engine_listed =
        engine_listed || (session.at("role") == "engine" && session.at("name") == "engine0" &&
                          session.at("pid") == ::getpid() && session.at("uid") == ::geteuid() &&
                          session.at("modules") == 1);
  }
  EXPECT_TRUE(engine_listed) << root.at("sessions");
  EXPECT_EQ(parsed(refitctl({"modules", "--json"})).at("modules"), root.at("modules"));
  EXPECT_TRUE(contains(refitctl({"modules"}).out, "engine0/transformer"));
}

TEST_F(RefitctlSystem, TensorsAreListedInOrderOfRegistration) {
  daemon_->start();
  start_engine({"z", "a"});

  const Finished text = refitctl({"tensors", "engine0/transformer"});
  const json root = parsed(refitctl({"tensors", "engine0/transformer", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, "engine0/transformer  2 tensors, 128 B")) << text.out;
  EXPECT_LT(text.out.find("\nz "), text.out.find("\na ")) << text.out;
  EXPECT_TRUE(contains(text.out, "torch.uint8  (8, 8)")) << text.out;
  ASSERT_EQ(root.at("tensors").size(), 2U);
  EXPECT_EQ(root.at("tensors").at(0).at("name"), "z");
  EXPECT_EQ(root.at("tensors").at(1).at("offset_bytes"), kTensorBytes);
  EXPECT_EQ(root.at("tensors").at(1).at("shape"), json({8, 8}));
  EXPECT_EQ(root.at("tensors").at(1).at("bytes"), kTensorBytes);
}

TEST_F(RefitctlSystem, DigestsAreThoseOfOtherTools) {
  daemon_->start();
  start_engine({"a", "b"});
  std::memset(bytes_of(1), '-', kTensorBytes);

  const Finished text =
      refitctl({"digest", "engine0/transformer", "--kind", "raw", "--tensor", "a"});
  const json raw = parsed(refitctl({"digest", "engine0/transformer", "--kind", "raw", "--json"}));
  const json xxh3 = parsed(refitctl({"digest", "engine0/transformer", "--kind", "xxh3", "--json"}));
  const json sglang = parsed(refitctl({"digest", "engine0/transformer", "--module", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_TRUE(contains(text.out, std::string(kStarsSha256) + "  a\n")) << text.out;
  EXPECT_FALSE(contains(text.out, "  b\n")) << text.out;
  EXPECT_EQ(raw.at("tensors").size(), 2U);
  EXPECT_EQ(raw.at("tensors").at("a"), kStarsSha256);
  EXPECT_NE(raw.at("tensors").at("b"), kStarsSha256);
  EXPECT_EQ(raw.at("kind"), "raw");
  EXPECT_TRUE(raw.at("module_digest").is_null());
  EXPECT_EQ(xxh3.at("tensors").at("a"), kStarsXxh3);
  EXPECT_EQ(sglang.at("kind"), "sglang");
  EXPECT_NE(sglang.at("tensors").at("a"), kStarsSha256);
  EXPECT_EQ(sglang.at("module_digest").get<std::string>().size(), 64U);
}

TEST_F(RefitctlSystem, SavedDigestChecksUntilABitChanges) {
  // Goal: `digest --json` is what `check` takes, and check sees a single bit. Method: every kind is
  // saved, checked, and checked again with one bit of one tensor flipped in the engine's memory.
  daemon_->start();
  start_engine({"a", "b", "c"});

  for (const std::vector<std::string>& kind :
       {std::vector<std::string>{"--kind", "sglang"}, {"--kind", "raw"}, {"--module"}}) {
    std::vector<std::string> digest{"digest", "engine0/transformer", "--json"};
    digest.insert(digest.end(), kind.begin(), kind.end());
    const Finished saved = refitctl(digest);
    ASSERT_EQ(saved.status, 0) << saved.err;
    const std::string manifest = file("saved.json", saved.out);

    const Finished same = refitctl({"check", manifest});
    bytes_of(1)[63] ^= std::byte{1};
    const Finished changed = refitctl({"check", manifest});
    const json root = parsed(refitctl({"check", manifest, "--json"}));
    bytes_of(1)[63] ^= std::byte{1};
    RunOptions piped;
    piped.input = saved.out;
    const Finished restored = refitctl({"check", "-"}, piped);

    EXPECT_EQ(same.status, 0) << same.out << same.err;
    EXPECT_TRUE(contains(same.out, "3 of 3 tensors")) << same.out;
    EXPECT_EQ(changed.status, 1);
    EXPECT_TRUE(contains(changed.out, "FAILED")) << changed.out;
    EXPECT_TRUE(contains(changed.out, "mismatched 1\n  b\n")) << changed.out;
    EXPECT_EQ(root.at("ok"), false);
    EXPECT_EQ(root.at("equal"), 2);
    EXPECT_EQ(root.at("mismatched"), json({"b"}));
    EXPECT_EQ(root.at("missing"), json::array());
    EXPECT_EQ(root.at("module_equal"), kind[0] == "--module" ? json(false) : json());
    EXPECT_EQ(restored.status, 0) << restored.out << restored.err;
  }
}

TEST_F(RefitctlSystem, Xxh3IsNoCheck) {
  daemon_->start();
  start_engine({"a"});
  const Finished saved = refitctl({"digest", "engine0/transformer", "--kind", "xxh3", "--json"});
  ASSERT_EQ(saved.status, 0) << saved.err;

  const Finished sut = refitctl({"check", file("xxh3.json", saved.out)});

  EXPECT_EQ(sut.status, 2);
  EXPECT_TRUE(contains(sut.err, "proves nothing")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "--kind sglang")) << sut.err;
}

TEST_F(RefitctlSystem, PlainManifestIsCheckedAgainstTheTargetGiven) {
  daemon_->start();
  start_engine({"a", "b"});
  const json plain = {{"a", kStarsSha256}, {"nowhere", kStarsSha256}};
  const std::string with_missing = file("missing.json", plain.dump());
  const std::string partial = file("partial.json", json{{"a", kStarsSha256}}.dump());

  const Finished missing =
      refitctl({"check", with_missing, "--target", "engine0/transformer", "--kind", "raw"});
  const Finished some = refitctl({"check", "engine0/transformer", partial, "--kind", "raw"});
  const Finished homeless = refitctl({"check", partial});

  EXPECT_EQ(missing.status, 1);
  EXPECT_TRUE(contains(missing.out, "missing 1\n  nowhere\n")) << missing.out;
  EXPECT_EQ(some.status, 0) << some.out << some.err;
  EXPECT_TRUE(contains(some.out, "1 tensor of the module not in the manifest")) << some.out;
  EXPECT_EQ(homeless.status, 2);
  EXPECT_TRUE(contains(homeless.err, "names no engine and module")) << homeless.err;
  EXPECT_TRUE(contains(homeless.err, partial)) << homeless.err;
}

TEST_F(RefitctlSystem, PoisonedModuleFailsCheckAndDigest) {
  // Goal: bytes that may be a mix are never a good answer, even if they equal what is expected.
  // Method: a daemon of the test build dies between the first byte and the commit; the next daemon
  // learns of it from the engine.
  const std::vector<std::string> names{"a", "b"};
  daemon_->start(REFITD_TEST_PATH, "writing.half=kill");
  start_engine(names);
  const Finished saved = refitctl({"digest", "engine0/transformer", "--json"});
  ASSERT_EQ(saved.status, 0) << saved.err;
  const std::string manifest = file("saved.json", saved.out);
  ASSERT_FALSE(refit_once(names, '+'));
  ASSERT_TRUE(daemon_->killed_itself()) << "the point was not hit";
  daemon_->start();
  trainer_.reset();
  const auto reconnected = engine_->reconnect(soon());
  ASSERT_TRUE(reconnected) << reconnected.error().to_string();
  // The same bytes as when they were saved: only the state differs.
  std::memset(memory_->data(), '*', names.size() * kTensorBytes);

  const Finished check = refitctl({"check", manifest});
  const Finished digest = refitctl({"digest", "engine0/transformer"});
  const json status_root = parsed(refitctl({"status", "--json"}));

  EXPECT_EQ(check.status, 1) << check.out << check.err;
  EXPECT_TRUE(contains(check.out, "poisoned")) << check.out;
  EXPECT_TRUE(contains(check.out, "FAILED")) << check.out;
  EXPECT_EQ(digest.status, 1) << digest.out << digest.err;
  EXPECT_TRUE(contains(digest.out, "the module is not whole")) << digest.out;
  EXPECT_EQ(status_root.at("modules").at(0).at("state"), "poisoned");
}

TEST_F(RefitctlSystem, WhatIsNotThereIsNamed) {
  daemon_->start();
  start_engine({"a"});

  const Finished engine = refitctl({"tensors", "nobody/transformer"});
  const Finished module = refitctl({"digest", "engine0/vae"});
  const Finished tensor = refitctl({"digest", "engine0/transformer", "--tensor", "nowhere"});
  const Finished as_json = refitctl({"tensors", "nobody/transformer", "--json"});

  EXPECT_EQ(engine.status, 1);
  EXPECT_TRUE(contains(engine.err, "nobody")) << engine.err;
  EXPECT_TRUE(contains(engine.err, "refitctl modules")) << engine.err;
  EXPECT_EQ(engine.out, "");
  EXPECT_EQ(module.status, 1);
  EXPECT_TRUE(contains(module.err, "vae")) << module.err;
  EXPECT_NE(tensor.status, 0);
  EXPECT_TRUE(contains(tensor.err, "nowhere")) << tensor.err;
  EXPECT_TRUE(contains(tensor.err, "refitctl tensors")) << tensor.err;
  EXPECT_EQ(as_json.status, 1);
  EXPECT_EQ(as_json.out, "");
  const json error = json::parse(as_json.err).at("error");
  EXPECT_EQ(error.at("code"), "no_such_engine");
  EXPECT_EQ(error.at("exit"), 1);
  EXPECT_TRUE(contains(error.at("message"), "nobody"));
}

TEST_F(RefitctlSystem, NameThatReordersTextIsWrittenOutAndStillChecked) {
  // The daemon refuses control characters; what reorders text is a letter to it.
  daemon_->start();
  start_engine({"odd\u202e\u540d\\"});

  for (const char* command : {"tensors", "digest"}) {
    const Finished sut = refitctl({command, "engine0/transformer"});

    EXPECT_EQ(sut.status, 0) << sut.err;
    EXPECT_TRUE(contains(sut.out, "odd\\u{202e}\u540d\\\\")) << sut.out;
    EXPECT_FALSE(contains(sut.out, "\u202e"));
  }
  RunOptions piped;
  piped.input = refitctl({"digest", "engine0/transformer", "--json"}).out;
  const Finished checked = refitctl({"check", "-"}, piped);
  EXPECT_EQ(checked.status, 0) << checked.out << checked.err;
}

TEST_F(RefitctlSystem, MissingDaemonSaysHowToStartOne) {
  const Finished absent = refitctl({"status"});
  const Finished as_json = refitctl({"status", "--json"});
  daemon_->start();
  daemon_->stop(SIGKILL);
  const Finished dead = refitctl({"status"});

  for (const Finished& sut : {absent, dead}) {
    EXPECT_EQ(sut.status, 1);
    EXPECT_EQ(sut.out, "");
    EXPECT_TRUE(contains(sut.err, "refitd --socket " + socket_path_)) << sut.err;
    EXPECT_TRUE(contains(sut.err, "REFIT_SOCKET")) << sut.err;
  }
  EXPECT_EQ(json::parse(as_json.err).at("error").at("native"), ENOENT);
}

TEST_F(RefitctlSystem, StoppedDaemonEndsInTheTimeout) {
  daemon_->start();
  daemon_->suspend();

  const Finished sut = refitctl({"status", "--timeout", "0.2"});
  ::kill(daemon_->pid(), SIGCONT);

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "no answer within 0.2 s")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "--timeout")) << sut.err;
}

TEST_F(RefitctlSystem, SocketOfAnotherIsAMatterOfPermission) {
  daemon_->start();
  ASSERT_EQ(::chmod(socket_path_.c_str(), 0), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"status"}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, socket_path_)) << sut.err;
  EXPECT_TRUE(contains(sut.err, "ls -l")) << sut.err;
}

TEST_F(RefitctlSystem, UnreadableManifestIsAMatterOfPermission) {
  const std::string manifest = file("secret.json", "{}");
  ASSERT_EQ(::chmod(manifest.c_str(), 0), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"check", manifest}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, manifest)) << sut.err;
}

TEST_F(RefitctlSystem, BadArgumentsAreToldBeforeTheDaemonIsAsked) {
  // No daemon runs: whatever reached for one would say so and end with 1.
  const std::string broken = file("broken.json", "{\"a\": \"xyz\"}");
  const std::string no_json = file("no.json", "weights");
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{}, "a command is missing"},
      {{"stats"}, "\"stats\""},
      {{"status", "--colour"}, "--colour"},
      {{"status", "--timeout", "0"}, "--timeout"},
      {{"tensors"}, "ENGINE/MODULE"},
      {{"tensors", "engine0"}, "\"engine0\""},
      {{"digest", "e/m", "--kind", "md5"}, "md5"},
      {{"check"}, "MANIFEST.json"},
      {{"check", folder_ + "/absent.json"}, "absent.json"},
      {{"check", folder_}, "directory"},
      {{"check", broken}, "\"a\""},
      {{"check", no_json}, "not JSON"},
  };

  for (const auto& [arguments, part] : cases) {
    const Finished sut = refitctl(arguments);

    EXPECT_EQ(sut.status, 2) << part << "\n" << sut.err;
    EXPECT_EQ(sut.out, "");
    EXPECT_TRUE(contains(sut.err, part)) << part << "\n" << sut.err;
  }
  const Finished as_json = refitctl({"status", "--colour", "--json"});
  EXPECT_EQ(json::parse(as_json.err).at("error").at("exit"), 2);
  const Finished no_socket = run(REFITCTL_PATH, {"--socket", broken, "status"});
  EXPECT_EQ(no_socket.status, 2) << no_socket.err;
}

TEST_F(RefitctlSystem, UnusableEnvironmentIsABadConfiguration) {
  RunOptions options;
  options.environment["REFIT_SOCKET"] = "/" + std::string(200, 's');
  const Finished too_long = run(REFITCTL_PATH, {"status"}, options);
  options.environment["REFIT_SOCKET"] = file("plain", "no socket");
  const Finished no_socket = run(REFITCTL_PATH, {"status"}, options);

  EXPECT_EQ(too_long.status, 6) << too_long.err;
  EXPECT_TRUE(contains(too_long.err, "REFIT_SOCKET")) << too_long.err;
  EXPECT_EQ(no_socket.status, 6) << no_socket.err;
  EXPECT_TRUE(contains(no_socket.err, "REFIT_SOCKET")) << no_socket.err;
}

TEST_F(RefitctlSystem, EnvironmentNamesTheSocket) {
  daemon_->start();
  RunOptions options;
  options.environment["REFIT_SOCKET"] = socket_path_;

  const Finished sut = run(REFITCTL_PATH, {"status"}, options);

  EXPECT_EQ(sut.status, 0) << sut.err;
  EXPECT_TRUE(contains(sut.out, socket_path_)) << sut.out;
}

TEST_F(RefitctlSystem, HelpAndVersionNeedNoDaemon) {
  for (const std::vector<std::string>& arguments : {std::vector<std::string>{"--help"},
                                                    {"--version"},
                                                    {"status", "--help"},
                                                    {"sessions", "--help"},
                                                    {"metrics", "--help"},
                                                    {"drain", "--help"},
                                                    {"doctor", "--help"},
                                                    {"modules", "--help"},
                                                    {"tensors", "--help"},
                                                    {"digest", "--help"},
                                                    {"check", "--help"}}) {
    const Finished sut = refitctl(arguments);

    EXPECT_EQ(sut.status, 0);
    EXPECT_EQ(sut.err, "");
    EXPECT_NE(sut.out, "");
  }
}

TEST_F(RefitctlSystem, ReaderThatWentAwayIsQuiet) {
  // Whether SIGPIPE was inherited as ignored (services, scripts) or not (shells).
  for (const bool default_sigpipe : {true, false}) {
    std::array<int, 2> fds{};
    ASSERT_EQ(::pipe2(fds.data(), O_CLOEXEC), 0);
    ::close(fds[0]);
    RunOptions options;
    options.out_fd = fds[1];
    options.default_sigpipe = default_sigpipe;

    const Finished sut = refitctl({"--help"}, options);
    ::close(fds[1]);

    EXPECT_EQ(sut.status, 0);
    EXPECT_EQ(sut.err, "");
  }
}

TEST_F(RefitctlSystem, OutputThatCannotBeWrittenIsAnError) {
  RunOptions options;
  options.out_fd = ::open("/dev/full", O_WRONLY | O_CLOEXEC);
  ASSERT_GE(options.out_fd, 0);

  const Finished sut = refitctl({"--help"}, options);
  ::close(options.out_fd);

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "cannot write the output")) << sut.err;
}

TEST_F(RefitctlSystem, ColoursAreForTerminalsOnly) {
  // Goal: a terminal gets them, unless NO_COLOR is set; a pipe never. Method: standard output is a
  // pseudo terminal, whose other end is read after the tool ended; its text is far below what the
  // terminal holds.
  daemon_->start();
  const auto on_terminal = [this](std::map<std::string, std::string> environment) {
    int master = -1;
    int terminal = -1;
    EXPECT_EQ(::openpty(&master, &terminal, nullptr, nullptr, nullptr), 0);
    RunOptions options;
    options.out_fd = terminal;
    options.environment = std::move(environment);
    EXPECT_EQ(refitctl({"status"}, options).status, 0);
    std::array<char, 8192> buffer{};
    const ssize_t count = ::read(master, buffer.data(), buffer.size());
    ::close(terminal);
    ::close(master);
    return std::string(buffer.data(), count > 0 ? static_cast<std::size_t>(count) : 0);
  };

  EXPECT_TRUE(contains(on_terminal({{"TERM", "xterm"}}), "\x1b["));
  const std::string plain = on_terminal({{"TERM", "xterm"}, {"NO_COLOR", "1"}});
  EXPECT_TRUE(contains(plain, "refitd"));
  EXPECT_FALSE(contains(plain, "\x1b"));
  EXPECT_FALSE(contains(on_terminal({{"TERM", "dumb"}}), "\x1b"));
}

}  // namespace
}  // namespace refit::test
