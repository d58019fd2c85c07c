"""The steps of a run on a host with a GPU, the most informative first: what the driver does, the build, two users, the
conformance suite on real memory, torch, casts, the benchmark."""
import concurrent.futures
import json
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile

from gpu_check.record import Failed, NotRun

QUESTIONS = [  # question of facts.py, name of the step
    ("devices", "driver and devices"),
    ("users_vmm", "two users, vmm"),
    ("users_legacy", "two users, legacy"),
    ("small_allocations", "small allocations"),
    ("exporter_death", "memory of a killed process"),
    ("costs", "costs of opening"),
    ("full_queue", "a full queue"),
]
TARGETS = ["refitd", "refitd_test", "refitctl", "conformance_cuda_test", "conformance_cuda_seeds_test", "refit_bench"]
TORCH_TARGET = "conformance_torch_cuda_test"
# Every cast against the device's.
CAST_TARGET = "conformance_cuda_casts_test"
# On the fake driver alone: they inject faults into it, count its calls, or test it.
FAKE_ONLY_PROGRAMS = ["conformance_cuda_faults_test", "unit_cuda_test", "unit_cuda_copier_test", "unit_fake_cuda_test"]
SKIPPED = re.compile(r"^(fake only|real only|not run|NOT TESTED): (.*)$", re.MULTILINE)

TORCH_SCRIPT = """
import json, pathlib, torch
print(json.dumps({"folder": str(pathlib.Path(torch.__file__).parent), "version": torch.__version__,
  "cuda": torch.version.cuda, "new_abi": bool(torch._C._GLIBCXX_USE_CXX11_ABI), "sees": torch.cuda.is_available()}))
"""


