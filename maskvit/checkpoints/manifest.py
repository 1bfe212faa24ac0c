"""The manifest of digests that proves a checkpoint, and the newest one that it proves."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import logging

FORMAT = 1
MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, trusted or used as asked."""


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(step_dir: Path) -> None:
    """Write size and SHA-256 of every file under `step_dir` to its manifest, atomically."""
    files = sorted(path for path in step_dir.rglob("*") if path.is_file() and path.name != MANIFEST)
    entries = {path.relative_to(step_dir).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)} for path in files}
    _write_atomically(step_dir / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1))


def verify(step_dir: Path) -> list[str]:
    """Compare the files of one checkpoint with its manifest; the problems found, each naming its file. Empty: sound."""
    manifest = step_dir / MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())["files"]
        listed = [(step_dir / name, entry["size"], entry["sha256"]) for name, entry in entries.items()]
    except FileNotFoundError:
        return [f"{manifest} is missing, so nothing vouches for this checkpoint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{manifest} is not a manifest ({error})"]
    problems = []
    for path, size, sha256 in listed:
        try:
            if path.stat().st_size != size:
                problems.append(f"{path} has {path.stat().st_size} bytes instead of {size}")
            elif _digest(path) != sha256:
                problems.append(f"{path} has other contents than were written (its SHA-256 differs)")
        except OSError as error:
            problems.append(f"{path} cannot be read ({error.strerror})")
    return problems


def steps_in(directory: Path) -> list[int]:
    """Steps with a finished checkpoint in `directory`, ascending; saves cut short are not among them."""
    if not directory.is_dir():
        return []
    steps = (int(path.name) for path in directory.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted(step for step in steps if not (directory / f".unfinished-{step}").exists())


def newest_sound(directory: Path, steps: Iterable[int]) -> tuple[int | None, dict[int, list[str]]]:
    """The newest of `steps` that verifies, and the problems of each newer one (logged as errors)."""
    skipped: dict[int, list[str]] = {}
    for step in sorted(steps, reverse=True):
        problems = verify(directory / str(step))
        if not problems:
            return step, skipped
        skipped[step] = problems
        for problem in problems:
            logging.error("checkpoint of step %d SKIPPED: %s", step, problem)
    return None, skipped


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The verified step directory that `path` means: a run's workdir, its checkpoints directory or one step's directory.

    Of a workdir or checkpoints directory it is the newest step that verifies (skipped ones are logged); a step
    directory named outright must verify. Raises CheckpointError saying what was looked for.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}: it does not exist")
    if (path / "state").is_dir():
        problems = verify(path)
        if problems:
            raise CheckpointError(f"the checkpoint {path} is damaged: " + "; ".join(problems))
        return path
    for directory in (path, path / "checkpoints"):
        steps = steps_in(directory)
        if steps:
            step, skipped = newest_sound(directory, steps)
            if step is None:
                raise CheckpointError(none_sound_message(directory, skipped))
            return directory / str(step)
    raise CheckpointError(
        f"no checkpoint at {path}: looked for {path}/state (one step's directory), {path}/STEP (a checkpoints directory) and "
        f"{path}/checkpoints/STEP (a run's workdir). A PyTorch file is converted first: convert_torch_checkpoint.py"
    )


def none_sound_message(directory: Path, skipped: Mapping[int, Sequence[str]]) -> str:
    listing = "\n".join(f"  step {step}: {problem}" for step, problems in skipped.items() for problem in problems)
    return (
        f"none of the checkpoints in {directory} is sound:\n{listing}\n"
        "Restore the named files from a copy, or start again in an empty workdir; nothing was deleted."
    )
