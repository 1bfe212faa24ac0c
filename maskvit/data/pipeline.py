"""Batches for one process out of a global order that depends on (seed, step) alone.

The rows of the global batch of step s are records order(seed, epoch)[s' * B : (s' + 1) * B], s' being the step inside its
epoch; process p of P takes the contiguous rows [p * B / P, (p + 1) * B / P). What happens to a record depends on (seed,
epoch, record) only. So neither the number of worker processes nor of processes, nor where a run was stopped, changes a
batch. Grain supplies worker processes and ordered prefetch; its own iterator state is not used.
"""

from __future__ import annotations

import faulthandler
import functools
import logging
import math
import multiprocessing
import multiprocessing.util
import os
import queue
import re
import signal
import threading
import time
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from maskvit.data import transforms, views
from maskvit.data.block import block_mask, draw_ratio
from maskvit.data.maps import MapSet
from maskvit.data.sources import Source
from maskvit.data.workers import LoaderError, Noted, Worker, WorkerTable, initializer
from maskvit.modalities import Modality

CHUNK = 16  # records that one worker prepares at a time: batches of thousands then neither stall the start nor fill the memory
PROBES = 64  # records looked at, at most, before the first batch
MAX_BAD_SHARE, MAX_BAD_COUNT = 0.01, 10  # a run stops where both are exceeded
REPLACEMENTS = 10  # records tried in place of a bad one
EXTRAS = ("index", "box", "flip")  # keys that a batch holds when asked for
READ_ERRORS = (transforms.RecordError, OSError)  # a bad sample; anything else is a fault of ours and ends the run

_log = logging.getLogger(__name__)


# --- order and randomness ---------------------------------------------------------------------------------------------


def _philox(seed: int, use: str, *numbers: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(use.encode()), *numbers]))


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_records: int) -> Int[np.ndarray, " num_records"]:
    """The permutation of records of one epoch: a stable sort of raw Philox bits, which no NumPy release may change."""
    order = np.argsort(_philox(seed, "order", epoch).random_raw(num_records), kind="stable").astype(np.int32)
    order.setflags(write=False)
    return order