class Steps:
    def __init__(self, run, root, build, jobs, quick):
        self.run, self.root, self.build = run, pathlib.Path(root), pathlib.Path(build)
        self.jobs, self.quick = jobs, quick
        self.carried = self.root / "carried"
        self.torch = None
        self.built = set()
        self.environment = {} if run.fake else {"REFIT_TEST_REAL_CUDA": "1"}
        self.fake_folder = None

    # ---- order

    def all(self):
        run = self.run
        run.step("host", self.host)
        if run.fake:  # the fake driver has to be there first
            run.step("build", self.build_all)
        # The fake driver's devices are files in it.
        memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
        with tempfile.TemporaryDirectory(prefix="refit-gpu-check-", dir=memory) as folder:
            os.chmod(folder, 0o777)
            self.fake_folder = folder
            for question, name in QUESTIONS:
                run.step(name, lambda question=question: self.ask(question))
            if not run.fake:
                run.step("build", self.build_all)
            run.step("refitctl doctor", self.doctor)
            run.step("two users by the daemon, vmm", lambda: self.users_by_daemon("Vmm"))
            run.step("two users by the daemon, legacy", lambda: self.users_by_daemon("Legacy"))
            suite = "conformance_cuda_test"
            run.step("conformance, legacy", lambda: self.tests(suite, "*/CudaLegacy-*SeveralDevices*:*CudaUsers*"))
            run.step("conformance, vmm", lambda: self.tests(suite, "*/CudaVmm-*SeveralDevices*:*CudaUsers*"))
            run.step("conformance, several devices", lambda: self.tests(suite, "*SeveralDevices*"))
            # Hundreds of seeds are the fake driver's, and no part of a rehearsal.
            late = "*CudaFences*" if run.fake else "*"
            run.step("late work, and waits left out", lambda: self.tests(
                "conformance_cuda_seeds_test", late, timeout_s=200))
            run.step("torch, build", self.torch_build)
            run.step("torch, default allocator", lambda: self.torch_tests({}))
            run.step("torch, expandable segments", lambda: self.torch_tests({
                "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC": "1"}))
            run.step("casts", self.casts)
            for memory in ("cuda", "cuda-vmm", "offload"):
                run.step(f"bench, {memory}", lambda memory=memory: self.bench(memory))

    # ---- what is here

    def host(self):
        if not shutil.which("cmake"):
            raise Failed("no cmake: 3.25 or newer is needed; PyTorch hosts often have pip's")
        compiler = os.environ.get("CXX", "c++")
        for words in ((compiler, "--version"), ("cmake", "--version"), ("ldd", "--version"), ("nvidia-smi",),
                      ("nvidia-smi", "topo", "-m"), ("nvcc", "--version"), ("id",)):
            if shutil.which(words[0]):
                self.run.command(words, 30)
        if not shutil.which(compiler):
            raise Failed(f"no C++ compiler ({compiler}): one with C++20 is needed, g++ 11 or clang 14")
        status, text = self.run.command([sys.executable, "-c", TORCH_SCRIPT], 120)
        torch = "no torch in this Python"
        if status == 0:
            self.torch = json.loads(text.strip().splitlines()[-1])
            torch = f"torch {self.torch['version']}"
            if not self.torch["new_abi"]:
                torch += " of the pre-C++11 ABI"
        where = "carried libraries" if self.carried.is_dir() else "this host's packages"
        facts = {"kernel": platform.release(), "libc": " ".join(platform.libc_ver()), "cpus": os.cpu_count(),
                 "uid": os.getuid(), "torch": self.torch}
        closed = [folder for folder in self.build.parents if not folder.stat().st_mode & 0o001]
        if self.run.fake and facts["uid"] == 0 and closed:
            raise Failed(f"other users may not enter {closed[-1]}, and the fake driver lies in it: rehearse elsewhere", facts)
        return f"{facts['kernel']}, {facts['libc']}, {facts['cpus']} CPUs, {torch}; {where}", facts

    def driver_environment(self):
        """For programs that load whatever libcuda.so.1 is found."""
        if not self.run.fake:
            return {}
        return {"FAKECUDA_DIR": self.fake_folder,
                "LD_LIBRARY_PATH": str(self.build / "tests" / "support" / "fake_cuda")}

    def ask(self, question):
        status, text = self.run.command(
            [sys.executable, "-B", "-m", "gpu_check.facts", question], 90,
            {**self.driver_environment(), "PYTHONPATH": str(self.root / "scripts")})
        lines = [line for line in text.splitlines() if line.startswith("{")]
        if not lines:
            raise Failed("ran too long" if status is None else f"no answer: {text.strip()[-300:]}")
        answer = json.loads(lines[-1])
        facts = answer["facts"]
        if "not_run" in answer:
            raise NotRun(answer["not_run"])
        if question == "devices" and not answer["failed"]:
            self.run.about.update({key: facts[key] for key in ("driver_version", "devices")})
            if facts["fake"] != self.run.fake:
                raise Failed("the fake driver was found where a real one was asked for, or the reverse", facts)
        if answer["failed"]:
            raise Failed(answer["failed"], facts)
        if status != 0:
            raise Failed(f"exit status {status} after the answer", facts)
        return summary_of(question, facts), facts

    # ---- build

    def torch_options(self):
        if self.torch and self.torch["cuda"] and self.torch["new_abi"]:
            return [f"-DREFIT_TORCH_WHEEL={self.torch['folder']}"]
        # The libtorch of a package will do for a rehearsal: no tensor of torch's own is on the fake driver.
        return ["-DREFIT_TORCH=ON"] if self.run.fake and not self.carried.is_dir() else ["-DREFIT_TORCH=OFF"]

    def build_all(self):
        options = ["-DCMAKE_BUILD_TYPE=Release"]
        if self.carried.is_dir():
            options += [f"-DREFIT_CARRIED={self.carried}"]
            if (self.carried / "cuda").is_dir():
                options += [f"-DREFIT_CUDA_INCLUDE={self.carried}/cuda/include"]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        note = ""
        for torch in (self.torch_options(), ["-DREFIT_TORCH=OFF"]):
            status, text = self.run.command(
                ["cmake", *generator, "-S", self.root, "-B", self.build, *options, *torch], 120)
            if status == 0:
                break
            note = "; without torch, whose libtorch was refused"
        if status != 0:
            raise Failed(f"cmake: {text.strip()[-600:]}")
        if "CUDA's headers not found" in text:
            raise Failed("no headers of CUDA 13 (cudaTypedefs.h): set CUDA_PATH to a toolkit, or pack where there is one")
        # Together, so that no core waits for the last of each; what of them is missing is said where it is needed.
        beside = [target for target in (TORCH_TARGET, CAST_TARGET) if self.has_target(target)]
        missing = [target for target in self.make(TARGETS + beside) if target in TARGETS]
        if missing:
            raise Failed(f"not built: {', '.join(missing)}; the log has why")
        return f"{len(self.built)} programs on {self.jobs} CPUs{note}", {"targets": sorted(self.built)}

    def make(self, targets):
        """Builds what can be built of `targets`; returns the rest."""
        keep_going = ["--", "-k", "0"] if shutil.which("ninja") else ["--", "-k"]
        # The questions to the driver need no build, and are worth what it leaves them.
        self.run.command(["cmake", "--build", self.build, "-j", str(self.jobs), "--target", *targets, *keep_going],
                         self.run.limit_s * 3 / 4)
        self.built.update(target for target in targets if self.program(target))
        return [target for target in targets if target not in self.built]

    def has_target(self, target):
        _, text = self.run.command(["cmake", "--build", self.build, "--target", "help"], 60)
        return re.search(rf"(^|\s){re.escape(target)}\b", text) is not None

    def program(self, target):
        found = [path for path in self.build.rglob(target) if path.is_file() and os.access(path, os.X_OK)]
        return found[0] if found else None

    def need(self, target):
        if target not in self.built:
            raise NotRun(f"{target} was not built")
        return self.program(target)

    # ---- tests

    def tests(self, target, chosen, environment=None, timeout_s=120):
        """Each test in a process of its own: one that dies or hangs takes no other with it."""
        program = self.need(target)
        status, listing = self.run.command([program, f"--gtest_filter={chosen}", "--gtest_list_tests"], 60,
                                           self.environment)
        names = list_of_tests(listing)
        if status != 0 or not names:
            raise Failed(f"no test is called {chosen}: {listing.strip()[-300:]}")

        def one(name):
            status, text = self.run.command([program, f"--gtest_filter={name}"], timeout_s,
                                            {**self.environment, **(environment or {})})
            return name, status, text
        with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, self.jobs)) as pool:
            results = list(pool.map(one, names))
        return judge(results)

    def users_by_daemon(self, kind):
        return self.tests("conformance_cuda_test", f"*CudaUsers*/Cuda{kind}")

    def torch_build(self):
        if not self.torch and not self.run.fake:
            raise NotRun("this Python has no torch")
        if self.torch and self.torch["cuda"] and not self.torch["new_abi"]:
            raise NotRun(f"torch {self.torch['version']} is of the pre-C++11 ABI of std::string, which the libraries "
                         "here are not: a PyTorch of the new ABI is needed (2.7 or newer)")
        if self.torch and not self.torch["cuda"] and not self.run.fake:
            raise NotRun(f"torch {self.torch['version']} has no CUDA")
        if not self.has_target(TORCH_TARGET):
            raise NotRun("no libtorch was found")
        if TORCH_TARGET not in self.built:
            raise Failed("not built; the log has why")
        return TORCH_TARGET, {}

    def torch_tests(self, environment):
        found, facts = self.tests(TORCH_TARGET, "*", environment)
        facts["answer"] = next((line for line in facts["said"] if line.startswith("torch's memory")), "")
        return found, facts

    def casts(self):
        if not self.has_target(CAST_TARGET):
            raise NotRun("absent: this tree has no test of casts on a device")
        if CAST_TARGET not in self.built:
            raise Failed("not built; the log has why")
        return self.tests(CAST_TARGET, "*", timeout_s=300)

    # ---- programs

    def doctor(self):
        program = self.need("refitctl")
        # Its status is of a daemon that is not there; what it says of the devices is asked here.
        _, text = self.run.command([program, "doctor", "--json"], 60, self.driver_environment())
        try:
            checks = json.loads(text[text.index("{"):])
        except ValueError as error:
            raise Failed(f"no JSON of doctor: {text.strip()[-300:]}") from error
        return "its words are in the record", {"doctor": checks}

    def bench(self, memory):
        program = self.need("refit_bench")
        _, text = self.run.command([program, "--help"], 30)
        if "--memory" not in text:
            raise NotRun("absent: refit_bench of this tree has no --memory")
        figures_path = self.build / f"bench-{memory}.json"
        words = [program, "--memory", memory, "--manifest", self.root / "bench" / "manifests" / "wan2.1-t2v-1.3b.json",
                 "--only", "overhead,refit,check,counts", "--json", figures_path, "--quiet"]
        if self.quick:
            words += ["--quick", "--scale", "0.05", "--steps", "3"]
        status, text = self.run.command(words, 120, self.driver_environment())
        if status != 0:
            raise Failed("ran too long" if status is None else f"exit status {status}: {text.strip()[-400:]}")
        figures = json.loads(figures_path.read_text())
        over = figures.get("refit_over_memcpy")
        if not isinstance(over, (int, float)):
            raise Failed(f"the bench measured no refit beside a copy: {over}", {})
        return f"refit over the copy of the same bytes: {over:.3f}", figures


