#!/usr/bin/env python3
"""scripts/gpu-check as far as it goes without a GPU: the pack names nothing of this machine, the tables say what a
record says and nothing of a fake driver, a step that fails or cannot run ends no other and is no success, and every
question to the driver is answered by the fake one.

  tests/install/gpu_check_test.py BUILD_DIR
"""
import copy
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest

sys.dont_write_bytecode = True
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from gpu_check import pack, record, steps, tables  # noqa: E402

PROGRAM = ROOT / "scripts" / "gpu-check"
BUILD = None
OPENS = {"opens": True, "reads_right": True, "event_opens": False, "event_refusal": "cuIpcOpenEventHandle: NO (400)"}
RECORD = {
    "fake": False, "driver_version": 13000, "devices": [{"name": "A Card"}],
    "steps": [
        {"step": "two users, vmm", "result": "passed", "seconds": 1.5, "why": "",
         "facts": {"client_to_root": OPENS, "client_to_user": OPENS}},
        {"step": "two users, legacy", "result": "failed", "seconds": 1.0, "why": "wrong | bytes",
         "facts": {"client_to_root": {"opens": False, "refusal": "cuIpcOpenMemHandle: NO (1)"}}},
        {"step": "costs of opening", "result": "passed", "seconds": 2.0, "why": "",
         "facts": {"map_segment_2_MiB_us": {"first": 400.0, "open": 57.0, "close": 30.0}}},
        {"step": "bench, cuda", "result": "not run", "seconds": 0.0, "why": "absent", "facts": {"refit_over_memcpy": 9}},
    ],
}


def run(*words, **how):
    return subprocess.run([str(PROGRAM), *map(str, words)], capture_output=True, text=True, check=False, **how)


class Pack(unittest.TestCase):
    def test_names_nothing_of_this_machine_and_holds_what_a_build_needs(self):
        with tempfile.TemporaryDirectory() as folder:
            made = pathlib.Path(folder) / "pack.tar"
            pack.write(ROOT, made)
            here = [str(place).encode() + b"/" for place in (ROOT, pathlib.Path(folder))]
            home = [str(pathlib.Path.home()).encode() + b"/"]  # a script of the source may say as much of another root
            names = set()
            with tarfile.open(made) as tar:
                for member in tar:
                    self.assertTrue(member.isfile() and member.name.startswith(pack.FOLDER + "/"), member.name)
                    self.assertNotIn("..", member.name)
                    self.assertEqual((member.uid, member.gid, member.uname, member.mtime), (0, 0, "", 0), member.name)
                    data = tar.extractfile(member).read()
                    name = member.name.removeprefix(pack.FOLDER + "/")
                    for place in here + (home if name.startswith("carried/") else []):
                        self.assertFalse(place in data, f"{name} names {place.decode()}")
                    names.add(name)
        for name in ("scripts/gpu-check", "CMakeLists.txt", "carried/generated/refit_generated.h",
                     "carried/include/boost/interprocess/managed_external_buffer.hpp", "carried/lib/libcrypto.a",
                     "carried/lib/systemd/libsystemd.so.0", "carried/include/openssl/opensslconf.h"):
            self.assertIn(name, names)
        nvcc = shutil.which("nvcc") or pathlib.Path("/usr/local/cuda/bin/nvcc").exists()
        if nvcc and "carried/cuda/include/cuda.h" in names:
            self.assertIn("carried/cuda/kernels.fatbin", names)
        self.assertFalse([name for name in names if name.startswith(("build/", ".git/"))])


