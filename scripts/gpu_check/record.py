"""One run: steps in order, each timed and judged, none of which ends the others; a log of all of it and a record."""
import json
import os
import pathlib
import signal
import subprocess
import threading
import time


class NotRun(Exception):
    """Why a step could not run here."""


class Failed(Exception):
    """Why a step failed, with the facts that it found all the same."""

    def __init__(self, why, facts=None):
        super().__init__(why)
        self.facts = facts or {}


class Run:
    """Threads: say() and command() any, the rest one."""

    def __init__(self, log, result, fake, limit_s):
        self.log = open(log, "w", encoding="utf-8", errors="replace")  # for the process's life
        self.result = pathlib.Path(result)
        self.log_lock = threading.Lock()
        self.fake = fake
        self.limit_s = limit_s
        self.end = time.monotonic() + limit_s
        self.steps = []
        self.about = {}

    def note(self, text):
        """For the log alone."""
        with self.log_lock:
            self.log.write(text.rstrip("\n") + "\n")
            self.log.flush()

    def say(self, text):
        print(text, flush=True)
        self.note(text)

    def command(self, words, timeout_s, environment=None, cwd=None):
        """Runs to its end or the limit, then kills all that it started. Returns (exit status, output); the status is
        None after a limit."""
        left = min(timeout_s, max(1.0, self.end - time.monotonic()))
        with subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})}, cwd=cwd,
                              start_new_session=True) as process:
            try:
                output, _ = process.communicate(timeout=left)
                status = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                status = None
        text = output.decode(errors="replace")
        ended = f"[ran past {left:.0f} s]" if status is None else f"[exit status {status}]"
        self.note(f"$ {' '.join(map(str, words))}\n{text}{ended}")  # at once, as several run beside each other
        return status, text

    def step(self, name, body):
        """`body()` returns (a line that says what was found, facts)."""
        begin = time.monotonic()
        entry = {"step": name, "result": "passed", "why": "", "found": "", "facts": {}}
        self.note(f"\n==== {name}")
        try:
            if begin > self.end:
                raise NotRun("the time of this run is over")
            entry["found"], entry["facts"] = body()
        except NotRun as why:
            entry.update(result="not run", why=str(why))
        except Failed as why:
            entry.update(result="failed", why=str(why), facts=why.facts)
        except Exception as error:  # pylint: disable=broad-except  # a fault of this program is a failed step too
            entry.update(result="failed", why=f"{type(error).__name__}: {error}")
        entry["seconds"] = round(time.monotonic() - begin, 1)
        self.steps.append(entry)
        self.write()  # after each step: whoever lends the host may take it back at any moment
        about = entry["found"] if entry["result"] == "passed" else entry["why"]
        verdict = "not run: " if entry["result"] == "not run" else entry["result"] + ("  " if about else "")
        self.say(f"{name:<34} {entry['seconds']:>6.1f} s  {verdict}{' '.join(about.split())[:400]}")

    def as_record(self):
        return {**self.about, "fake": self.fake, "steps": self.steps}

    def write(self):
        self.result.write_text(json.dumps(self.as_record(), indent=1) + "\n")

    def print_table(self):
        self.say("\n| step | result | seconds |\n|---|---|---|")
        for entry in self.steps:
            self.say(f"| {entry['step']} | {entry['result']} | {entry['seconds']} |")
        counts = {result: sum(entry["result"] == result for entry in self.steps)
                  for result in ("passed", "failed", "not run")}
        self.say(", ".join(f"{count} {result}" for result, count in counts.items()))

    def is_good(self):
        return bool(self.steps) and all(entry["result"] == "passed" for entry in self.steps)
