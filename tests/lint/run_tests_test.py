#!/usr/bin/env python3
"""scripts/run-tests leaves out a test only if it passed and nothing that it depends on changed since.

Method: a project of three tests, which are shell scripts: two that stand for programs of the build, and one of the
tree. After each change the last line says how many ran, how many of these are no passes, and how many were left out.
"""
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "run-tests"
LISTS = """cmake_minimum_required(VERSION 3.25)
project(three NONE)
enable_testing()
add_test(NAME one COMMAND ${PROJECT_BINARY_DIR}/one)
add_test(NAME two COMMAND ${PROJECT_BINARY_DIR}/two)
add_test(NAME script COMMAND ${PROJECT_SOURCE_DIR}/tests/script.sh)
set_tests_properties(one two PROPERTIES SKIP_RETURN_CODE 77)
"""
REPORTING = """add_test(NAME many COMMAND ${PROJECT_BINARY_DIR}/many)
set_tests_properties(many PROPERTIES ENVIRONMENT GTEST_OUTPUT=xml:${PROJECT_BINARY_DIR}/many.xml)
"""
PRESETS = """{"version": 4,
 "configurePresets": [{"name": "p", "generator": "Ninja", "binaryDir": "${sourceDir}/build/p"}],
 "testPresets": [{"name": "p", "configurePreset": "p"}]}
"""


class RunTests(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.root = pathlib.Path(self.folder.name).resolve()
        self.write("CMakeLists.txt", LISTS)
        self.write("CMakePresets.json", PRESETS)
        for name in ("build/p/one", "build/p/two", "build/p/helper", "tests/script.sh"):
            self.script(name, 0)
        self.write("source.cpp", "int one;")
        self.write("data.json", "{}")
        self.copy = self.root / "scripts" / "run-tests"
        self.copy.parent.mkdir()
        shutil.copy(SCRIPT, self.copy)
        subprocess.run(["cmake", "--preset", "p"], cwd=self.root, stdout=subprocess.DEVNULL, check=True)

    def tearDown(self):
        self.folder.cleanup()

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def script(self, name, status, comment=""):
        self.write(name, f"#!/bin/sh\n# {comment}\nexit {status}\n").chmod(0o755)

    def run_tests(self, *words, **variables):
        done = subprocess.run([str(self.copy), "p", *words], capture_output=True, text=True, check=True,
                              env={**os.environ, **variables})
        return done.stdout.splitlines()[-1], done.stderr

    def test_what_passed_is_left_out_and_what_did_not_is_run_again(self):
        self.script("build/p/two", 1)
        self.assertEqual(self.run_tests()[0], "3 1 0")
        said, why = self.run_tests()
        self.assertEqual(said, "1 1 2")
        self.assertIn("not passed: two (fail)", why)
        self.script("build/p/two", 77)
        said, why = self.run_tests()
        self.assertEqual(said, "1 1 2", "a test that skips itself is no pass")
        self.assertIn("not passed: two (notrun)", why)
        (self.root / "build/p/two").unlink()
        self.assertEqual(self.run_tests()[0], "1 1 2", "nor is one that is not there")
        self.script("build/p/two", 0)
        self.assertEqual(self.run_tests()[0], "1 0 2")
        self.assertEqual(self.run_tests()[0], "0 0 3")
        self.assertEqual(self.run_tests("--again")[0], "3 0 0")

    def test_that_depends_on_what_changed_is_run_again(self):
        self.assertEqual(self.run_tests()[0], "3 0 0")
        for change, expected in (
                (lambda: self.script("build/p/one", 0, "changed"), "1 0 2"),
                (lambda: self.script("build/p/helper", 0, "changed"), "3 0 0"),
                (lambda: self.script("tests/script.sh", 0, "changed"), "3 0 0"),
                (lambda: self.write("source.cpp", "int two;"), "1 0 2"),
                (lambda: self.write("data.json", "[]"), "3 0 0"),
                (lambda: self.write("more.json", "[]"), "3 0 0"),
                (lambda: self.write("build/p/library.so.1", "code"), "3 0 0")):
            change()
            self.assertEqual(self.run_tests()[0], expected)
            self.assertEqual(self.run_tests()[0], "0 0 3")
        self.assertEqual(self.run_tests(REFIT_SIM_SEEDS="7")[0], "3 0 0")
        self.assertEqual(self.run_tests()[0], "3 0 0")

    def test_that_failed_where_it_had_passed_is_run_until_it_passes(self):
        self.assertEqual(self.run_tests()[0], "3 0 0")
        self.script("build/p/one", 1)
        self.assertEqual(self.run_tests()[0], "1 1 2")
        self.assertEqual(self.run_tests()[0], "1 1 2")

    def test_program_counts_as_the_tests_in_its_report(self):
        self.write("CMakeLists.txt", LISTS + REPORTING)
        subprocess.run(["cmake", "--preset", "p"], cwd=self.root, stdout=subprocess.DEVNULL, check=True)
        passes = '<testcase classname="S" name="A" result="completed"/>'
        disabled = '<testcase classname="S" name="DISABLED_B" result="suppressed"/>'

        def after(status, *reported):
            report = f"echo '<r>{''.join(reported)}</r>' > ${{GTEST_OUTPUT#xml:}}\n" if reported else ""
            self.write("build/p/many", f"#!/bin/sh\n{report}exit {status}\n").chmod(0o755)
            return self.run_tests()

        self.assertEqual(after(0, passes, disabled)[0], "4 0 0", "one that is disabled is no test")
        self.assertEqual(after(0, passes, passes.replace('"A"', '"C"'))[0], "2 0 3")
        self.assertEqual(self.run_tests()[0], "0 0 5")
        for reported, status, expected, name in (
                ([passes, '<testcase classname="S" name="C" result="skipped"/>'], 0, "2 1 3", "many S.C (notrun)"),
                ([passes, '<testcase classname="S" name="C" result="completed"><failure/></testcase>'], 1, "2 1 3",
                 "many S.C (fail)"),
                ([passes], 1, "2 1 3", "many (fail)"),
                ([disabled], 0, "1 1 3", "many (no test in its report)"),
                ([], 0, "1 1 3", "many (no test in its report)"),
                ([], 1, "1 1 3", "many (fail)")):
            said, why = after(status, *reported)
            self.assertEqual(said, expected)
            self.assertIn(f"not passed: {name}", why)

    def test_no_test_at_all_is_a_failure(self):
        self.write("CMakeLists.txt", LISTS.split("add_test")[0])
        subprocess.run(["cmake", "--preset", "p"], cwd=self.root, stdout=subprocess.DEVNULL, check=True)
        said, why = self.run_tests()
        self.assertEqual(said, "0 1 0")
        self.assertIn("none is in the build", why)


if __name__ == "__main__":
    unittest.main(verbosity=2)
