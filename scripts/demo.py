"""Runs daemon, engine and trainer as three processes, and proves every refit with code that shares nothing with them.

Called by scripts/demo, which builds first. Python's standard library only. One main thread, and one reader thread per
child. It knows the programs by their command lines and JSON lines alone.
"""

import argparse
import concurrent.futures
import ctypes
import hashlib
import json
import mmap
import os
import queue
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MODELS = ("tiny", "S", "B", "L", "XL")
CHANGED_SHARE_MIN = 0.99
DAEMON_START_S = 20
REPLY_S = 600
STOP_S = 10
LINES_SHOWN_MAX = 12
SABOTAGE_POINT = "copy.skip_tensor=skip"
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)

EPILOG = """\
what happens
  refitd     the daemon, on a socket in a private folder that is removed at the end
  engine     a diffusion transformer (DiT) that samples images all the time, with weights of its own
  trainer    the same DiT with other weights; takes AdamW steps on a denoising loss
  After every optimizer step the trainer asks for a refit: the daemon copies its weights once, straight into the
  engine's live parameters, between two denoising steps. Then two things are proven before the next step:
    digests  the SHA-256 of every tensor that the daemon reads in the engine's memory equals the one that this
             script computes (hashlib, nothing of refit) from the trainer's memory
    output   the engine's output on a fixed input equals the trainer's, bit for bit

columns
  loss       on a batch that never changes
  changed    parameter tensors that the optimizer step changed, byte by byte
  refit ms   the whole call, as the trainer sees it
  gate ms    the part of it in which the engine finishes the denoising step that it is in
  memcpy ms  one memcpy of as many bytes between shared pages, the best of a few on one and on more threads
  ratio      (refit - gate) / memcpy
  GB/s       bytes / (refit - gate)

examples
  scripts/demo                          ten steps of DiT-S, well under a minute once built
  scripts/demo --model XL --steps 3     the paper's largest (2.7 GB of weights; wants 20 GB of memory)
  scripts/demo --sabotage               the daemon's test build leaves one tensor out: this must fail, with exit 1

exit status: 0 every step was verified; 1 something was not, or failed; 2 wrong arguments; 130 interrupted
"""


class Failure(Exception):
    """What went wrong, in one line for a person; `lines` say more."""

    def __init__(self, text, lines=()):
        super().__init__(text)
        self.lines = list(lines)


class Screen:
    """A status line that overwrites itself on a terminal and stays silent elsewhere; plain lines everywhere."""

    def __init__(self):
        self.live = sys.stdout.isatty()

    def status(self, text):
        if self.live:
            print(f"\r\033[K{text}", end="", flush=True)

    def line(self, text=""):
        print(("\r\033[K" if self.live else "") + text, flush=True)


