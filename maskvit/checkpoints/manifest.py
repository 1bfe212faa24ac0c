"""The manifest of digests that proves a checkpoint, and the newest one that it proves."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

FORMAT = 1
MANIFEST = "manifest.json"
BEST = "best"  # a file beside the checkpoints that names one of them
MANIFEST_BYTES = 64 * 2**20  # a file takes some 150 bytes: 400,000 files
ITEMS = ("state", "metadata")


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
    sizes, problems = _files_in(step_dir)
    if problems:
        raise CheckpointError("; ".join(problems))
    entries = {name: {"size": size, "sha256": _digest(step_dir / name)} for name, size in sorted(sizes.items())}
    _write_atomically(step_dir / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1))


def verify(step_dir: Path) -> list[str]:
    """Compare the files of one checkpoint with its manifest; the problems found, each naming its file. Empty: sound.

    Sound means: every file is listed and every listed file has its size and digest. Files whose names start with a dot
    (what desktops and network file systems leave behind) do not count; nothing reads them. The manifest itself is not
    trusted: it names no file outside of `step_dir`, and only regular files are opened.
    """
    try:
        listed = _read_manifest(step_dir / MANIFEST)
        present, problems = _files_in(step_dir)
    except FileNotFoundError:
        return [f"{step_dir / MANIFEST} is missing, so nothing vouches for this checkpoint"]
    except OSError as error:
        return [f"{error.filename or step_dir} cannot be read ({error.strerror})"]
    except (ValueError, RecursionError) as error:
        return [f"{step_dir / MANIFEST} is not a manifest ({error})"]
    problems += [f"{step_dir / name} is listed in {MANIFEST} and missing" for name in listed if name not in present]
    for name, size in present.items():
        path = step_dir / name
        if name not in listed:
            problems.append(f"{path} is not listed in {MANIFEST}: it was added later, or the list was cut")
        elif size != listed[name]["size"]:
            problems.append(f"{path} has {size} bytes instead of {listed[name]['size']}")
        else:
            try:
                if _digest(path) != listed[name]["sha256"]:
                    problems.append(f"{path} has other contents than were written (its SHA-256 differs)")
            except OSError as error:
                problems.append(f"{path} cannot be read ({error.strerror})")
    return problems


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """{relative name: {"size", "sha256"}}. Raises ValueError for anything else, OSError where it cannot be read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is no regular file")
    if status.st_size > MANIFEST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes; at most {MANIFEST_BYTES:,} are read")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise ValueError('it lacks the table "files"')
    check_format(content)
    entries = content["files"]
    for name, entry in entries.items():
        if name != posixpath.normpath(name) or name.startswith(("/", "..")) or "\0" in name:
            raise ValueError(f"it names {name!r}, which is no file of this checkpoint")
        if not isinstance(entry, dict) or type(entry.get("size")) is not int or not isinstance(entry.get("sha256"), str):
            raise ValueError(f"it gives no size and SHA-256 of {name!r}")
    for item in ITEMS:
        if not any(name.startswith(f"{item}/") for name in entries):
            raise ValueError(f"it lists no file of {item}/")
    return entries


def check_format(content: Mapping[str, Any]) -> None:
    """Raise ValueError where `content` (a manifest, or metadata) does not state a format that this version reads."""
    stated = content.get("format")
    if type(stated) is not int or stated < 1:
        raise ValueError(f"its format is {stated!r}; expected {FORMAT}")
    if stated > FORMAT:
        raise ValueError(f"its format is {stated}, written by a newer maskvit; this one reads formats up to {FORMAT}: upgrade")


def _files_in(step_dir: Path) -> tuple[dict[str, int], list[str]]:
    """{relative name: size} of the files that count, and a problem for each thing that is neither a file nor a folder."""
    sizes, problems = {}, []
    for parent, folders, files in os.walk(step_dir, onerror=_raise):
        for name in files + [folder for folder in folders if os.path.islink(os.path.join(parent, folder))]:
            path = Path(parent, name)
            relative = path.relative_to(step_dir).as_posix()
            if name.startswith(".") or relative == MANIFEST:
                continue
            status = os.stat(path) if path.exists() else os.lstat(path)
            if stat.S_ISREG(status.st_mode):
                sizes[relative] = status.st_size
            else:
                problems.append(f"{path} is no regular file")
    return sizes, problems


def _raise(error: OSError) -> None:
    raise error


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds; None for any other name. A step is written one way: no signs, no leading zeros."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name, re.ASCII) else None


def steps_in(directory: Path) -> list[int]:
    """Steps with a finished checkpoint in `directory`, ascending; saves cut short are not among them."""
    if not directory.is_dir():
        return []
    steps = (step_of(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(step for step in steps if step is not None and not (directory / f".unfinished-{step}").exists())


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


def local_path(path: str | os.PathLike, what: str = "a checkpoint") -> Path:
    """`path` as an absolute path, with ~ resolved. CheckpointError for a URL ("gs://..."): it would become a local folder of that name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)):  # a Path has folded "//" into "/"
        raise CheckpointError(f"{os.fspath(path)!r} is a URL; {what} must be a local or mounted folder: give its path")
    return Path(os.path.abspath(os.path.expanduser(path)))


def manifest_digest(step_dir: Path) -> str:
    """Twelve hexadecimal digits that stand for everything in a checkpoint: those of its manifest."""
    return hashlib.sha256((step_dir / MANIFEST).read_bytes()).hexdigest()[:12]


def best_step(directory: Path) -> int | None:
    """The step that was named the best of the checkpoints in `directory`; None where none was."""
    try:
        text = (directory / BEST).read_text()
    except FileNotFoundError:
        return None
    if not re.fullmatch(r"\d{1,18}\n?", text):
        raise CheckpointError(f"{directory / BEST} holds {text[:40]!r}, which is no step: remove it")
    return int(text)


def write_best(directory: Path, step: int) -> None:
    """Name the best step of the checkpoints in `directory`; the file appears whole or not at all."""
    partial = directory / f"{BEST}.partial"
    partial.write_text(f"{step}\n")
    os.replace(partial, directory / BEST)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The verified step directory that `path` means: a run's workdir, its checkpoints directory or one step's directory, or "best" there.

    Of a workdir or checkpoints directory it is the newest step that verifies (skipped ones are logged); "WORKDIR/best" is the one of
    `config.best`. A step directory named outright must verify. Raises CheckpointError saying what was looked for.
    """
    path = local_path(path)
    try:
        return _found_at(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"no checkpoint can be read at {path}: {reason}") from error


def _found_at(path: Path) -> Path:
    if path.name == BEST and not path.is_dir():
        for directory in (path.parent, path.parent / "checkpoints"):
            if (step := best_step(directory)) is not None:
                return _found_at(directory / str(step))
        raise CheckpointError(f"no best checkpoint at {path}: the run had no config.best, or was not evaluated yet")
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
