"""A few hundred of the files of `python -m tests.fuzz_reader`, and that it finds what it is there to find."""

from __future__ import annotations

import os
import sys
import time
import types

import pytest

from tests import fuzz_reader


def test_a_few_hundred_files():
    found = fuzz_reader.fuzz(400, seed=1, size=200)
    assert not found["failures"] and sum(found["refusals"].values()) == 400
    assert found["refusals"]["understood"] > 0 and len(found["refusals"]) > 40


def take_memory(_):
    bytearray(2**34)


@pytest.mark.parametrize(
    ("examine", "message"),
    [
        (lambda path: {}["x"], "KeyError: 'x'"),
        (lambda path: os._exit(3), "the process ended with status 3"),
        (lambda path: time.sleep(60), "the process ended with SIGALRM (a hang)"),
        (take_memory, "MemoryError"),
        (lambda path: sys.modules.setdefault("odd", types.ModuleType("odd")), "other than before: modules"),
        (lambda path: sys.setrecursionlimit(sys.getrecursionlimit() + 1), "other than before: settings"),
    ],
    ids=["exception", "death", "hang", "memory", "import", "setting"],
)
def test_it_finds_failures(examine, message, monkeypatch):
    tried = []

    def after_the_warm_up(path):
        tried.append(path)
        if len(tried) > 40:
            examine(path)

    monkeypatch.setattr(fuzz_reader, "SECONDS_PER_FILE", 0.5 if "ALRM" in message else 20)
    monkeypatch.setattr(fuzz_reader, "examine", after_the_warm_up)
    found = fuzz_reader.fuzz(1, seed=0, size=1)
    assert any(message in failure for _, failure in found["failures"]), found


def test_a_file_is_that_of_its_number(tmp_path):
    right = fuzz_reader.right_files()
    for folder in "ab":
        (tmp_path / folder).mkdir()
    for number in range(30):
        a, b = (fuzz_reader.make(number, 7, tmp_path / folder, right) for folder in "ab")
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