def record_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator that augments record `index` in `epoch`."""
    return np.random.Generator(_philox(seed, "augment", epoch, index))


def steps_per_epoch(num_records: int, global_batch: int) -> int:
    """Whole global batches in the data; the shuffle drops another remainder in every epoch. Raises where there is none."""
    if global_batch < 1:
        raise ValueError(f"config.global_batch is {global_batch}; it must be at least 1")
    if num_records < global_batch:
        raise ValueError(
            f"the training data hold {num_records} records, fewer than config.global_batch = {global_batch}: "
            f"set it to {num_records} or less, or use more data"
        )
    return num_records // global_batch


# --- records to arrays ------------------------------------------------------------------------------------------------


def probe(source: Source, modalities: Mapping[str, Modality]) -> dict[str, np.dtype]:
    """Look at a few records spread over the data: does each modality exist and fit its declaration?

    Returns: dtype per modality in the batches.

    Raises:
      ValueError: a modality that no record looked at has (and that the source does not say may be lacking), class ids
        out of range, or not one readable record.
    """
    if len(source) == 0:
        raise ValueError(f"no records: {source.describe()}")
    dtypes: dict[str, np.dtype] = {}
    readable, first_error = 0, None
    indices = np.unique(np.linspace(0, len(source) - 1, PROBES).astype(int))
    for count, index in enumerate(np.random.default_rng(0).permutation(indices)):  # not the same end of the data first
        if count >= 8 and readable and len(dtypes) == len(modalities):
            break
        try:
            record = source[int(index)]
            arrays = transforms.decode_record(record, modalities)
        except READ_ERRORS as error:
            first_error = first_error or ValueError(f"record {int(index)}: {error}")
            continue
        readable += 1
        for name, array in arrays.items():
            try:
                transforms.check_values(array, modalities[name])
            except transforms.RecordError as error:
                raise ValueError(f"record {record['id']!r}: {error}") from error
            dtype = transforms.output_dtype(array, modalities[name])
            dtypes[name] = np.promote_types(dtypes.get(name, dtype), dtype)
    if not readable:
        raise ValueError(f"none of {len(indices)} records tried is readable ({source.describe()}); the first: {first_error}")
    for name in modalities:
        if name not in dtypes and name not in source.may_lack:
            raise ValueError(
                f"modality {name!r} has no data in {source.describe()}: drop it from config.modalities, "
                f"or name it in config.data's may_lack if only some records lack it"
            )
    return {
        name: dtypes.get(name, np.dtype(np.int32 if modality.kind == "categorical" else np.float32))
        for name, modality in modalities.items()
    }


class _Records:
    """What training and evaluation share: record -> arrays of the model's size, and arrays -> batch. Picklable.

    `rows`: first and end of this process's rows in a global batch; the other arguments are those of `train_batches`.
    """

    def __init__(
        self,
        source: Source,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        rows: tuple[int, int],
        *,
        inputs: Sequence[str] | None,
        extras: Sequence[str],
        whole_every: int,
        maps: str | None,
        blocks: tuple[Any, Any] | None,
    ):
        self.source = source
        self.rows = rows
        self.chunks_per_batch = math.ceil((rows[1] - rows[0]) / CHUNK)
        self.modalities = dict(modalities)
        self.image_size = (int(image_size[0]), int(image_size[1]))
        for modality in self.modalities.values():
            modality.size(self.image_size)
        self.inputs = tuple(self.modalities if inputs is None else inputs)
        unknown = sorted(set(self.inputs) - set(self.modalities))
        if unknown:
            raise ValueError(f"input {unknown[0]!r} is not declared in config.modalities ({', '.join(self.modalities)})")
        wrong = [name for name in extras if name not in EXTRAS]
        if wrong:
            raise ValueError(f"the extra batch key {wrong[0]!r} is unknown; known: {', '.join(EXTRAS)}")
        # The inputs come first, in their order, then what is only an output.
        self.columns = (*self.inputs, *(name for name in self.modalities if name not in self.inputs))
        self.extras = tuple(extras)
        if whole_every < 0 or (whole_every and (rows[1] - rows[0]) % whole_every):
            raise ValueError(
                f"config.objective.guidance asks for the whole picture of every {whole_every} samples, which must divide the batch of "
                f"each process, now {rows[1] - rows[0]}: change config.objective.guidance or config.global_batch"
            )
        self.whole_every = whole_every
        self.blocks = blocks
        if blocks is not None:
            if maps is not None:
                raise ValueError("stored maps and block masks are both the batch's guidance: ask for one of them")
            draw_ratio(np.random.default_rng(0), *blocks)  # wrong ratios are said here
        self.maps = None if maps is None else MapSet(maps, source, self.inputs, self.modalities[self.inputs[0]].grid(self.image_size))
        self.dtypes = probe(source, self.modalities)

    def chunk(self, number: int) -> tuple[int, range]:
        """(step, this process's rows, counted from 0, that are in the chunk)."""
        step, part = divmod(int(number), self.chunks_per_batch)
        return step, range(part * CHUNK, min((part + 1) * CHUNK, self.rows[1] - self.rows[0]))

    def name(self, number: int) -> str:
        """What chunk `number` is, for messages."""
        step, rows = self.chunk(number)
        return f"rows {self.rows[0] + rows.start} to {self.rows[0] + rows.stop - 1} of batch {step}"

    def decode(self, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = transforms.decode_record(record, self.modalities)
        for name, array in arrays.items():
            if self.dtypes[name] == np.uint8 and array.dtype != np.uint8:
                raise transforms.RecordError(f"modality {name!r} is {array.dtype} here and uint8 in the other records")
        lacking = [name for name in self.modalities if name not in arrays and name not in self.source.may_lack]
        if lacking:
            raise transforms.RecordError(f"lacks modality {lacking[0]!r}; if that is expected, name the modality in config.data's may_lack")
        return arrays

    def example(
        self, index: int, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], geometry: transforms.Geometry, resize: str, row: int
    ) -> dict[str, Any]:
        """Row `row` of this process's batch out of a record and its decoded arrays."""
        made: dict[str, Any] = self.transformed(arrays, self.modalities, geometry, resize)
        made["label"] = np.int32(record.get("label", -1))
        if self.source.may_lack:
            made["present"] = np.array([name in arrays for name in self.columns])
        height, width = next(iter(arrays.values())).shape[:2]
        box = transforms.visible_share(geometry, height, width, self.image_size)
        made |= self.chosen(index, box, geometry.flip)
        if self.maps is not None:
            made["guidance"] = self.maps.cropped(index, record["id"], box, geometry.flip)
        if self.gives_whole(row):
            made["whole"] = self.transformed(arrays, self.inputs, transforms.whole_geometry(height, width, self.image_size), resize)
        return made

    def transformed(
        self,
        arrays: Mapping[str, np.ndarray],
        names: Collection[str],
        geometry: transforms.Geometry,
        resize: str,
        size: tuple[int, int] | None = None,
    ) -> dict[str, np.ndarray]:
        """The named modalities at the model's size (or another), with a stand-in for those that the record lacks."""
        size = self.image_size if size is None else size
        made = transforms.transform({n: arrays[n] for n in names if n in arrays}, self.modalities, geometry, size, resize)
        return {n: made[n] if n in made else transforms.absent(self.modalities[n], size, self.dtypes[n]) for n in names}

    def chosen(self, index: int, box: tuple[float, float, float, float], flip: bool) -> dict[str, Any]:
        """The keys of `EXTRAS` that were asked for."""
        known = {"index": np.int32(index), "box": np.array(box, np.float32), "flip": np.bool_(flip)}
        return {name: known[name] for name in self.extras}

    def block_guidance(self, seed: int, epoch: int, index: int, count: int = 1) -> dict[str, Any]:
        """The block masks of a record's views in an epoch, 1 where hidden, as the batch's guidance; nothing where none was asked for."""
        if self.blocks is None:
            return {}
        grid = self.modalities[self.inputs[0]].grid(self.image_size)
        rng = np.random.Generator(_philox(seed, "blocks", epoch, index))
        masks = [block_mask(rng, *grid, draw_ratio(rng, *self.blocks) * math.prod(grid)) for _ in range(count)]
        return {"guidance": np.stack(masks).astype(np.float32)}

    def gives_whole(self, row: int) -> bool:
        """Whether the batch holds the whole picture of this process's row `row`."""
        return self.whole_every > 0 and row % self.whole_every == 0

    def padding(self, row: int) -> dict[str, Any]:
        """A row that stands for no example: finite everywhere, so that what is computed from it stays finite."""
        made: dict[str, Any] = {}
        for name, modality in self.modalities.items():
            empty = transforms.absent(modality, self.image_size, self.dtypes[name])
            made[name] = empty if modality.kind == "categorical" else np.zeros_like(empty)
        whole = {name: made[name] for name in self.modalities}
        made["label"] = np.int32(-1)
        if self.source.may_lack:
            made["present"] = np.ones(len(self.columns), bool)
        made |= self.chosen(-1, (0.0, 0.0, 1.0, 1.0), False)
        if self.maps is not None:
            made["guidance"] = self.maps.empty()
        if self.blocks is not None:
            made |= self.block_guidance(0, 0, 0)
        if self.gives_whole(row):
            made["whole"] = whole
        return made

    def stack(self, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """Rows to arrays, the whole pictures of some of them (maybe of none) apart. Takes "whole" out of the rows."""
        wholes = [row.pop("whole") for row in rows if "whole" in row]
        stacked = {name: self._stack(name, [row[name] for row in rows]) for name in rows[0]}
        if self.whole_every:
            for name in self.inputs:
                empty = np.empty((0, *stacked[name].shape[1:]), self.dtypes[name])
                stacked[f"whole/{name}"] = self._stack(name, [whole[name] for whole in wholes]) if wholes else empty
        return stacked

    def _stack(self, name: str, values: Sequence[Any]) -> np.ndarray:
        dtype = self.dtypes.get(name)
        return np.stack(values, dtype=dtype, casting="same_kind" if dtype is None else "safe")


class _TrainChunks(_Records):
    """Chunk number -> rows of a training batch."""

    def __init__(self, *args: Any, augment: transforms.Augment, seed: int, global_batch: int, **settings: Any):
        super().__init__(*args, **settings)
        self.augment, self.seed, self.global_batch = augment, seed, global_batch
        if augment.views is not None:
            self._check_views(augment.views)
        self.epoch_steps = steps_per_epoch(len(self.source), global_batch)

    def __call__(self, number: int) -> dict[str, Any]:
        step, rows = self.chunk(number)
        epoch, step = divmod(step, self.epoch_steps)
        bad: list[tuple[str, str]] = []
        return {**self.stack([self._row(epoch, step * self.global_batch, row, bad) for row in rows]), "bad": bad}

    def _row(self, epoch: int, batch_start: int, row: int, bad: list[tuple[str, str]]) -> dict[str, Any]:
        position = batch_start + self.rows[0] + row
        order = epoch_order(self.seed, epoch, len(self.source))
        for attempt in range(REPLACEMENTS):
            index = int(order[(position + attempt) % len(order)])
            identity = f"record {index}"
            try:
                record = self.source[index]
                identity = str(record["id"])
                arrays = self.decode(record)
                height, width = next(iter(arrays.values())).shape[:2]
                rng = record_rng(self.seed, epoch, index)
                if self.augment.views is not None:
                    made = self.cut_views(rng, record, arrays, self.augment.views) | self.chosen(index, (0.0, 0.0, 1.0, 1.0), False)
                    return made | self.block_guidance(self.seed, epoch, index, views.GLOBAL_VIEWS)
                geometry = transforms.draw_geometry(rng, height, width, self.image_size, self.augment)
                made = self.example(index, record, arrays, geometry, self.augment.resize, row)
                return made | self.block_guidance(self.seed, epoch, index)
            except READ_ERRORS as error:
                bad.append((identity, str(error)))
        raise RuntimeError(f"{REPLACEMENTS} records in a row are unusable in {self.source.describe()}; the last: {_complaint(bad[-1])}")

    def cut_views(
        self, rng: np.random.Generator, record: Mapping[str, Any], arrays: Mapping[str, np.ndarray], settings: views.MultiCrop
    ) -> dict[str, Any]:
        """The views of one record: "global/<modality>" and "local/<modality>", one after the other along the first axis."""
        height, width = next(iter(arrays.values())).shape[:2]
        made: dict[str, list[np.ndarray]] = {}
        for number in range(views.GLOBAL_VIEWS + settings.local_crops):
            large = number < views.GLOBAL_VIEWS
            size, scale = (self.image_size, self.augment.scale) if large else (settings.local_image_size, settings.local_scale)
            geometry = transforms.draw_crop(rng, height, width, size, scale, self.augment)
            colors = views.draw_colors(rng, min(number, 2), settings)
            view = self.transformed(arrays, self.modalities, geometry, self.augment.resize, size)
            for name, picture in view.items():
                # directions are no colors, though they are stored like them
                if self.dtypes[name] == np.uint8 and self.modalities[name].channels == 3 and not self.modalities[name].mirrored_channels:
                    picture = views.apply_colors(picture, colors)
                made.setdefault(f"{'global' if large else 'local'}/{name}", []).append(picture)
        stacked: dict[str, Any] = {name: np.stack(pictures) for name, pictures in made.items()}
        stacked["label"] = np.int32(record.get("label", -1))
        if self.source.may_lack:
            stacked["present"] = np.array([name in arrays for name in self.columns])
        return stacked

    def _check_views(self, settings: views.MultiCrop) -> None:
        """Raise where views cannot be cut, or something was asked for that belongs to one crop."""
        for modality in self.modalities.values():
            try:
                modality.size(settings.local_image_size)
            except ValueError as error:
                raise ValueError(f"{views.WHERE}.local_size: {error}") from error
        asked = {"a stored map": self.maps is not None, "the whole picture": self.whole_every > 0}
        asked |= {f"the batch key {name!r}": name in self.extras for name in ("box", "flip")}
        wrong = [what for what, is_asked in asked.items() if is_asked]
        if wrong:
            raise ValueError(f"{wrong[0]} goes with one crop of a record, but config.data.augment.views asks for several: drop one of them")


class _EvalChunks(_Records):
    """Chunk number -> rows of an evaluation batch, records in stored order, padded behind the last."""

    def __init__(self, *args: Any, crop: float | int | None, resize: str, batch_size: int, num_records: int, **settings: Any):
        super().__init__(*args, **settings)
        self.crop, self.resize, self.batch_size, self.num_records = crop, resize, batch_size, num_records

    def __call__(self, number: int) -> dict[str, Any]:
        step, numbers = self.chunk(number)
        bad: list[tuple[str, str]] = []
        rows, ids, reasons = [], [], []
        for row_number in numbers:
            slot = step * self.batch_size + self.rows[0] + row_number
            real = slot < self.num_records
            # a limit takes records spread over the data: folders are stored class by class
            index = slot * len(self.source) // self.num_records if real else -1
            identity, row = self._row(index, row_number, bad) if real else ("", None)
            ids.append(identity)
            reasons.append(bad[-1][1] if real and row is None else "")
            rows.append(
                {
                    **(self.padding(row_number) if row is None else row),
                    "valid": np.bool_(row is not None),
                    "index": np.int32(index),
                }
            )
        return {**self.stack(rows), "id": ids, "reason": reasons, "bad": bad}

    def _row(self, index: int, row: int, bad: list[tuple[str, str]]) -> tuple[str, dict[str, Any] | None]:
        identity = f"record {index}"
        try:
            record = self.source[index]
            identity = str(record["id"])
            arrays = self.decode(record)
            height, width = next(iter(arrays.values())).shape[:2]
            if self.crop is None:
                geometry = transforms.whole_geometry(height, width, self.image_size)
            else:
                geometry = transforms.center_geometry(height, width, self.image_size, self.crop)
            return identity, self.example(index, record, arrays, geometry, self.resize, row) | self.block_guidance(0, 0, index)
        except READ_ERRORS as error:
            bad.append((identity, str(error)))
            return identity, None


def _complaint(bad: tuple[str, str]) -> str:
    """One line about a record that cannot be used: its id, and why."""
    return f"{bad[0]!r}: {bad[1]}"


def _join(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chunks of rows -> one batch; lists (ids, complaints) are chained."""
    batch = {}
    for name, first in chunks[0].items():
        parts = [chunk[name] for chunk in chunks]
        batch[name] = [item for part in parts for item in part] if isinstance(first, list) else np.concatenate(parts)
    return batch


# --- the iterator -----------------------------------------------------------------------------------------------------


class Batches(Iterator[dict[str, Any]]):
    """Host batches, prepared in the background from construction on.

    `bad_samples` counts the records of the batches handed out so far that could not be used: training replaced them by the
    next in order, evaluation marked them invalid. Above 1 % and 10 of them the next batch raises RuntimeError, with examples.
    Where a worker process dies, or no batch comes for `timeout` seconds, it raises LoaderError naming the worker.
    `close()` (or the end of a `with` block) ends threads and worker processes.
    """

    def __init__(
        self, chunks: _TrainChunks | _EvalChunks, first_step: int, end_step: int | None, workers: int, prefetch: int, timeout: float
    ):
        for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if value < least:
                raise ValueError(f"config.data {name} is {value}; it must be at least {least}")
        self.bad_samples = 0
        self._seen = 0
        if not timeout > 0:
            raise ValueError(f"config.data timeout is {timeout}; it must be above 0 seconds")
        self._timeout = timeout
        self._table = WorkerTable(workers)
        self._chunks = chunks
        self._error: BaseException | None = None
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=prefetch)
        self._stop = threading.Event()
        pipeline = _grain_iterator(chunks, first_step, end_step, self._table)
        # the thread holds no reference to this object, so that dropping the last one ends it
        self._thread = threading.Thread(target=_prepare, args=(pipeline, self._queue, self._stop), name="maskvit-batches", daemon=True)
        self._thread.start()
        # at the interpreter's end before grain's own clean-up, which fails on a worker that is just being started
        self._finalizer = multiprocessing.util.Finalize(self, _end, args=(self._stop, self._thread, self._table), exitpriority=100)

    def __next__(self) -> dict[str, Any]:
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise ValueError("these batches were closed")
        batch, error = self._take()
        if error is None:
            error = self._count_bad(batch.pop("bad"), len(batch["label"]))
        if error is not None:
            self._error = error
            self.close()
            raise error
        return batch

    def _take(self) -> tuple[Any, BaseException | None]:
        """The next (batch, error); the error is a LoaderError where a worker is gone or nothing comes in time."""
        left = self._timeout
        missed: list[Worker] = []
        while True:
            look, before = min(1.0, left), time.monotonic()
            try:
                batch, error = self._queue.get(timeout=look)
            except queue.Empty:
                # Gone at two looks in a row: what a worker delivered before it ended was used up by then.
                dead = self._table.dead()
                if gone := [worker for worker in dead if worker in missed]:
                    return None, self._died(gone[0])
                missed = dead
                left -= min(time.monotonic() - before, 2 * look)  # a process that was suspended slept together with its workers
                if left <= 0:
                    return None, self._hangs()
                continue
            if error is not None and "Worker process was terminated" in str(error):  # grain saw it first
                died = self._died(next(iter(self._table.dead()), None), str(error))
                died.__cause__ = error
                return None, died
            return batch, error

    def _died(self, worker: Worker | None, said: str = "") -> LoaderError:
        which = f"loader worker {worker.number} of {self._table.count} (process {worker.pid})" if worker else "a loader worker process"
        at = f" while it prepared {self._chunks.name(worker.chunk)}" if worker and worker.chunk >= 0 else ""
        code = re.search(r"exit code (-?\d+)", said)
        return LoaderError(
            f"{which} died{at}{f', exit code {code[1]}' if code else ''}. When the system runs out of memory it kills such processes (exit "
            f"code -9): lower config.data workers (now {self._table.count}) or prefetch"
        )

    def _hangs(self) -> LoaderError:
        """Name what hangs, write the stacks of everything to standard error, and end the workers, which will not end by themselves."""
        worker = self._table.hanging()
        faulthandler.dump_traceback(file=2, all_threads=True)
        self._table.dump_stacks()
        self._table.kill()
        if worker is None:
            which = "a thread that reads records hangs" if not self._table.count else "its workers wait for something"
        else:
            at = f" over {self._chunks.name(worker.chunk)}" if worker.chunk >= 0 else ""
            which = (
                f"worker {worker.number} of {self._table.count} (process {worker.pid}) hangs{at} and has told nothing for "
                f"{time.time() - worker.since:.0f} s"
            )
        return LoaderError(
            f"the loader gave no batch for {self._timeout:g} s (config.data.timeout): {which}. The stacks of all threads and workers are "
            f"in the lines above; look at the disk or network that holds {self._chunks.source.describe()}",
            thread_hangs=not self._table.count,
        )

    def _count_bad(self, bad: list[tuple[str, str]], rows: int) -> RuntimeError | None:
        for complaint in bad[: max(0, 20 - self.bad_samples)]:
            _log.warning("bad sample %s", _complaint(complaint))
        self.bad_samples += len(bad)
        self._seen += rows
        if self.bad_samples <= MAX_BAD_COUNT or self.bad_samples <= MAX_BAD_SHARE * self._seen:
            return None
        return RuntimeError(
            f"{self.bad_samples} of {self._seen} records could not be used, more than {MAX_BAD_SHARE:.0%}: "
            f"{self._chunks.source.describe()}. The latest: {'; '.join(map(_complaint, bad[:3]))}"
        )

    def close(self) -> None:
        """End the background thread and the worker processes; may be called twice."""
        self._finalizer()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(stop: threading.Event, thread: threading.Thread, table: WorkerTable) -> None:
    stop.set()
    thread.join(timeout=30 if table.count else 2)  # workers end when they are told to, or are killed; a thread that hangs stays
    table.close()


def _prepare(pipeline: Any, batches: queue.Queue[Any], stop: threading.Event) -> None:
    """Body of the background thread: move batches from `pipeline` to the queue until told to stop, then close it."""
    if hasattr(signal, "pthread_sigmask"):
        # Threads and processes started from here on inherit it: a SIGTERM or Ctrl-C for the whole process group must not
        # take the workers away from a main process that is still writing its checkpoint.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        while not stop.is_set():
            item: tuple[Any, BaseException | None]
            try:
                item = (next(pipeline), None)
            except BaseException as error:  # handed to the consumer, StopIteration included
                item = (None, error)
            while not stop.is_set():
                try:
                    batches.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if item[1] is not None:
                break
    finally:
        pipeline.close()


def _grain_iterator(chunks: _TrainChunks | _EvalChunks, first_step: int, end_step: int | None, table: WorkerTable) -> Any:
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads flags of its own when it starts workers
        flags.FLAGS.mark_as_parsed()
    per_batch = chunks.chunks_per_batch
    stop = 2**62 if end_step is None else end_step * per_batch
    numbers = grain.MapDataset.range(first_step * per_batch, stop)
    if table.count:
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=table.count, per_worker_buffer_size=max(1, math.ceil(per_batch / table.count)))
        data = numbers.map(Noted(chunks)).to_iter_dataset(reading).mp_prefetch(options, worker_init_fn=initializer(table))
    else:
        # Pillow and zstd release the interpreter lock, so a few threads do help
        threads = min(4, os.cpu_count() or 1)
        data = numbers.map(chunks).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))
    return iter(data.batch(per_batch, drop_remainder=False, batch_fn=_join))


def _process_rows(size: int, name: str, process_index: int, process_count: int) -> tuple[int, int]:
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} of {process_count} processes")
    if size < 1 or size % process_count:
        raise ValueError(f"{name} = {size} does not divide by the {process_count} processes: set it to a multiple of {process_count}")
    share = size // process_count
    return process_index * share, (process_index + 1) * share


def train_batches(
    source: Source,
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    seed: int,
    global_batch: int,
    start_step: int = 0,
    augment: Mapping[str, Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    timeout: float = 600.0,
    inputs: Sequence[str] | None = None,
    extras: Sequence[str] = (),
    whole_every: int = 0,
    maps: str | None = None,
    blocks: tuple[Any, Any] | None = None,
) -> Batches:
    """This process's rows of the global batches of steps start_step, start_step + 1, ... without end.

    Args:
      global_batch: rows over all processes.
      augment: keys of `transforms.Augment`.
      workers: processes that decode; 0 decodes in threads of this process.
      prefetch: finished batches kept ready.
      timeout: seconds to wait for one batch before LoaderError.
      inputs: the model's input modalities; all in their order if None.
      extras: further keys of a batch: "index" int32 "b", the number of the record; "box" float32 "b 4", the part of the whole
        picture that the sample shows (top, left, height, width as shares of it); "flip" bool "b", whether it is mirrored after that.
      whole_every: with k > 0 `whole/<input>` holds the whole pictures of the process's rows 0, k, 2k, ..., squeezed to
        `image_size`, unmirrored.
      maps: a stored map set (`maskvit.data.maps`), cropped and mirrored with the picture: `guidance` float32 "b m gh gw" in
        0 ... 1 at the token grid of the first input; m is 1 (one map for all inputs) or one per input.
      blocks: (ratio, ratio_var) of `maskvit.data.block.draw_ratio`: `guidance` is then a block mask on that grid, 1 where hidden.

    Returns: an iterator of dicts: modalities as `maskvit.types.Batch` says, `label` int32 "b" (-1 where there is none),
      `present` bool "b m" if the source may lack modalities (columns: `inputs` in their order, then the other modalities in
      theirs), and what else was asked for. With `augment.views` in place of the modalities "global/<modality>" (b, 2, ...) and
      "local/<modality>" (b, local_crops, ...), and of `blocks` one mask per large view.

    Raises:
      ValueError: settings or data that do not fit, before the first batch.
      FileNotFoundError: no map set there.
      MapError: from a batch: a record without a stored map.
    """
    rows = _process_rows(global_batch, "config.global_batch", process_index, process_count)
    if seed < 0 or start_step < 0:
        raise ValueError(f"seed ({seed}) and start_step ({start_step}) must not be negative")
    steps_per_epoch(len(source), global_batch)
    settings = transforms.parse_augment(augment)
    chunks = _TrainChunks(
        source, modalities, image_size, rows, augment=settings, seed=int(seed), global_batch=global_batch,
        inputs=inputs, extras=extras, whole_every=whole_every, maps=maps, blocks=blocks,
    )  # fmt: skip
    return Batches(chunks, int(start_step), None, workers, prefetch, timeout)


def eval_batches(
    source: Source,
    modalities: Mapping[str, Modality],
    image_size: tuple[int, int],
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    prefetch: int = 2,
    timeout: float = 600.0,
    resize: str = "pil",
    crop: float | int | None = 0.875,
    limit: int | None = None,
    start_batch: int = 0,
    inputs: Sequence[str] | None = None,
    extras: Sequence[str] = (),
    whole_every: int = 0,
    maps: str | None = None,
    blocks: tuple[Any, Any] | None = None,
) -> Batches:
    """Every record (or `limit` of them) once, in stored order, middle crop, over all processes together.

    Args:
      batch_size: rows over all processes; each yields its contiguous rows of every batch, so all yield equally many batches.
      crop: image side over the side of the resized picture it is cut from; None squeezes the whole picture to `image_size`.
      limit: only so many records, evenly spread over the data.
      start_batch: batches to leave out at the beginning.
      extras, whole_every, maps, blocks: as `train_batches`.

    Returns: an iterator of dicts as `train_batches` gives, and `valid` bool "b" (False for padding and for unusable records),
      `index` int32 "b" (record number, -1 for padding), and lists of str that are not for the device: `id`, and `reason`, why a
      record is unusable ("" where it is not).
    """
    rows = _process_rows(batch_size, "batch_size", process_index, process_count)
    if crop is not None and not 0 < crop <= 1:
        raise ValueError(f"crop is {crop}; it must be above 0 and at most 1")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for every record")
    transforms.check_resize(resize, "resize")
    num_records = len(source) if limit is None else min(limit, len(source))
    chunks = _EvalChunks(
        source, modalities, image_size, rows, crop=crop, resize=resize, batch_size=batch_size, num_records=num_records,
        inputs=inputs, extras=extras, whole_every=whole_every, maps=maps, blocks=blocks,
    )  # fmt: skip
    return Batches(chunks, start_batch, math.ceil(num_records / batch_size), workers, prefetch, timeout)