def die_with_parent():
    """Runs in a child before exec: should this script be killed, its children go too."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A process of the demo. Its stderr goes to a file, so that it can be shown if it fails."""

    def __init__(self, name, command, folder, environment=None, talks=True):
        self.name = name
        self.talks = talks
        self.errors_path = os.path.join(folder, name + ".stderr")
        self.events = queue.Queue()
        pipe = subprocess.PIPE if talks else subprocess.DEVNULL
        with open(self.errors_path, "wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe if talks else errors, stderr=errors, start_new_session=True,
                env={**os.environ, **(environment or {})}, preexec_fn=die_with_parent)

    def listen(self):
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self.events.put(line)
        self.events.put(None)

    def fault(self, text):
        with open(self.errors_path, errors="replace") as errors:
            lines = errors.read().splitlines()[-15:]
        return Failure(f"{self.name}: {text}", lines)

    def send(self, command):
        try:
            self.process.stdin.write((command + "\n").encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words are read by expect()

    def expect(self, event):
        """The next event, which must be `event`."""
        try:
            line = self.events.get(timeout=REPLY_S)
        except queue.Empty:
            raise self.fault(f"no {event!r} within {REPLY_S} s") from None
        if line is None:
            raise self.fault(f"ended with status {self.process.wait()} instead of {event!r}")
        try:
            message = json.loads(line)
        except ValueError:
            raise self.fault(f"printed no JSON: {line!r}") from None
        if message["event"] != event:
            details = message.get("details", []) if message["event"] == "error" else []
            text = message.get("message") or message.get("reason") or line.decode().strip()
            raise Failure(f"{self.name}: {message.get('code', message['event'])}: {text}", details)
        return message

    def ask(self, command, event=None):
        self.send(command)
        return self.expect(event or command)

    def stop(self, gently):
        """Ends the process in its own way, and if it does not go, in ours. Returns a complaint or None."""
        process = self.process
        if process.poll() is None:
            if not self.talks:
                process.terminate()
            elif gently:
                process.stdin.close()
            else:
                process.kill()
        elif process.returncode != 0:
            return f"{self.name} ended with status {process.returncode}"
        try:
            status = process.wait(timeout=STOP_S)
            return f"{self.name} ended with status {status}" if status != 0 else None
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"{self.name} did not end within {STOP_S} s and was killed"


class TrainerMemory:
    """The trainer's weights, read without its help: the memfd mapped through /proc, hashed with hashlib."""

    def __init__(self, ready):
        self.tensors = ready["tensors"]
        descriptor = os.open(f"/proc/{ready['pid']}/fd/{ready['fd']}", os.O_RDONLY)
        try:
            self.mapping = mmap.mmap(descriptor, ready["region_bytes"], prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def digest(self, tensor):
        begin = tensor["offset"]
        value = hashlib.sha256()
        value.update(tensor["dtype"].encode())
        value.update(repr(tuple(tensor["shape"])).encode())
        with memoryview(self.mapping) as view, view[begin:begin + tensor["bytes"]] as data:
            value.update(data)
        return value.hexdigest()

    def digests(self):
        names = [tensor["name"] for tensor in self.tensors]
        return dict(zip(names, self.pool.map(self.digest, self.tensors)))

    def close(self):
        self.pool.shutdown()
        self.mapping.close()


def differences(read, expected):
    """Tensors whose digests are not the same on both sides, as lines for a person."""
    lines = []
    for name in sorted(read.keys() | expected.keys()):
        if name not in read:
            lines.append(f"tensor {name}: the engine has none")
        elif name not in expected:
            lines.append(f"tensor {name}: the trainer has none")
        elif read[name] != expected[name]:
            lines.append(f"tensor {name}: the engine holds {read[name][:16]}..., the trainer {expected[name][:16]}...")
    return lines


class Demo:
    def __init__(self, options):
        self.options = options
        self.screen = Screen()
        self.children = []
        self.memory = None
        self.steps = []
        self.report = {"model": options.model, "sabotage": options.sabotage, "verified": False, "error": None,
                       "steps": self.steps}

    def binary(self, *parts):
        path = os.path.join(self.options.build_dir, *parts)
        if not os.access(path, os.X_OK):
            raise Failure(f"{path} is not there: build it first, or leave --build-dir out")
        return path

    def start(self, folder):
        options = self.options
        daemon_path = self.binary("daemon", "refitd_test" if options.sabotage else "refitd")
        trainer_path = self.binary("examples", "dit_trainer")
        engine_path = self.binary("examples", "dit_engine")
        socket_path = os.path.join(folder, "refitd.sock")

        self.screen.status("starting refitd")
        poison = {"REFIT_POINT": SABOTAGE_POINT} if options.sabotage else {}
        daemon = Child("refitd", [daemon_path, "--socket", socket_path], folder, poison, talks=False)
        self.children.append(daemon)
        self.wait_for(daemon, socket_path)

        # Idle OpenMP threads would spin on the cores that the copy needs.
        quiet = {"OMP_WAIT_POLICY": "passive"}
        common = ["--model", options.model, "--socket", socket_path]
        self.screen.status(f"making two DiT-{options.model}, one for each process")
        offload = ["--offload", "1"] if options.offload else []
        self.engine = Child("engine", [engine_path, *common, *offload], folder, quiet)
        self.children.append(self.engine)
        self.trainer = Child("trainer", [trainer_path, *common], folder, quiet)
        self.children.append(self.trainer)
        self.engine.listen()
        self.trainer.listen()
        self.engine_ready = self.engine.expect("ready")
        self.ready = self.trainer.expect("ready")
        self.memory = TrainerMemory(self.ready)
        self.report.update(tensors=len(self.ready["tensors"]), bytes=self.ready["bytes"],
                           loss_before=self.ready["evaluation_loss"])

    def wait_for(self, daemon, socket_path):
        deadline = time.monotonic() + DAEMON_START_S
        while time.monotonic() < deadline:
            if daemon.process.poll() is not None:
                raise daemon.fault(f"ended with status {daemon.process.returncode} at start")
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
                if probe.connect_ex(socket_path) == 0:
                    return
            time.sleep(0.01)
        raise daemon.fault(f"does not listen after {DAEMON_START_S} s")

    def check_weights_differ(self):
        """A proof of equality is worth nothing if both sides were equal before."""
        before = self.trainer.ask("digest")["tensors"]
        expected = self.memory.digests()
        same = [name for name in expected if before.get(name) == expected[name]]
        self.report["equal_before_first_refit"] = same
        learned = expected.keys() - set(self.ready["buffers"])
        if len(learned & set(same)) > len(learned) * (1 - CHANGED_SHARE_MIN):
            raise Failure("the engine holds the trainer's weights before the first refit", same)
        self.screen.line(f"before the first refit {len(expected) - len(same)} of {len(expected)} tensors differ"
                         + (f" (the same on both sides: {', '.join(same)})" if same else ""))

    def step(self, number):
        note = f"step {number}/{self.options.steps}: "
        self.screen.status(note + "training, while the engine samples")
        self.engine.ask("run", "running")
        step = self.trainer.ask("step")
        if number == 1:
            self.screen.status(note + "reading the engine's digests before the first refit")
            self.check_weights_differ()

        self.screen.status(note + "refit")
        refit = self.trainer.ask("refit")
        gate = self.engine.expect("gate")
        self.engine.ask("pause", "paused")
        self.screen.status(note + "memcpy of the same bytes")
        memcpy = self.trainer.ask("memcpy")
        self.screen.status(note + "digests of every tensor")
        digest = self.trainer.ask("digest")
        expected = self.memory.digests()
        self.screen.status(note + "the same input through both models")
        ours, theirs = self.trainer.ask("forward"), self.engine.ask("forward")

        gate_s = refit["phases_us"]["gate"] / 1e6
        move_s = max(refit["seconds"] - gate_s, 1e-9)
        wrong = differences(digest["tensors"], expected)
        device = digest["device"]
        device_wrong = [f"{line} (on the device)" for line in
                        differences(device, {name: expected[name] for name in device.keys() & expected.keys()})]
        row = {"step": number, "loss": step["evaluation_loss"], "parameters": step["parameters"],
               "changed": step["changed"], "unchanged": step["unchanged"], "version": refit["version"],
               "transaction": refit["transaction"], "refit_s": refit["seconds"], "phases_us": refit["phases_us"],
               "memcpy_s": memcpy["seconds"], "memcpy_threads": memcpy["threads"],
               "refit_without_gate_over_memcpy": move_s / memcpy["seconds"], "GBps": refit["bytes"] / move_s / 1e9,
               "digests": len(expected), "digests_equal": len(expected) - len(wrong), "device_digests": len(device),
               "mismatches": wrong + device_wrong,
               "output_sha256": theirs["sha256"], "output_equal": ours["sha256"] == theirs["sha256"]}
        complaints = self.complaints(row, refit, gate, digest, ours, theirs)
        row["verified"] = not complaints
        self.steps.append(row)
        self.screen.line(
            f"step {number:2}/{self.options.steps}  loss {row['loss']:.4f}  version {row['version']}  "
            f"refit {row['refit_s'] * 1e3:.2f} ms (gate {gate_s * 1e3:.2f})  memcpy {row['memcpy_s'] * 1e3:.2f} ms  "
            f"SHA-256 {row['digests_equal']}/{row['digests']}"
            + (f" and {row['device_digests']} on the device" if self.options.offload else "")
            + f"  output {'equal' if row['output_equal'] else 'DIFFERS'}")
        if complaints:
            note = "; the sabotage was noticed" if self.options.sabotage and row["mismatches"] else ""
            raise Failure(f"step {number} is not verified{note}", complaints)

    def complaints(self, row, refit, gate, digest, ours, theirs):
        version = refit["version"]
        lines = list(row["mismatches"])
        if not row["output_equal"]:
            lines.append(f"output: the engine's begins {theirs['values']}, the trainer's {ours['values']}")
        if digest["state"] != "committed":
            lines.append(f"the module's state is {digest['state']}, not committed")
        seen = {"the refit": version, "the digests": digest["version"], "the engine": theirs["version"],
                "the gate": gate["modules"][0]["version"]}
        if len(set(seen.values())) != 1:
            lines.append("versions differ: " + ", ".join(f"{who} says {what}" for who, what in seen.items()))
        if len(self.steps) > 0 and version <= self.steps[-1]["version"]:
            lines.append(f"the version did not grow: {self.steps[-1]['version']}, then {version}")
        if refit["bytes"] != self.ready["bytes"] or refit["tensors"] != len(self.ready["tensors"]):
            lines.append(f"the refit moved {refit['tensors']} tensors and {refit['bytes']} bytes of "
                         f"{len(self.ready['tensors'])} and {self.ready['bytes']}")
        if self.options.offload and not digest["device"]:
            lines.append("no layer was resident: the device was not checked")
        if row["changed"] < CHANGED_SHARE_MIN * row["parameters"]:
            lines.append(f"the optimizer changed {row['changed']} of {row['parameters']} parameter tensors only; not "
                         + ", ".join(row["unchanged"]))
        return lines

    def table(self):
        heads = ("step", "loss", "changed", "version", "refit ms", "gate ms", "memcpy ms", "ratio", "GB/s", "SHA-256",
                 "output")
        rows = [heads]
        for row in self.steps:
            rows.append((str(row["step"]), f"{row['loss']:.4f}", f"{row['changed']}/{row['parameters']}",
                         str(row["version"]), f"{row['refit_s'] * 1e3:.2f}", f"{row['phases_us']['gate'] / 1e3:.2f}",
                         f"{row['memcpy_s'] * 1e3:.2f}", f"{row['refit_without_gate_over_memcpy']:.2f}",
                         f"{row['GBps']:.1f}", f"{row['digests_equal']}/{row['digests']}",
                         "equal" if row["output_equal"] else "DIFFERS"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        self.screen.line()
        for i, row in enumerate(rows):
            self.screen.line("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
            if i == 0:
                self.screen.line("  ".join("-" * width for width in widths))
        self.screen.line()

    def summary(self):
        steps = self.steps
        median = {key: statistics.median(row[key] for row in steps)
                  for key in ("refit_without_gate_over_memcpy", "GBps")}
        self.report["median"] = median
        self.screen.line(
            f"verified: {len(steps)} of {self.options.steps} steps. DiT-{self.options.model}, "
            f"{self.report['tensors']} tensors, {self.report['bytes'] / 1e6:.1f} MB: a refit took "
            f"{median['refit_without_gate_over_memcpy']:.2f} x one memcpy ({median['GBps']:.1f} GB/s, medians, gate "
            f"apart); loss {self.report['loss_before']:.4f} -> {steps[-1]['loss']:.4f}")

    def stop(self, gently):
        """Ends every child; nothing may interrupt that. Returns what was wrong with their ends."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        complaints = []
        if self.memory is not None:
            self.memory.close()
        for child in reversed(self.children):  # the daemon was first and goes last
            complaint = child.stop(gently)
            if complaint:
                complaints.append(complaint)
        return complaints

    def run(self, folder):
        try:
            self.start(folder)
            self.screen.line(f"DiT-{self.options.model}: {self.report['tensors']} tensors, "
                             f"{self.report['bytes'] / 1e6:.1f} MB; refitd pid {self.children[0].process.pid}, engine "
                             f"pid {self.engine_ready['pid']}, trainer pid {self.ready['pid']}"
                             + ("; one tensor will be left out on purpose" if self.options.sabotage else ""))
            for number in range(1, self.options.steps + 1):
                self.step(number)
        except BaseException:
            self.stop(gently=False)
            if self.steps:
                self.table()
            raise
        complaints = self.stop(gently=True)
        if complaints:
            raise Failure("every step was verified, but the processes did not end well", complaints)
        self.report["verified"] = True
        self.table()
        self.summary()


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="scripts/demo", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG,
        description="Trains a diffusion transformer and moves its weights into a running engine after every step.")
    parser.add_argument("--model", choices=MODELS, default="S", help="size of the DiT, as in the paper (default: S)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="optimizer steps, each with a refit (10)")
    parser.add_argument("--json", metavar="FILE", help="also write everything that was measured to FILE")
    parser.add_argument("--sabotage", action="store_true",
                        help="let the daemon's test build skip one tensor, to see that the demo notices")
    parser.add_argument("--offload", action="store_true",
                        help="let the engine offload its blocks layer by layer; both places are verified")
    parser.add_argument("--build-dir", metavar="DIR", help="use what is built in DIR; no set-up, no build")
    parser.add_argument("--only-parse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    if options.build_dir is None:
        options.build_dir = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "build/release")
    return options


def leave(number, _frame):
    raise SystemExit(128 + number)


def main():
    options = parse(sys.argv[1:])
    if options.only_parse:
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    if options.json:
        try:
            open(options.json, "w").close()
        except OSError as error:
            print(f"scripts/demo: cannot write {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    demo = Demo(options)
    folder = tempfile.mkdtemp(prefix="refit-demo-")
    status = 1
    try:
        demo.run(folder)
        status = 0
    except Failure as failure:
        demo.report["error"] = {"text": str(failure), "lines": failure.lines}
        lines = failure.lines[:LINES_SHOWN_MAX]
        if len(failure.lines) > len(lines):
            lines.append(f"... and {len(failure.lines) - len(lines)} more (--json FILE lists all)")
        print("\n".join([f"NOT VERIFIED: {failure}", *("  " + line for line in lines)]), file=sys.stderr)
    except KeyboardInterrupt:
        demo.report["error"] = {"text": "interrupted", "lines": []}
        status = 128 + signal.SIGINT
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump(demo.report, file, indent=2)
                file.write("\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
