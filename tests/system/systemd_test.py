#!/usr/bin/env python3
"""refitd as a stranger gets it: installed into a Debian, started by a real systemd, used by unprivileged users.

Usage: systemd_test.py --build-dir DIR        (as root)

Goal: what docs/operations.md promises about the units is seen to happen. Method: one boot of a container
(tests/support/systemd_container.py); the example's trainer and engine run in it as users of the group `refit`; each
check prints the sentence that it saw. The first that fails ends the test, with the daemon's journal.
"""

import argparse
import contextlib
import json
import os
import pathlib
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "support"))
from systemd_container import (  # noqa: E402
    Container, Failure, debian_root, libraries_of, own_mount_namespace, packages_of, run)

REPLY_S = 60
WAIT_S = 60
RESTARTS = 3
RULE = """[[engine]]
name = "dit"
owner = "engine"
allow_groups = ["refit"]
"""
SOCKET = "/run/refitd/refitd.sock"
TEST_PROGRAMS = "/usr/local/libexec/refit-test"
LIBRARIES = f"{TEST_PROGRAMS}/lib"


def message_ids():
    """MESSAGE_ID by event, from the daemon's table."""
    table = (pathlib.Path(__file__).resolve().parents[2] / "daemon/log.hpp").read_text()
    return dict(re.findall(r'X\((\w+), \d, "([0-9a-f]{32})"\)', table))


MESSAGE_IDS = message_ids()


def expect(condition, text):
    if not condition:
        raise Failure(text)


def eventually(condition, text):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise Failure(f"not within {WAIT_S} s: {text}")


class Peer:
    """One of the example's programs, as a user in the container. Its events are kept in order."""

    alive = set()

    def __init__(self, container, program, user, *arguments, environment=None):
        self.container = container
        self.name = f"{program} of {user}"
        self.errors = tempfile.TemporaryFile()
        command = container.inside([f"{TEST_PROGRAMS}/{program}", "--model", "tiny", *arguments], user=user,
                                   environment={"LD_LIBRARY_PATH": LIBRARIES, "OMP_NUM_THREADS": "1",
                                                **(environment or {})})
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        self.alive.add(self)
        self.events = queue.Queue()
        self.kept = []
        threading.Thread(target=self._read, daemon=True).start()
        self.pid = self.expect("ready")["pid"]  # as the container counts

    def _read(self):
        for line in self.process.stdout:
            self.events.put(json.loads(line))
        self.events.put(None)

    def fault(self, text):
        self.errors.seek(0)
        return Failure(f"{self.name}: {text}; stderr: {self.errors.read().decode(errors='replace')[-2000:]}")

    def next(self):
        try:
            event = self.events.get(timeout=REPLY_S)
        except queue.Empty:
            raise self.fault(f"silent for {REPLY_S} s") from None
        if event is None:
            raise self.fault(f"ended with {self.process.wait()}")
        self.kept.append(event)
        return event

    def expect(self, name, among=("gate",)):
        """The next event that is not one of `among`; it must be `name`."""
        while True:
            event = self.next()
            if event["event"] == name:
                return event
            if event["event"] not in among:
                raise self.fault(f"{event} instead of {name!r}")

    def send(self, command):
        self.process.stdin.write((command + "\n").encode())
        self.process.stdin.flush()

    def ask(self, command, event=None):
        self.send(command)
        return self.expect(event or command)

    def stop(self):
        self.container.run(["sh", "-c", f"kill -STOP {self.pid}"])

    def go_on(self):
        """nsenter, our child, stops itself when its own does; it passes this on."""
        self.process.send_signal(signal.SIGCONT)

    def versions(self):
        """What the engine's gate let in, in order."""
        return [module["version"] for event in self.kept if event["event"] == "gate" for module in event["modules"]]

    def close(self):
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=10)
        self.process.kill()
        self.process.wait()
        self.alive.discard(self)


