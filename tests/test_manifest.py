"""A checkpoint's manifest is not trusted: what it leaves out, adds or points at is found, in bounded time."""

from __future__ import annotations

import json
import os

import pytest

from maskvit.checkpoints import CheckpointError, CheckpointStore, find_checkpoint, verify, write_manifest
from maskvit.checkpoints.manifest import MANIFEST_BYTES, local_path, step_of, steps_in


@pytest.fixture
def step_dir(tmp_path):
    folder = tmp_path / "7"
    for item in ("state", "metadata"):
        (folder / item).mkdir(parents=True)
        (folder / item / "data").write_text(f"{item} of a model")
    write_manifest(folder)
    assert not verify(folder)
    return folder


def edit(step_dir, change):
    """Change the manifest's content in place."""
    content = json.loads((step_dir / "manifest.json").read_text())
    content = change(content) or content
    (step_dir / "manifest.json").write_text(json.dumps(content))


HOSTILE = {
    "an empty list": (lambda m: m.update(files={}), "lists no file of state/"),
    "files that are a list": (lambda m: m.update(files=[]), 'lacks the table "files"'),
    "a file dropped from the list": (lambda m: m["files"].pop("metadata/data") and None, "lists no file of metadata/"),
    "a newer format": (lambda m: m.update(format=99), "format is 99, written by a newer maskvit"),
    "no format": (lambda m: m.pop("format") and None, "format is None"),
    "a format that is true": (lambda m: m.update(format=True), "format is True"),
    "an absolute path": (lambda m: m["files"].update({"/dev/zero": {"size": 0, "sha256": ""}}), "'/dev/zero', which is no file of"),
    "a path outside": (lambda m: m["files"].update({"../7/state/data": {"size": 0, "sha256": ""}}), "which is no file of this checkpoint"),
    "a path in disguise": (lambda m: m["files"].update({"state/../state/data": {"size": 0, "sha256": ""}}), "which is no file of"),
    "a size in words": (lambda m: m["files"]["state/data"].update(size="16"), "no size and SHA-256 of 'state/data'"),
    "no digest": (lambda m: m["files"]["state/data"].pop("sha256") and None, "no size and SHA-256 of 'state/data'"),
    "an entry that is a list": (lambda m: m["files"].update({"state/data": []}), "no size and SHA-256 of 'state/data'"),
    "a list at the top": (lambda m: [m], 'lacks the table "files"'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_list_that_is_cut_stretched_or_nonsense(step_dir, case):
    change, told = HOSTILE[case]
    edit(step_dir, change)
    problems = verify(step_dir)
    assert problems and any(told in problem for problem in problems), problems
    with pytest.raises(CheckpointError, match="is damaged"):
        find_checkpoint(step_dir)


def test_a_file_that_is_not_listed(step_dir):
    (step_dir / "state" / "more").write_text("weights from elsewhere")
    (problem,) = verify(step_dir)
    assert "state/more is not listed" in problem


def test_what_desktops_leave_behind_does_not_count(step_dir):
    (step_dir / "state" / ".DS_Store").write_text("icons")
    assert not verify(step_dir)


@pytest.mark.parametrize("name", ["state/data", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling"])
def test_things_that_are_no_files_do_not_hang(step_dir, name, kind):
    path = step_dir / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    assert verify(step_dir)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"files": ' * 50_000, "\x00", '{"format": 1'])
def test_manifests_that_do_not_parse(step_dir, text):
    (step_dir / "manifest.json").write_text(text)
    (problem,) = verify(step_dir)
    assert "is not a manifest" in problem


def test_a_manifest_of_absurd_size_is_not_read(step_dir):
    with open(step_dir / "manifest.json", "wb") as file:
        file.truncate(MANIFEST_BYTES + 1)
    assert "at most" in verify(step_dir)[0]


@pytest.mark.parametrize("name", ["²", "٣", "007", "-1", "1e3", "+5", "9" * 30, ".unfinished-x", ".unfinished-²", ".deleted-", ".probe-x"])
def test_folders_of_other_names_do_not_break_a_start(tmp_path, name):
    assert step_of(name) is None
    (tmp_path / name).mkdir()
    assert steps_in(tmp_path) == []
    store = CheckpointStore(tmp_path)
    assert store.latest_valid() is None
    store.close()
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("place", ["gs://bucket/run", "s3://bucket/run", "file:///tmp/run", "https://x/y", "hdfs://name/a"])
def test_workdirs_elsewhere_are_refused_before_anything_is_made(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is a URL; a workdir must be a local or mounted folder"):
        CheckpointStore(place)
    with pytest.raises(CheckpointError, match="is a URL"):
        find_checkpoint(place)
    assert not os.listdir(tmp_path)
    assert str(local_path("C:odd")) == str(tmp_path / "C:odd")
