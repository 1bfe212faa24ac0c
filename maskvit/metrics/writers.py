"""Where metrics go: a file of JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8

# ---------------------------------------------------------------------------------------------- writers


@runtime_checkable
class Writer(Protocol):
    """Where scalars and pictures go. Made on process 0 only."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """`WORKDIR/metrics.jsonl`, one {"step": ..., name: value} per line, and `WORKDIR/pictures/NAME_STEP.png`.

    A value that is not finite is written as null, and named in the row's "non_finite": {name: "nan" | "inf" | "-inf"},
    so that every line is JSON. Args: `config` is not used; `resume_step` is the step of the checkpoint the run resumes
    from, None for a new run. Rows of later steps, and lines that are damaged or cut short, are removed when resuming; but
    for the figures of speed a run that was stopped writes the file that it would have written without the stop. A new run
    leaves the file of an earlier one, which has no checkpoint, under another name.
    """

    def __init__(self, workdir: str | os.PathLike, config: Mapping[str, Any], resume_step: int | None) -> None:
        del config
        self._path = Path(workdir) / "metrics.jsonl"
        self._pictures = Path(workdir) / "pictures"
        self._pictures.mkdir(parents=True, exist_ok=True)
        if resume_step is None and self._path.exists() and self._path.stat().st_size:
            aside = next(path for n in itertools.count(1) if not (path := self._path.with_name(f"metrics_{n}.jsonl")).exists())
            os.rename(self._path, aside)
            logging.warning("%s belongs to a run without a checkpoint: it is now %s", self._path, aside.name)
        kept = [] if resume_step is None else _rows_until(self._path, resume_step)
        partial = self._path.with_name("metrics.jsonl.partial")
        partial.write_bytes(b"".join(kept))
        os.replace(partial, self._path)
        self._file = open(self._path, "a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append one row and hand it to the operating system: a killed process loses none."""
        values = {name: float(value) for name, value in scalars.items()}
        non_finite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        row: dict[str, Any] = {"step": int(step)} | {name: None if name in non_finite else value for name, value in values.items()}
        if non_finite:
            row["non_finite"] = non_finite
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def written(self, step: int) -> set[str]:
        """The names of all scalars and pictures that are there of `step`."""
        rows = [json.loads(line) for line in self._path.read_bytes().splitlines()]
        suffix = f"_{step:08d}.png"
        pictures = {path.name.removesuffix(suffix) for path in self._pictures.glob(f"*{suffix}")}
        return pictures.union(*(row.keys() for row in rows if row["step"] == step))

    def figures(self, step: int) -> dict[str, float]:
        """All scalars of `step` that are finite."""
        rows = [json.loads(line) for line in self._path.read_bytes().splitlines()]
        return {name: value for row in rows if row["step"] == step for name, value in row.items() if isinstance(value, float)}

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        from PIL import Image  # only where pictures are written

        for name, image in images.items():
            path = self._pictures / f"{name.replace('/', '_')}_{step:08d}.png"
            partial = path.with_name(path.name + ".partial")
            Image.fromarray(np.asarray(image)).save(partial, format="PNG")
            os.replace(partial, path)

    def close(self) -> None:
        self._file.close()


def _rows_until(path: Path, step: int) -> list[bytes]:
    """The sound lines of a metrics.jsonl whose step is at most `step`; the others are dropped, broken ones with a warning."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
            its_step = row["step"]
            if not line.endswith(b"\n") or type(its_step) is not int or its_step < 0:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            logging.warning("%s: dropped the broken line %r", path, line[:80])
            continue
        if its_step <= step:
            rows.append(line)
    return rows


class TensorboardWriter:
    """Event files in `WORKDIR/tensorboard` for TensorBoard, written without TensorFlow."""

    def __init__(self, workdir: str | os.PathLike, config: Mapping[str, Any], resume_step: int | None) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX", error) from error
        del config
        purge = {} if resume_step is None else {"purge_step": resume_step + 1}
        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"), **purge)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, float(value), step)

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        for name, image in images.items():
            self._writer.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run; its id is kept in `WORKDIR/wandb_id.txt`, so that a resumed run continues it.

    Project, entity and mode come from wandb's own environment variables (WANDB_PROJECT, WANDB_MODE=offline, ...).
    """

    def __init__(self, workdir: str | os.PathLike, config: Mapping[str, Any], resume_step: int | None) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb", error) from error
        self._image = wandb.Image
        id_file = Path(workdir) / "wandb_id.txt"
        continues = resume_step is not None and id_file.exists()
        run_id = id_file.read_text().strip() if continues else None
        self._run = wandb.init(dir=str(workdir), id=run_id, resume="allow" if continues else None, config=dict(config))
        id_file.write_text(self._run.id)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        self._run.log({name: self._image(np.asarray(image)) for name, image in images.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def _missing(name: str, package: str, error: ImportError) -> ImportError:
    return ImportError(f'the writer {name!r} needs the package {package} ({error}); install it with: pip install "maskvit[{name}]"')


WRITERS: dict[str, Callable[[str | os.PathLike, Mapping[str, Any], int | None], Writer]] = {
    "jsonl": JsonlWriter,
    "tensorboard": TensorboardWriter,
    "wandb": WandbWriter,
}


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        for writer in self._writers:
            writer.write_images(step, images)

    def written(self, step: int) -> set[str]:
        """The names of what `metrics.jsonl` and `pictures` hold of `step`."""
        return set().union(*(writer.written(step) for writer in self._writers if isinstance(writer, JsonlWriter)))

    def figures(self, step: int) -> dict[str, float]:
        """What `metrics.jsonl` holds of `step`, of finite numbers."""
        return dict(pair for writer in self._writers if isinstance(writer, JsonlWriter) for pair in writer.figures(step).items())

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def check_writers(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is none of `WRITERS`."""
    unknown = [name for name in names if name not in WRITERS]
    if unknown:
        raise ValueError(f"unknown writer {unknown[0]!r} in config.writers; known: {', '.join(WRITERS)}")


def make_writers(names: Sequence[str], workdir: str | os.PathLike, config: Mapping[str, Any], resume_step: int | None) -> Writers:
    """The writers called `names` (of `WRITERS`), "jsonl" always among them; on other processes than 0 none.

    Raises ValueError for an unknown name, and ImportError naming the extra to install where a package is missing.
    """
    check_writers(names)
    if jax.process_index() != 0:
        return Writers(())
    return Writers([WRITERS[name](workdir, config, resume_step) for name in dict.fromkeys(("jsonl", *names))])
