"""What a run tells about itself: metrics summed on the device, writers, progress, throughput and utilisation."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging
from jax.typing import ArrayLike
from jaxtyping import UInt8

from maskvit.types import Metrics

# ---------------------------------------------------------------------------------------------- accumulation


class Accumulator:
    """Sums the metrics of many steps on the host, in float32 like the steps themselves.

    Args:
      sums: what `as_json` gave, to continue where a run was stopped.
    """

    def __init__(self, sums: Mapping[str, Sequence[str]] | None = None) -> None:
        self._sums = {name: (np.float32(total), np.float32(count)) for name, (total, count) in (sums or {}).items()}

    def add(self, metrics: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> None:
        """Add one step's {name: (numerator, denominator)}. Steps may have different names. Waits until the step is done."""
        with np.errstate(over="ignore", invalid="ignore"):
            for name, (numerator, denominator) in jax.device_get(metrics).items():
                total, count = self._sums.get(name, (np.float32(0), np.float32(0)))
                self._sums[name] = (total + np.float32(numerator), count + np.float32(denominator))

    def sums(self) -> dict[str, tuple[float, float]]:
        """{name: (sum of numerators, sum of denominators)} since the last `summarize`."""
        return {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}

    def as_json(self) -> dict[str, list[str]]:
        """The sums, exactly, for a checkpoint's metadata; text, because JSON has no NaN."""
        return {name: [repr(total), repr(count)] for name, (total, count) in self.sums().items()}

    def summarize(self) -> dict[str, float]:
        """Numerator / denominator of each sum since the last call, then start anew; NaN where nothing was counted."""
        sums, self._sums = self.sums(), {}
        return {name: total / count if count else math.nan for name, (total, count) in sums.items()}


def summarize(metrics: Metrics | Sequence[Metrics]) -> dict[str, float]:
    """Numerator / denominator of one {name: (numerator, denominator)} or of the sum of several."""
    accumulator = Accumulator()
    for one in [metrics] if isinstance(metrics, Mapping) else metrics:
        accumulator.add(one)
    return accumulator.summarize()


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


# ---------------------------------------------------------------------------------------------- throughput


class MeasurementError(ValueError):
    """A figure that cannot be true: the clock or the FLOP count is wrong."""


