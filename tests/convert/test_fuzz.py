"""A few hundred of the files of `python -m tests.fuzz_reader`, and that it finds what it is there to find.

In processes of their own: those that it forks must not be copies of one in which JAX runs threads.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import fuzz_files

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_few_hundred_files():
    done = run("-m", "tests.fuzz_reader", "--count", "400", "--seed", "1")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].endswith(" 0 failures"), done.stdout + done.stderr
    understood = next(line for line in done.stdout.splitlines() if line.endswith("files were understood"))
    kinds, _, _, _, count, *_ = understood.split()
    assert int(kinds) > 40 and int(count) > 0


FAULTS = {
    "exception": ("{}['x']", "KeyError: 'x'"),
    "death": ("os._exit(3)", "the process ended with status 3"),
    "hang": ("time.sleep(60)", "the process ended with SIGALRM (a hang)"),
    "memory": ("bytearray(2**34)", "MemoryError"),
    "import": ("sys.modules.setdefault('odd', types.ModuleType('odd'))", "other than before: modules; ['odd']"),
    "setting": ("sys.setrecursionlimit(sys.getrecursionlimit() + 1)", "other than before: settings"),
    "class": ("setattr(stand_ins.Inert, 'name', 3)", "other than before: classes"),
}
SCRIPT = """
import json, os, sys, time, types
from maskvit.convert import stand_ins
from tests import fuzz_reader
fuzz_reader.SECONDS_PER_FILE, tried, found = 2, [], {}
for name, code in json.loads(sys.argv[1]).items():
    def examine(path):
        tried.append(path)
        if len(tried) > 40:  # behind the warm-up
            eval(code)
    fuzz_reader.examine = examine
    found[name] = [failure for _, failure in fuzz_reader.fuzz(1, seed=0, size=1)["failures"]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def failures():
    """{fault: what is reported} of a converter with each fault of `FAULTS`."""
    done = run("-c", SCRIPT, json.dumps({name: code for name, (code, _) in FAULTS.items()}))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("fault", FAULTS)
def test_it_finds_failures(fault, failures):
    assert any(FAULTS[fault][1] in failure for failure in failures[fault]), failures[fault]


def test_a_file_is_that_of_its_number(tmp_path):
    right = fuzz_files.right_files()
    for folder in "ab":
        (tmp_path / folder).mkdir()
    for number in range(30):
        a, b = (fuzz_files.make(number, 7, tmp_path / folder, right) for folder in "ab")
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