class Tables(unittest.TestCase):
    def test_of_no_run_are_those_of_the_page(self):
        with tempfile.TemporaryDirectory() as folder:
            page = pathlib.Path(folder) / "gpu.md"
            page.write_text((ROOT / "docs" / "gpu.md").read_text())
            before = page.read_text()
            if "not run on hardware" in before:
                self.assertEqual(run("--tables", "none", "--page", page).returncode, 0)
                self.assertEqual(page.read_text(), before, "run scripts/gpu-check --tables none")

    def test_say_what_the_record_says_and_where_it_says_nothing(self):
        text = tables.render(RECORD)
        rows = dict(line.strip("| ").split(" | ", 1) for line in text.splitlines() if line.startswith("| "))
        self.assertIn("A Card, driver 13000", text)
        self.assertEqual(rows["a client's segments by fd in a daemon of root"],
                         "yes; an event of that user does not: cuIpcOpenEventHandle: NO (400)")
        self.assertIn("no: cuIpcOpenMemHandle: NO (1)", rows["a client's legacy handle in a daemon of root"])
        self.assertEqual(rows["the same in a daemon of another user"][:3], "yes")
        self.assertEqual(rows["mapping a segment of 2 MiB"], "first 400.0 us, then 57.0 us; closing 30.0 us")
        self.assertEqual(rows["mapping a segment of 20 MiB"], tables.NOT_RUN)
        self.assertEqual(rows["a refit from legacy memory, against cuMemcpyDtoD of the same bytes"], tables.NOT_RUN)
        self.assertEqual(rows["two users, legacy"], "failed: wrong / bytes | 1.0")
        self.assertEqual(rows["bench, cuda"], "not run: absent | 0.0")

    def test_of_the_fake_driver_are_refused_and_the_page_stays(self):
        fake = copy.deepcopy(RECORD)
        fake["fake"] = True
        with tempfile.TemporaryDirectory() as folder:
            page, made = pathlib.Path(folder) / "page.md", pathlib.Path(folder) / "record.json"
            made.write_text(json.dumps(fake))
            page.write_text(f"a\n{tables.BEGIN}\nb\n{tables.END}\n")
            done = run("--tables", made, "--page", page)
            self.assertEqual(done.returncode, 2)
            self.assertIn("fake driver", done.stderr)
            self.assertIn("\nb\n", page.read_text())
            made.write_text(json.dumps(RECORD))
            page.write_text(f"a\n{tables.END}\nb\n{tables.BEGIN}\n")
            done = run("--tables", made, "--page", page)
            self.assertEqual((done.returncode, "marks" in done.stderr), (2, True))
            self.assertIn("\nb\n", page.read_text())


class Steps(unittest.TestCase):
    def judged(self, *outputs):
        return steps.judge([(f"S.{i}", status, text) for i, (status, text) in enumerate(outputs)])

    def test_that_fail_or_cannot_run_end_no_other_and_are_no_success(self):
        with tempfile.TemporaryDirectory() as folder:
            log = pathlib.Path(folder) / "log"
            sut = record.Run(log, log.with_suffix(".json"), fake=True, limit_s=60)
            self.assertFalse(sut.is_good())

            def fail():
                raise record.Failed("it broke", {"fact": 1})

            def cannot():
                raise record.NotRun("no GPU")
            sut.step("good", lambda: ("found", {}))
            self.assertTrue(sut.is_good())
            sut.step("absent", cannot)
            self.assertFalse(sut.is_good())
            del sut.steps[1]
            sut.step("bad", fail)
            sut.step("broken", lambda: {}["key"])
            sut.step("absent", cannot)
            sut.step("slow", lambda: (str(sut.command(["sleep", "30"], 0.2)[0]), {}))
            sut.end = 0
            sut.step("late", lambda: ("", {}))
            self.assertEqual([entry["result"] for entry in sut.as_record()["steps"]],
                             ["passed", "failed", "failed", "not run", "passed", "not run"])
            self.assertEqual(sut.steps[1]["facts"], {"fact": 1})
            self.assertEqual(sut.steps[4]["found"], "None")
            self.assertFalse(sut.is_good())
            self.assertEqual(json.loads(log.with_suffix(".json").read_text()), sut.as_record())
            sut.print_table()
            self.assertIn("not run: no GPU", log.read_text())
            sut.log.close()

    def test_of_gtest_pass_only_where_every_test_ran(self):
        passed = (0, "[  PASSED  ] 1 test.\n")
        fake_only = (0, "x.cpp:1: Skipped\nfake only: schedules\n[  SKIPPED ] 1 test\n")
        too_few = (0, "x.cpp:1: Skipped\nnot run: needs 2 devices, and there is 1\n[  SKIPPED ] 1 test\n")
        found, facts = self.judged(passed, fake_only)
        self.assertEqual((facts["passed"], len(facts["fake_only"])), (1, 1), found)
        for outputs, error, part in (
                ((passed, too_few), record.NotRun, "needs 2 devices"),
                ((fake_only,), record.NotRun, "another kind of driver"),
                ((passed, (-6, "fixture failed")), record.Failed, "S.1: exit status -6"),
                ((passed, (None, "")), record.Failed, "ran too long"),
                ((passed, (0, "")), record.Failed, "ran no test"),
                ((passed, (0, "[  SKIPPED ] 1 test")), record.NotRun, "it says not why")):
            with self.assertRaisesRegex(error, part):
                self.judged(*outputs)

    def test_list_tests_with_their_parameters(self):
        listing = "Running main() from x\nMemory/Refit.\n  One/CudaVmm  # GetParam() = 8\n  Two/CudaVmm\nPlain.\n  Test\n" \
                  "  DISABLED_Table\n"
        self.assertEqual(steps.list_of_tests(listing),
                         ["Memory/Refit.One/CudaVmm", "Memory/Refit.Two/CudaVmm", "Plain.Test"])


