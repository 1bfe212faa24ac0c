"""The commands that README and docs print run, in their order and in a small form; those that cannot are listed with the reason.

The commands are read from the pages. `tests/tutorials.py` says of each what is added to it, such as two steps and a small encoder.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests import tutorials
from tests.runs import ROOT
from tests.tutorials import ROWS, Small, Walk

WALKS = tutorials.walks()


def environment(home: pathlib.Path) -> dict[str, str]:
    """That of a user at home in `home`, with one CPU device."""
    return {
        **os.environ,
        "HOME": str(home),
        "COLUMNS": "140",
        "XLA_FLAGS": re.sub(r"(device_count)=\d+", r"\1=1", os.environ["XLA_FLAGS"]),
    }


def line_here(command: str, small: Small, readme: pathlib.Path) -> list[str]:
    """The words that run a printed command in this test."""
    first, *rest = shlex.split(command)
    for printed, here in small.words.items():
        assert any(printed in word for word in rest), f"{command!r} does not hold {printed!r}: its small form is out of date"
        rest = [word.replace(printed, here.replace("{README}", str(readme))) for word in rest]
    if first == "maskvit":
        return [sys.executable, "-m", "maskvit", *rest, *small.add]
    assert first == "python", f"{command!r} begins with neither python nor maskvit"
    start = [str(ROOT / rest[0])] if rest[0].endswith(".py") else [rest[0]]
    return [sys.executable, *start, *rest[1:], *small.add]


def take(walk: Walk, folder: pathlib.Path, readme: pathlib.Path) -> None:
    """Run the commands of a walk in `folder`; every one must end well, say and make what its row says."""
    tutorials.make_inputs(folder, walk.page)
    for command in walk.commands:
        small = ROWS[command.page][command.row]
        line = line_here(command.line, small, readme)
        done = subprocess.run(
            line, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, check=False
        )
        told = f"{command.page}: {command.line}\nrun as {shlex.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        assert done.returncode == 0, f"{told}\nended with {done.returncode}"
        assert "Traceback" not in done.stderr, told
        for text in small.says:
            assert text in done.stdout + done.stderr, f"{told}\ndid not say {text!r}"
        for pattern in small.makes:
            made = sorted(folder.glob(pattern))
            assert made and all(path.is_dir() or path.stat().st_size for path in made), f"{told}\nmade no {pattern}"


@pytest.fixture(scope="module")
def readme(tmp_path_factory) -> pathlib.Path:
    """The folder in which README's commands were run, one after the other: other pages begin with what they made."""
    folder = tmp_path_factory.mktemp("readme")
    (walk,) = [walk for walk in WALKS if walk.page == "README.md"]
    take(walk, folder, folder)
    return folder


def test_every_printed_command_has_a_row_and_every_row_a_command(capsys):
    found = tutorials.commands()
    without = [f"{command.page}: {command.line}" for command in found if command.row is None]
    assert not without, "neither a small form nor a reason in tests/tutorials.py:\n" + "\n".join(without)
    used = {(command.page, command.row) for command in found}
    stale = [f"{page}: {row}" for page, rows in ROWS.items() for row in rows if (page, row) not in used]
    assert not stale, "rows of tests/tutorials.py that no printed command begins with:\n" + "\n".join(stale)
    run = sum(len(walk.commands) for walk in WALKS)
    with capsys.disabled():
        print(f"\n{run} of {len(found)} printed commands are run here, {len(found) - run} are listed with their reason")
    assert run >= 50 and sum(len(walk.commands) for walk in WALKS if walk.page == "README.md") >= 11


def test_a_command_without_a_row_is_found(monkeypatch):
    row = "python -m maskvit predict"
    monkeypatch.setitem(ROWS, "README.md", {key: small for key, small in ROWS["README.md"].items() if key != row})
    assert [command.line.startswith(row) for command in tutorials.commands() if command.row is None] == [True]


def test_readme(readme):
    """Its three quick starts, one after the other in one folder."""
    losses = [json.loads(line).get("loss") for line in (readme / "runs" / "photos" / "metrics.jsonl").read_text().splitlines()]
    assert len([loss for loss in losses if loss and math.isfinite(loss)]) == 2
    answers = (readme / "answers" / "predictions.csv").read_text().splitlines()
    assert len(answers) == 1 + tutorials.NEW_PHOTOS and "class_" in answers[1]


@pytest.mark.parametrize("walk", WALKS[1:], ids=[f"{walk.page}: {walk.folder}" for walk in WALKS[1:]])
def test_a_page(walk, request, tmp_path):
    begun = any("{README}" in word for command in walk.commands for word in ROWS[command.page][command.row].words.values())
    take(walk, tmp_path, request.getfixturevalue("readme") if begun else tmp_path)