class Service:
    """refitd.service, as systemctl and the journal tell of it."""

    def __init__(self, container):
        self.container = container

    def show(self, name):
        return self.container.run(["systemctl", "show", "--value", f"--property={name}", "refitd.service"]).strip()

    def state(self):
        return self.container.try_run(["systemctl", "is-active", "refitd.service"]).stdout.strip()

    def systemctl(self, *words):
        return self.container.run(["systemctl", *words])

    def kill(self, name):
        self.systemctl("kill", "--kill-whom=main", f"--signal={name}", "refitd.service")

    def drop_in(self, *lines):
        """Changes the unit until it is called again; without lines, back to what is installed."""
        folder = pathlib.Path(self.container.root, "etc/systemd/system/refitd.service.d")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "test.conf"
        path.unlink(missing_ok=True)
        if lines:
            path.write_text("[Service]\n" + "".join(line + "\n" for line in lines))
        self.systemctl("daemon-reload")

    def journal(self, *matches):
        """Entries of the unit, as fields."""
        output = self.container.run(["journalctl", "--unit=refitd.service", "--output=json", "--no-pager", *matches])
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


class SystemdTest:
    def __init__(self, container, build_dir):
        self.container = container
        self.build_dir = build_dir
        self.service = Service(container)

    def saw(self, sentence):
        print(f"saw: {sentence}", flush=True)

    # ---- the container and what is in it

    def install(self, programs):
        root = self.container.root
        run(["cmake", "--install", self.build_dir], env={**os.environ, "DESTDIR": root})
        os.makedirs(root + TEST_PROGRAMS, exist_ok=True)
        for program in programs:
            shutil.copy(program, root + TEST_PROGRAMS)

    def enable(self):
        """The commands of docs/operations.md."""
        run_inside = self.container.run
        run_inside(["systemd-sysusers"])
        run_inside(["journalctl", "--update-catalog"])
        run_inside(["ldconfig"])
        run_inside(["systemctl", "daemon-reload"])
        paths = run_inside(["systemctl", "show", "--value", "--property=FragmentPath", "refitd.socket", "refitd.service"])
        complaints = run_inside(["systemd-analyze", "verify", "--man=no", *paths.split()])
        expect(not complaints, f"systemd complains of the units: {complaints}")
        run_inside(["systemctl", "enable", "--now", "refitd.socket"])
        for user in ("trainer", "engine"):
            run_inside(["useradd", "--create-home", "--groups", "refit", user])
        run_inside(["useradd", "--create-home", "stranger"])
        expect(self.service.state() == "inactive", f"before any client the service is {self.service.state()}")
        self.saw("the socket is enabled, the daemon is not running")

    # ---- sentences

    def stranger_is_refused(self):
        done = self.container.try_run(["refitctl", "status"], user="stranger")
        expect(done.returncode != 0 and "permission" in done.stdout.lower(),
               f"a user outside the group got {done.returncode}: {done.stdout}")
        expect(self.service.state() == "inactive", "a refused user started the daemon")
        self.saw("a user who is not of the group is refused, and starts nothing")

    def first_refit(self, trainer_user, engine_user):
        self.engine = Peer(self.container, "dit_engine", engine_user)
        self.trainer = Peer(self.container, "dit_trainer", trainer_user)
        expect(self.service.state() == "active", f"after a client came the service is {self.service.state()}")
        self.saw("socket activation: the first client started the daemon")
        self.refit()
        self.saw("trainer and engine, unprivileged, made a refit; their outputs are equal")

    def refit(self):
        """One optimizer step and one refit; the engine must compute what the trainer computes."""
        self.trainer.ask("step")
        version = self.trainer.ask("refit")["version"]
        ours, theirs = self.trainer.ask("forward"), self.engine.ask("forward")
        expect(ours["sha256"] == theirs["sha256"], f"after version {version} the outputs differ")
        expect(theirs["version"] == version, f"the engine says version {theirs['version']}, not {version}")
        return version

    def sandbox_holds(self):
        pid = self.service.show("MainPID")
        status = dict(line.split(":\t", 1) for line in self.container.run(["cat", f"/proc/{pid}/status"]).splitlines()
                      if ":\t" in line)
        user = self.container.run(["id", "--user", "refitd"]).strip()
        expect(set(status["Uid"].split()) == {user}, f"the daemon runs as uid {status['Uid']}, not as refitd ({user})")
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            expect(int(status[name], 16) == 0, f"the daemon has capabilities: {name} {status[name]}")
        expect(status["NoNewPrivs"].strip() == "1", "the daemon may gain privileges")
        expect(status["Seccomp"].strip() == "2", "the daemon has no system call filter")
        devices = set(self.container.run(["ls", f"/proc/{pid}/root/dev"]).split())
        expect("null" in devices and not devices & {"tty0", "mem", "rtc0"}, f"the daemon's /dev has {devices}")
        mounts = self.container.run(["cat", f"/proc/{pid}/mounts"]).splitlines()
        root = next(line for line in mounts if line.split()[1] == "/")
        expect("ro" in root.split()[3].split(","), f"the daemon's root is writable: {root}")
        self.saw("the daemon runs as its own user, without capabilities, filtered, on a read-only root")

    def readiness(self):
        self.service.systemctl("stop", "refitd.service")
        self.service.drop_in("ExecStart=", f"ExecStart={TEST_PROGRAMS}/refitd_test", "Environment=REFIT_POINT=ready=stop",
                             "WatchdogSec=0")
        self.service.systemctl("start", "--no-block", "refitd.service")
        eventually(self.stopped_daemon, "the daemon stops itself before it says that it is ready")
        expect(self.service.state() == "activating", f"before READY the service is {self.service.state()}")
        self.service.kill("CONT")
        eventually(lambda: self.service.state() == "active", "the service is active after READY")
        self.service.drop_in()
        self.service.systemctl("restart", "refitd.service")
        self.saw("the unit is active only after the daemon said READY")

    def stopped_daemon(self):
        pid = self.service.show("MainPID")
        if pid == "0":
            return None
        state = self.container.try_run(["cat", f"/proc/{pid}/stat"]).stdout
        return re.search(r"\) T ", state)

    def journal_fields(self):
        """An engine whose name is taken is refused; the journal says who it was without reading the text."""
        refused = self.container.try_run([f"{TEST_PROGRAMS}/dit_engine", "--model", "tiny"], user="engine",
                                         environment={"LD_LIBRARY_PATH": LIBRARIES})
        expect(refused.returncode != 0, "two engines of one name and user were let in")
        user = self.container.run(["id", "--user", "engine"]).strip()
        entry = self.entry(MESSAGE_IDS["client_refused"])
        expect(entry["REFIT_ENGINE"] == "dit" and entry["REFIT_CLIENT_UID"] == user and
               int(entry["REFIT_CLIENT_PID"]) > 1 and entry["REFIT_ERRC"] == "name_taken" and entry["PRIORITY"] == "4",
               f"the refusal's fields: {entry}")
        expect(entry["CODE_FILE"].endswith("server.cpp") and int(entry["CODE_LINE"]) > 0 and entry["CODE_FUNC"],
               f"the refusal's place in the code: {entry}")
        expect(entry["_PID"] == self.service.show("MainPID"), f"the entry is not the daemon's own: {entry}")
        self.entry(MESSAGE_IDS["started"])
        explained = self.container.run(["journalctl", "--catalog", "--no-pager", f"MESSAGE_ID={MESSAGE_IDS['client_refused']}"])
        expect("A client was refused" in explained, f"the catalog says nothing of it: {explained}")
        self.saw("the journal has who was refused and why as fields, and explains it")

    def entry(self, message_id):
        """The newest entry of an event. The journal is written a moment after the event."""
        return eventually(lambda: self.service.journal(f"MESSAGE_ID={message_id}"), f"a journal entry {message_id}")[-1]

    def watchdog(self):
        self.service.drop_in("WatchdogSec=2")
        self.restart()
        restarts = int(self.service.show("NRestarts"))
        version = self.refit()
        self.service.kill("STOP")
        eventually(lambda: int(self.service.show("NRestarts")) > restarts, "the watchdog restarts a stopped daemon")
        expect(self.refit() > version, "a version fell")
        self.service.drop_in()
        self.saw("the watchdog restarted a stopped daemon; the next refit worked with the same trainer and engine")

    def configure(self, text):
        folder = pathlib.Path(self.container.root, "etc/refitd")
        folder.mkdir(exist_ok=True)
        (folder / "refitd.toml").write_text(text)

    def two_users(self):
        """A trainer of another user is refused, until the configuration lets it in; no restart, no new session."""
        self.service.systemctl("start", "refitd.service")
        with contextlib.closing(Peer(self.container, "dit_trainer", "trainer")) as refused:
            refused.send("refit")
            told = refused.next()
            expect(told["event"] == "error" and told["code"] == "permission", f"a trainer of another user was told {told}")
        user = self.container.run(["id", "--user", "trainer"]).strip()
        entry = self.entry(MESSAGE_IDS["request_denied"])
        expect(entry["REFIT_CLIENT_UID"] == user and entry["REFIT_ERRC"] == "permission", f"the denial's fields: {entry}")
        process = self.service.show("MainPID")
        self.configure(RULE)
        self.service.systemctl("reload", "refitd.service")
        self.entry(MESSAGE_IDS["reloaded"])
        self.trainer.close()
        self.trainer = Peer(self.container, "dit_trainer", "trainer")
        self.refit()
        self.saw("a reload let a trainer of another user of the group refit the engine")

        self.configure(RULE + "no_such_setting = 1\n")
        done = self.container.try_run(["systemctl", "reload", "refitd.service"])
        expect(done.returncode != 0, "a reload of a file with an error succeeded")
        entry = self.entry(MESSAGE_IDS["reload_refused"])
        expect("no_such_setting" in entry["MESSAGE"] and "refitd.toml:" in entry["MESSAGE"], f"the refusal says {entry}")
        self.refit()
        self.configure(RULE)
        expect(self.service.state() == "active" and self.service.show("MainPID") == process,
               "a reload changed the daemon")
        self.saw("a reload of a file with an error fails and names it; the old configuration holds, the unit is active")

    def restart(self):
        self.service.systemctl("restart", "refitd.service")

    def sudden_death(self):
        version = self.refit()
        restarts = int(self.service.show("NRestarts"))
        self.trainer.ask("step")
        start = time.monotonic()
        self.service.kill("KILL")
        report = self.trainer.ask("refit")
        took_ms = (time.monotonic() - start) * 1000
        expect(report["version"] > version, "a version fell")
        eventually(lambda: int(self.service.show("NRestarts")) > restarts, "the daemon was killed and restarted")
        self.saw(f"a killed daemon was back and had made the next refit {took_ms:.0f} ms after the kill was asked for")

    def restarts_lose_nothing(self):
        """A trainer that refits in a loop, and a daemon that is restarted under it."""
        versions = []
        stop = threading.Event()
        broken = []

        def train():
            try:
                while not stop.is_set():
                    self.trainer.ask("step")
                    versions.append(self.trainer.ask("refit")["version"])
            except Failure as failure:
                broken.append(failure)

        self.engine.ask("run", "running")
        loop = threading.Thread(target=train)
        loop.start()
        try:
            for _ in range(RESTARTS):
                count = len(versions)
                eventually(lambda: broken or len(versions) >= count + 3, "the trainer refits")
                self.restart()
            count = len(versions)
            eventually(lambda: broken or len(versions) >= count + 3, "the trainer refits after the last restart")
        finally:
            stop.set()
            loop.join()
        if broken:
            raise broken[0]
        self.engine.ask("pause", "paused")
        expect(all(a < b for a, b in zip(versions, versions[1:])), f"versions fell: {versions}")
        seen = self.engine.versions()
        expect(all(a <= b for a, b in zip(seen, seen[1:])), f"versions fell in the engine: {seen}")
        lost = set(versions) - set(seen)
        expect(not lost, f"committed, but never seen by the engine: {sorted(lost)} of {versions}; it saw {seen}")
        self.refit()
        self.saw(f"{RESTARTS} restarts under a looping trainer: {len(versions)} versions, none fell, none was lost")

    def wait_for_refit(self):
        """Until the daemon has a refit under way."""
        def under_way():
            # As its own user: another one sees that the session is there, and no more.
            sessions = json.loads(self.container.run(["refitctl", "sessions", "--json"], user="trainer"))["sessions"]
            return any(session["role"] == "trainer" and session["in_flight"] > 0 for session in sessions)

        eventually(under_way, "the daemon has taken the refit")

    def drain(self):
        """A stop while an engine is in its step: the refit that waits for it is let through first."""
        self.trainer.ask("step")
        self.engine.stop()
        try:
            self.trainer.send("refit")
            self.wait_for_refit()
            self.service.systemctl("stop", "--no-block", "refitd.socket", "refitd.service")
            eventually(lambda: self.service.state() == "deactivating", "the daemon drains")
            self.entry(MESSAGE_IDS["draining"])
            expect(self.service.state() == "deactivating", "the daemon ended before the refit did")
        finally:
            self.engine.go_on()
        self.trainer.expect("refit")
        ours, theirs = self.trainer.ask("forward"), self.engine.ask("forward")
        expect(ours["sha256"] == theirs["sha256"], "the drained refit left other weights")
        eventually(lambda: self.service.state() == "inactive", "the daemon ends")
        expect(self.service.show("Result") == "success" and self.service.show("ExecMainStatus") == "0",
               f"it ended with {self.service.show('Result')}, {self.service.show('ExecMainStatus')}")
        self.entry(MESSAGE_IDS["stopped"])
        self.service.systemctl("start", "refitd.socket")
        self.refit()
        self.saw("a stop let the running refit finish, then the daemon ended with success")

    def user_service(self):
        """The user unit: another daemon, for one uid, that does not meet the system's."""
        user = self.container.run(["id", "--user", "engine"]).strip()
        self.service.systemctl("start", f"user@{user}.service")
        environment = {"XDG_RUNTIME_DIR": f"/run/user/{user}"}
        self.container.run(["systemctl", "--user", "enable", "--now", "refitd.socket"], user="engine",
                           environment=environment)
        mode = self.container.run(["stat", "--format=%a %U", f"/run/user/{user}/refit/refitd.sock"]).strip()
        expect(mode == "600 engine", f"the user's socket is {mode}")

        def told_where():
            with contextlib.closing(Peer(self.container, "dit_trainer", "engine", environment=environment)) as trainer:
                trainer.send("refit")
                told = trainer.next()
            expect(told["event"] == "error" and told["code"] == "no_such_engine",
                   f"a trainer that names an engine of the system's daemon was told {told}")
            return SOCKET in str(told["details"])
        # The other daemon is asked for a moment only: on a busy host it may not answer within it.
        eventually(told_where, "a trainer that names an engine of the system's daemon is told where it is")
        with contextlib.closing(Peer(self.container, "dit_engine", "engine", environment=environment)) as engine, \
             contextlib.closing(Peer(self.container, "dit_trainer", "engine", environment=environment)) as trainer:
            trainer.ask("refit")
            expect(trainer.ask("forward")["sha256"] == engine.ask("forward")["sha256"], "the outputs differ")
        state = self.container.run(["systemctl", "--user", "is-active", "refitd.service"], user="engine",
                                   environment=environment).strip()
        expect(state == "active", f"the user's daemon is {state}")
        self.refit()
        self.saw("a user's own daemon serves that user; it and the system's do not meet, and say where to look")

    def run(self):
        self.stranger_is_refused()
        self.first_refit("engine", "engine")
        self.sandbox_holds()
        self.journal_fields()
        self.two_users()
        self.sudden_death()
        self.watchdog()
        self.restarts_lose_nothing()
        self.drain()
        self.user_service()
        self.trainer.close()
        self.engine.close()
        self.readiness()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", required=True, type=pathlib.Path)
    build_dir = parser.parse_args().build_dir.resolve()
    container = Container()
    test = SystemdTest(container, build_dir)
    try:
        for tool in ("debootstrap", "systemd-nspawn", "nsenter", "setpriv"):
            expect(shutil.which(tool), f"no {tool} here; scripts/setup installs what this test needs")
        expect(os.geteuid() == 0, "a container with systemd needs root; run this test as root, or with sudo")
        installed = [build_dir / "daemon/refitd", build_dir / "client/refitctl/refitctl"]
        programs = [build_dir / "examples/dit_trainer", build_dir / "examples/dit_engine", build_dir / "daemon/refitd_test"]
        root = debian_root(packages_of(libraries_of(installed)))
        own_mount_namespace()
        container.overlay(root)
        test.install(programs)
        # libtorch is a gigabyte of packages: its files are shown, not installed.
        container.borrow(libraries_of(programs), LIBRARIES)
        container.boot()
        test.enable()
        test.run()
    except Failure as failure:
        print(f"FAILED: {failure}", file=sys.stderr)
        for peer in Peer.alive:
            print(f"{peer.name} said last: {peer.kept[-3:]}, and unread: {list(peer.events.queue)}", file=sys.stderr)
        if container.leader is not None:
            journal = container.try_run(["journalctl", "--no-pager", "--lines=60", "--output=short-precise"])
            print(f"the container's journal ends:\n{journal.stdout}", file=sys.stderr)
        return 1
    finally:
        # A container does not end before those who wait for its processes have heard of their end.
        for peer in Peer.alive:
            peer.process.kill()
            peer.process.wait()
        container.close()
    print("systemd: as expected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
