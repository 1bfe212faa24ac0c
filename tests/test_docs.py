"""The commands that README, docs, configs and docstrings print exist, with their flags and files."""

from __future__ import annotations

import contextlib
import functools
import io
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import pytest

from maskvit.__main__ import COMMANDS, main
from maskvit.core.config_files import apply_overrides, load_config, split_overrides
from maskvit.training.config import check_config
from tests.runs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [*sorted((ROOT / "configs").rglob("*.py")), *sorted((ROOT / "maskvit").rglob("*.py")), ROOT / "main.py"]
# A line of shell, or of inline code, that starts one of ours; what follows it up to the end of the line or of the code.
COMMAND = re.compile(r"python (?:-m (maskvit(?:\.[\w.]+| [a-z]+)?)|(main\.py|convert_torch_checkpoint\.py))(?![\w.])([^\n`|#\"]*)")
# The two files that are commands too.
FILES = {"main.py": "train", "convert_torch_checkpoint.py": "convert"}
WITH_SUBCOMMAND = ("report", "data")


def commands() -> list[tuple[str, str, str]]:
    """(where, program, arguments) of every command printed; lines that a backslash continues are joined."""
    found = []
    for path in (*PAGES, *SOURCES):
        text = re.sub(r"\\+\n\s*", " ", path.read_text(encoding="utf-8"))
        if path.suffix == ".py":
            text = "\n".join(re.findall(r'"""(.*?)"""', text, re.DOTALL))
        for match in COMMAND.finditer(text):
            program = FILES[match[2]] if match[2] else match[1].removeprefix("maskvit").lstrip()
            if program:  # without one it is the list of commands
                found.append((str(path.relative_to(ROOT)), program, match[3]))
    return found


@functools.cache
def known_flags(program: str, subcommand: str) -> frozenset[str]:
    """The flags that the help of a command lists."""
    if program == "train":  # its flags are those of the process
        said = subprocess.run([sys.executable, "-m", "maskvit", "train", "--help"], capture_output=True, text=True, cwd=ROOT, check=False)
        return frozenset(re.findall(r"--(?:\[no\])?([\w-]+)", said.stdout))
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        assert main([program, *([subcommand] if subcommand else []), "--help"]) == 0, f"there is no command {program}"
    return frozenset(re.findall(r"--([\w-]+)", out.getvalue()))


@pytest.mark.parametrize(("where", "program", "arguments"), commands(), ids=[f"{w}: {p}" for w, p, _ in commands()])
def test_a_printed_command_exists(where, program, arguments):
    words = arguments.split()
    subcommand = words[0] if program in WITH_SUBCOMMAND and words and re.fullmatch(r"[a-z]\w+", words[0]) else ""
    if subcommand or program not in WITH_SUBCOMMAND:
        flags = known_flags(program, subcommand)
        assert flags, f"{where}: {program} {subcommand} has no help"
        for word in words:
            name = re.match(r"\[?--([\w-]+)(?![\w.-])", word)
            if name and not word.lstrip("[").startswith(("--config.", "--noconfig.")):
                assert name[1] in flags, f"{where} prints --{name[1]}, which {program} {subcommand} does not have"
    for file in re.findall(r"\bconfigs/[\w/]+\.py\b", arguments):
        assert (ROOT / file).is_file(), f"{where} names {file}"


# A line that trains, to its end: values may be quoted.
TRAINS = re.compile(r"python (?:-m maskvit train|main\.py) ([^\n`]*)")


def trained() -> list[tuple[str, str]]:
    """(a shipped config, what a printed command of `train` sets in it), each once."""
    found = []
    for path in (*PAGES, *SOURCES):
        for words in TRAINS.findall(re.sub(r"\\+\n\s*", " ", path.read_text(encoding="utf-8"))):
            file = re.search(r"--config[= ](configs/[\w/]+\.py)", words)
            if file and "--config." in words:
                found.append((file[1], words.strip()))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(("file", "words"), trained(), ids=[words for _, words in trained()])
def test_what_a_printed_command_sets_is_accepted(file, words):
    config = load_config(file)
    apply_overrides(config, split_overrides(shlex.split(words, comments=True))[1])
    check_config(config.to_dict())


METHODS = [page for page in PAGES if page.parent.name == "methods"]


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_config_of_a_method_is_one(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert blocks or page.stem == "index"
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        check_config(names["config"].to_dict())


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


# A file of ours by its path from the root.
FILE = re.compile(
    r"(?<![\w./-])(?:(?:maskvit|configs|docs|assets|tests)/[\w/-]+\.(?:py|md|png|pth|json|npz)\b|maskvit/(?:\w+/)+(?![\w*<]))"
)


def test_files_that_are_named_exist():
    missing = []
    for path in (*PAGES, *SOURCES, *sorted((ROOT / "tests").rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            text = "\n".join(re.findall(r'"""(.*?)"""', text, re.DOTALL))
        missing += [f"{path.relative_to(ROOT)} names {name}" for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not missing, "\n".join(missing)
    assert len(FILE.findall((ROOT / "docs/architecture.md").read_text(encoding="utf-8"))) > 25


def test_enough_is_found():
    """The pattern above sees them."""
    found = {program for _, program, _ in commands()}
    assert found >= {*COMMANDS} - {"demo"} and len(commands()) > 60
    assert pathlib.Path("docs/own_config.md") in [path.relative_to(ROOT) for path in PAGES]
