"""A Debian root booted with systemd-nspawn, for tests that want a real systemd around what is installed.

The root is made by debootstrap from the mirror that this machine's apt uses, once, and kept in the user's cache; each
container gets an overlay of it that is gone with the process. Needs root. Knows nothing of refit.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import time

PACKAGES = ("systemd", "systemd-sysv", "dbus", "libpam-systemd")
BOOT_S = 60
CGROUP_S = 5
CLONE_NEWNS = 0x20000
LIBC = ctypes.CDLL(None, use_errno=True)


class Failure(Exception):
    """What went wrong, for a person."""


def run(command, **options):
    """Output of a command that must succeed."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if done.returncode != 0:
        raise Failure(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout


def libraries_of(programs):
    """Paths of the shared libraries that the programs load."""
    paths = set()
    for program in programs:
        for line in run(["ldd", program]).splitlines():
            match = re.search(r"=> (/\S+)", line)
            if match:
                paths.add(match[1])
            elif "not found" in line:
                raise Failure(f"{program}: {line.strip()}")
    return sorted(paths)


def packages_of(libraries):
    """The Debian packages that the libraries come from."""
    names = set()
    for library in libraries:
        output = run(["dpkg-query", "--search", "*/" + os.path.basename(library)])
        names.update(line.split(":")[0] for line in output.splitlines() if not line.startswith("diversion"))
    return names


def mirror():
    """(codename, address) that apt would install this machine's Debian from."""
    release = dict(line.rstrip().split("=", 1) for line in open("/etc/os-release") if "=" in line)
    codename = release.get("VERSION_CODENAME", "").strip('"')
    targets = run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE) $(COMPONENT)"])
    for line in targets.splitlines():
        if line.split()[1:] == [codename, "main"]:
            return codename, line.split()[0]
    raise Failure(f"apt of this machine names no source of {codename}/main: no root can be made without one")


def debian_root(packages):
    """A folder with a Debian that has `packages` (and what a systemd needs). Made when it is missing."""
    packages = sorted({*PACKAGES, *packages})
    codename, address = mirror()
    key = hashlib.sha256(" ".join([codename, *packages]).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "refit"
    root = cache / f"debian-{codename}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return root
        print(f"making a Debian root in {root} (once; it takes a minute or two)", flush=True)
        environment = dict(os.environ)
        proxy = re.search(r'"(.*)"', run(["apt-config", "dump", "Acquire::http::Proxy"]))
        if proxy and proxy[1]:
            environment["http_proxy"] = proxy[1]
        unfinished = tempfile.mkdtemp(prefix="unfinished-", dir=cache)
        try:
            run(["debootstrap", "--variant=minbase", "--include=" + ",".join(packages), codename, unfinished, address],
                env=environment)
            shutil.rmtree(os.path.join(unfinished, "var/cache/apt"), ignore_errors=True)
            os.chmod(unfinished, 0o755)
            os.rename(unfinished, root)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root


def own_mount_namespace():
    """Mounts of this process and its children are gone with them."""
    if LIBC.unshare(CLONE_NEWNS) != 0:
        raise Failure(f"no mount namespace of our own: {os.strerror(ctypes.get_errno())} (this test needs root)")
    run(["mount", "--make-rprivate", "/"])


def enter_own_cgroups(name):
    """On a host without systemd: a cgroup of our own, because the container's systemd takes all that it finds in its own."""
    folders = []
    for line in open("/proc/self/mountinfo"):
        before, after = line.split(" - ")
        kind, _, options = after.split()[:3]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
            folder = os.path.join(before.split()[4], name)
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "cgroup.procs"), "w") as processes:
                processes.write("0")
            folders.append(folder)
    return folders


def remove_cgroup(folder):
    """The kernel lets the last process go a moment after its end; what then is left is left, and empty."""
    deadline = time.monotonic() + CGROUP_S
    while os.path.isdir(folder) and time.monotonic() < deadline:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        time.sleep(0.05)


class Container:
    """A booted Debian. `overlay(root)` first, install into the result and `borrow`, then `boot`."""

    def __init__(self):
        self.name = f"refit-test-{os.getpid()}"
        self.process = None
        self.leader = None
        self.cgroups = []
        self.binds = {}

    def overlay(self, root):
        """A writable view of `root` in memory."""
        self.work = tempfile.mkdtemp(prefix="refit-systemd-")
        run(["mount", "-t", "tmpfs", "-o", "mode=0755", "tmpfs", self.work])
        for folder in ("upper", "work", "root"):
            os.mkdir(os.path.join(self.work, folder))
        self.root = os.path.join(self.work, "root")
        run(["mount", "-t", "overlay", "overlay", self.root, "-o",
             f"lowerdir={root},upperdir={self.work}/upper,workdir={self.work}/work"])
        return self.root

    def borrow(self, libraries, folder):
        """Shows libraries of this machine in `folder`, for LD_LIBRARY_PATH: those that the root has not got itself.

        Whole folders are mounted and single files linked, because a service's sandbox goes through every mount."""
        os.makedirs(self.root + folder)
        for path in libraries:
            if os.path.exists(self.root + path):
                continue
            real = os.path.realpath(path)
            source = os.path.dirname(real)
            target = self.binds.setdefault(source, f"{folder}/host-{len(self.binds)}")
            os.symlink(os.path.join(target, os.path.basename(real)),
                       os.path.join(self.root + folder, os.path.basename(path)))

    def boot(self):
        command = ["systemd-nspawn", "--quiet", "--directory", self.root, "--machine", self.name, "--boot",
                   "--register=no", "--private-network", "--console=pipe", "--resolv-conf=off", "--timezone=off",
                   "--link-journal=no"]
        if not os.path.isdir("/run/systemd/system"):
            command.append("--keep-unit")
            self.cgroups = enter_own_cgroups(self.name)
        command += [f"--bind-ro={source}:{target}" for source, target in self.binds.items()]
        self.log = os.path.join(self.work, "console")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + BOOT_S
        state = "no systemd yet"
        while time.monotonic() < deadline and self.process.poll() is None:
            children = open(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read().split()
            if children:
                self.leader = int(children[0])
                asked = self.try_run(["systemctl", "is-system-running"])
                state = asked.stdout.strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        console = open(self.log, errors="replace").read()[-3000:]
        raise Failure(f"the container did not boot within {BOOT_S} s ({state}); its console:\n{console}")

    def inside(self, command, user=None, environment=None):
        """A command line that runs `command` in the container, as root or as a user."""
        entry = ["nsenter", f"--target={self.leader}", "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup",
                 "--root", "--wd=/"]
        if user is not None:
            entry += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--inh-caps=-all"]
        words = [f"{key}={value}" for key, value in (environment or {}).items()]
        return [*entry, "env", "--ignore-environment", "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", *words,
                *command]

    def try_run(self, command, **who):
        return subprocess.run(self.inside(command, **who), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)

    def run(self, command, **who):
        return run(self.inside(command, **who), stdin=subprocess.DEVNULL)

    def close(self):
        """There is nothing in it to save: its first process dies, and the kernel ends all others with it."""
        if self.process is not None and self.process.poll() is None:
            if self.leader is not None:
                os.kill(self.leader, signal.SIGKILL)
            else:
                self.process.kill()
            self.process.wait()
        for folder in self.cgroups:
            parent = os.path.dirname(folder)
            with open(os.path.join(parent, "cgroup.procs"), "w") as processes:
                processes.write("0")
            remove_cgroup(folder)
        if hasattr(self, "work"):
            subprocess.run(["umount", "--recursive", "--lazy", self.work], check=False)
            os.rmdir(self.work)
