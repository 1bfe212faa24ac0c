"""The Dockerfiles name what is there. Nothing is built here."""

from __future__ import annotations

import json
import re
import shlex
import tomllib

import pytest

from tests.runs import ROOT

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


def instructions(path):
    """[(instruction, its words)], lines that a backslash continues joined."""
    text = path.read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_dockerfile(path):
    """What it copies exists and is all that an installation reads; its extra and its command are declared; nobody is root."""
    found, project = instructions(path), tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = [word for name, words in found if name == "COPY" for word in shlex.split(words)[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    needed = {"pyproject.toml", "setup.py", "maskvit", "configs", "assets"}
    needed |= {project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"], *project["project"]["license-files"]}
    assert needed <= set(copied)
    text = path.read_text()
    (extra,) = re.findall(r"'/source\[(\w+)\]'", text)
    assert extra in project["project"]["optional-dependencies"] and path.name == f"{extra}.Dockerfile"
    (version,) = re.findall(r"^FROM python:3\.(\d+)-slim$", text, re.MULTILINE)
    assert f"/source/requirements-py3{version}.lock" in text and f"requirements-py3{version}.lock" in copied
    assert [words for name, words in found if name == "USER"] == ["maskvit"]
    (entry,) = (json.loads(words) for name, words in found if name == "ENTRYPOINT")
    assert entry == ["maskvit"] and "maskvit" in project["project"]["scripts"]
    for config in re.findall(r"configs/[\w/]+\.py", text):
        assert (ROOT / config).is_file()


def test_there_are_two():
    assert [path.name for path in FILES] == ["gpu.Dockerfile", "tpu.Dockerfile"]