class Program(unittest.TestCase):
    def test_tells_its_use_and_refuses_what_it_does_not_know(self):
        self.assertEqual(run("--help").returncode, 0)
        self.assertIn("--pack", run("--help").stdout)
        self.assertEqual(run("--no-such-option").returncode, 2)
        done = run("--tables", "/nonexistent/record.json")
        self.assertEqual((done.returncode, done.stderr.startswith("gpu-check: ")), (2, True), done.stderr)


class Questions(unittest.TestCase):
    def ask(self, question):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            os.chmod(folder, 0o777)
            done = subprocess.run(
                [sys.executable, "-B", "-m", "gpu_check.facts", question], capture_output=True, text=True, check=False,
                timeout=100, env={**os.environ, "PYTHONPATH": str(ROOT / "scripts"), "FAKECUDA_DIR": folder,
                                  "LD_LIBRARY_PATH": str(BUILD / "tests" / "support" / "fake_cuda")})
        # The driver itself ends a process with another status that misused it.
        self.assertEqual(done.returncode, 0, done.stderr)
        return json.loads(done.stdout)

    def test_are_answered_by_the_fake_driver_without_a_violation(self):
        for question, _ in steps.QUESTIONS:
            answer = self.ask(question)
            if question == "full_queue":
                self.assertIn("cuLaunchHostFunc", answer["not_run"])
                continue
            if question.startswith("users_") and os.getuid() != 0:
                self.assertIn("root", answer["not_run"])
                continue
            self.assertIsNone(answer["failed"], f"{question}: {answer}")
            steps.summary_of(question, answer["facts"])
            if question == "users_vmm":
                self.assertTrue(answer["facts"]["client_to_user"]["opens"])
            if question == "users_legacy":
                self.assertIn("cuIpcOpenMemHandle", answer["facts"]["client_to_root"]["refusal"])
            if question == "exporter_death":
                self.assertEqual(answer["facts"]["legacy"]["after_0.0_s"], "other")



class Suite(unittest.TestCase):
    def test_runs_on_a_driver_of_which_it_knows_nothing(self):
        """As on hardware: a driver with 2 MiB segments that tells nothing: the fake one, less what tests ask it by name."""
        with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
            os.chmod(folder, 0o777)
            library = (BUILD / "tests" / "support" / "fake_cuda" / "libcuda.so.1").read_bytes()
            (pathlib.Path(folder) / "libcuda.so.1").write_bytes(library.replace(b"fakecuda_", b"nobodys__"))
            run_of = record.Run(pathlib.Path(folder) / "log", pathlib.Path(folder) / "record", fake=False, limit_s=250)
            sut = steps.Steps(run_of, ROOT, BUILD, jobs=2, quick=True)
            sut.built = {"conformance_cuda_test", "conformance_cuda_seeds_test"}
            driver = {"FAKECUDA_DIR": folder, "LD_LIBRARY_PATH": folder}
            _, facts = sut.tests("conformance_cuda_test", "*BadDeviceMemory*:*Devices*:*CudaUsers*", driver)
            self.assertGreater(facts["passed"], 30)
            self.assertTrue(all("fake only: " in line for line in facts["fake_only"]), facts["fake_only"])
            self.assertTrue(any("counted calls" in line for line in facts["fake_only"]), facts["fake_only"])
            _, facts = sut.tests("conformance_cuda_seeds_test", "*CudaFences*none:*CudaFences*done:*CudaSeeds*mixed", driver)
            self.assertEqual((facts["passed"], len(facts["fake_only"])), (1, 2))
            run_of.log.close()


if __name__ == "__main__":
    BUILD = pathlib.Path(sys.argv.pop(1)).resolve()
    unittest.main(verbosity=2)