def summary_of(question, facts):
    if question == "devices":
        version = facts["driver_version"]
        return (f"CUDA {version // 1000}.{version % 1000 // 10}: "
                + ", ".join(f"{device['name']} ({device['memory_MiB']} MiB)" for device in facts["devices"]))
    if question.startswith("users_"):
        parts = []
        for name in ("client_to_root", "client_to_user"):
            answer = facts[name]
            parts.append(f"{name.replace('_', ' ')}: {'opens' if answer.get('opens') else answer.get('refusal')}, event "
                         f"{'opens' if answer.get('event_opens') else answer.get('event_refusal')}")
        return "; ".join(parts)
    if question == "costs":
        return ", ".join(f"{name.removesuffix('_us')} {one['open']} us" for name, one in facts.items()
                         if isinstance(one, dict) and "open" in one)
    if question == "full_queue":
        return f"{facts['calls_before_one_waited']} calls, the last took {facts['that_one_ms']} ms"
    if question == "exporter_death":
        return "; ".join(f"{kind}: {facts[kind].get('after_0.0_s')}, then {facts[kind].get('after_1.5_s')}"
                         for kind in ("legacy", "vmm"))
    return ""


def list_of_tests(listing):
    """Full names from what --gtest_list_tests prints, less those that only run when asked for."""
    names, suite = [], ""
    for line in listing.splitlines():
        word = line.split("#")[0].rstrip()
        if not word or " " in word.strip():
            continue
        if not line.startswith(" "):
            suite = word if word.endswith(".") else ""
        elif suite and "DISABLED_" not in word:
            names.append(suite + word.strip())
    return names