# Dense bfloat16 FLOP/s of one JAX device by the start of its `device_kind`; the longest start counts. Makers' data
# sheets, without sparsity, with float32 accumulation (GeForce: half the tensor rate of float16 accumulation). V100 and
# T4 have no bfloat16: float16. A device of TPU v2 and v3 is a core, half a chip.
PEAK_FLOPS = {
    "NVIDIA GB200": 2500e12,  # NVIDIA GB200 NVL72
    "NVIDIA B200": 2250e12,  # NVIDIA DGX B200
    "NVIDIA H200": 989e12,  # NVIDIA H200
    "NVIDIA GH200": 989e12,  # NVIDIA GH200
    "NVIDIA H100": 989e12,  # NVIDIA H100, SXM ("NVIDIA H100 80GB HBM3")
    "NVIDIA H100 NVL": 835e12,  # the same
    "NVIDIA H100 PCIe": 756e12,  # the same
    "NVIDIA A100": 312e12,  # NVIDIA A100
    "NVIDIA A40": 149.7e12,  # NVIDIA A40
    "NVIDIA A10": 125e12,  # NVIDIA A10
    "NVIDIA L40S": 362e12,  # NVIDIA L40S
    "NVIDIA L4": 121e12,  # NVIDIA L4
    "NVIDIA RTX A6000": 154.8e12,  # NVIDIA Ampere GA102 whitepaper
    "NVIDIA RTX 6000 Ada": 364e12,  # NVIDIA RTX 6000 Ada
    "NVIDIA GeForce RTX 3080": 59.5e12,  # NVIDIA Ampere GA102 whitepaper
    "NVIDIA GeForce RTX 3090": 71e12,  # the same
    "NVIDIA GeForce RTX 4080": 97.5e12,  # NVIDIA Ada whitepaper
    "NVIDIA GeForce RTX 4090": 165.2e12,  # the same
    "NVIDIA GeForce RTX 5090": 209.5e12,  # NVIDIA RTX Blackwell whitepaper
    "Tesla V100": 125e12,  # NVIDIA V100, SXM2
    "Tesla V100-PCIE": 112e12,  # the same
    "Tesla T4": 65e12,  # NVIDIA T4
    "TPU v2": 22.5e12,  # Google Cloud TPU system architecture, for this and all below
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
# No device of any kind computes faster: a figure above it was measured before the devices had finished.
NO_DEVICE_FLOPS = 1e17
# Words after such a start that make it another model.
_VARIANTS = ("Ti", "SUPER", "Laptop", "D", "lite")


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device of this kind, None where it is not known (the CPU among them)."""
    starts = [start for start in PEAK_FLOPS if re.match(re.escape(start) + r"(?![A-Za-z0-9])", device_kind)]
    if not starts:
        return None
    start = max(starts, key=len)
    rest = device_kind[len(start) :].split()
    return None if rest and rest[0] in _VARIANTS else PEAK_FLOPS[start]


def flops_utilisation(
    flops_per_step: float, steps_per_second: float, *, device_kind: str | None = None, device_count: int | None = None
) -> float | None:
    """MFU: the share of all devices' dense bfloat16 peak that the model's arithmetic uses; None where the peak is unknown.

    `flops_per_step` counts the model's useful arithmetic over all devices (forward, backward and guidance pass; not
    what remat computes again). Kind and count are those of this run unless given. Raises MeasurementError above 1, and for a
    device of unknown peak above what any device can do.
    """
    peak = peak_flops(device_kind or jax.devices()[0].device_kind)
    share = flops_per_step * steps_per_second / ((peak or NO_DEVICE_FLOPS) * (device_count or jax.device_count()))
    if share > 1:
        raise MeasurementError(
            f"{flops_per_step:.3g} FLOPs x {steps_per_second:.3g} steps/s would be {share:.0%} of the devices' peak: "
            "the clock was read before the devices had finished, or the FLOPs are counted wrong"
        )
    return share if peak else None


class Throughput:
    """Images per second, and the share of the time spent waiting for data, over the steps since the last `read`.

    The time inside `paused` (first compilation, evaluation, saving, drawing) counts nowhere, nor do steps counted in it.

    Args:
      global_batch: images per step over all processes.
      flops_per_step: the model's arithmetic per step; None leaves "mfu" out.
      clock: seconds, monotonic.
    """

    def __init__(self, global_batch: int, flops_per_step: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._global_batch = global_batch
        self._flops_per_step = flops_per_step
        self._clock = clock
        self._is_paused = False
        self._start_anew()

    def _start_anew(self) -> None:
        self._start = self._clock()
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around `next(batches)`."""
        start = self._clock()
        try:
            yield
        finally:
            if not self._is_paused:
                self._waited += self._clock() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around all that is not training. The devices should be idle at its start: block on the last step first."""
        if self._is_paused:
            yield
            return
        start, self._is_paused = self._clock(), True
        try:
            yield
        finally:
            self._is_paused = False
            self._paused += self._clock() - start

    def step(self) -> None:
        """Count one finished step."""
        if not self._is_paused:
            self._steps += 1

    def read(self) -> dict[str, float]:
        """{"images_per_second", "steps_per_second", "data_wait" (0 ... 1), "mfu" where known} since the last call; {} before
        the first step. Fetch the last step's metrics before, or the clock is ahead of the devices.
        """
        seconds = self._clock() - self._start - self._paused
        steps, waited = self._steps, self._waited
        self._start_anew()
        if not steps or seconds <= 0:
            return {}
        rate = steps / seconds
        figures = {"images_per_second": rate * self._global_batch, "steps_per_second": rate, "data_wait": waited / seconds}
        if self._flops_per_step is not None:
            try:
                utilisation = flops_utilisation(self._flops_per_step, rate)
            except MeasurementError as error:
                logging.error("throughput not reported: %s", error)
                return {}
            if utilisation is not None:
                figures["mfu"] = utilisation
        return figures


# ---------------------------------------------------------------------------------------------- progress


class Progress:
    """How far a run is: a bar on a terminal, a line per report otherwise; process 0 only.

    Args:
      total: steps of the run. start: the step it starts or resumes from.
      stream: where to write; standard error unless given.
    """

    def __init__(self, total: int, start: int = 0, stream: io.TextIOBase | None = None) -> None:
        self._total, self._step = total, start
        self._stream = stream if stream is not None else sys.stderr
        self._speaks = jax.process_index() == 0
        self._bar = None
        if self._speaks and self._stream.isatty():
            from tqdm import tqdm  # only where there is a terminal

            self._bar = tqdm(total=total, initial=start, file=self._stream, unit="step", dynamic_ncols=True, smoothing=0.1)

    def update(self, step: int) -> None:
        """Move the bar to `step`; without a terminal this writes nothing."""
        if self._bar is not None:
            self._bar.update(step - self._step)
        self._step = step

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show `values` ("loss" and the figures of `Throughput.read`) at `step`; others are left to the writers."""
        self.update(step)
        parts = []
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4f}")
        if "images_per_second" in values:
            parts.append(f"{values['images_per_second']:.1f} img/s")
        if "data_wait" in values:
            parts.append(f"data wait {values['data_wait']:.0%}")
        if "mfu" in values:
            parts.append(f"MFU {values['mfu']:.1%}")
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(parts))
        elif self._speaks:
            if values.get("steps_per_second"):
                parts.append(f"ETA {_clock_time((self._total - step) / values['steps_per_second'])}")
            print(f"step {step}/{self._total} ({step / max(self._total, 1):.0%})  " + "  ".join(parts), file=self._stream, flush=True)

    def message(self, text: str) -> None:
        """A line of its own that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._speaks:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _clock_time(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"