def judge(results):
    """(found, facts) of (name, status, output) of each test; Failed and NotRun as a step raises them."""
    facts = {"passed": 0, "failed": [], "fake_only": [], "not_run": [], "said": []}
    for name, status, text in results:
        skipped = SKIPPED.search(text)
        if status != 0:
            facts["failed"].append(f"{name}: {'ran too long' if status is None else f'exit status {status}'}")
        elif skipped and skipped.group(1) in ("fake only", "real only"):
            facts["fake_only"].append(f"{name}: {skipped.group(0)}")
        elif skipped or "[  SKIPPED ]" in text:
            facts["not_run"].append(f"{name}: {skipped.group(2) if skipped else 'it says not why'}")
        elif "[  PASSED  ] 1 test" in text:
            facts["passed"] += 1
        else:
            facts["failed"].append(f"{name}: it ran no test")
        facts["said"] += [line for line in text.splitlines()
                          if line.startswith(("with a fence: ", "without one: ", "torch's memory "))]
    found = f"{facts['passed']} tests"
    if facts["fake_only"]:
        found += f", {len(facts['fake_only'])} for another kind of driver"
    if facts["said"]:
        found += ": " + "; ".join(facts["said"])
    if facts["failed"]:
        raise Failed(f"{len(facts['failed'])} of {len(results)} failed: " + "; ".join(facts["failed"]), facts)
    if facts["not_run"]:
        raise NotRun(f"{len(facts['not_run'])} of {len(results)}: " + "; ".join(facts["not_run"]))
    if not facts["passed"]:
        raise NotRun("each of them is for another kind of driver")
    return found, facts
