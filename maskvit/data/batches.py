"""Batches for one process, prepared in the background; the order depends on (seed, step) alone."""

from __future__ import annotations

import faulthandler
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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from maskvit.core.modalities import Modality
from maskvit.data.augment.dense import EVAL_CROPS
from maskvit.data.augment.resizing import check_resize
from maskvit.data.augment.settings import parse_augment
from maskvit.data.costs import stage_seconds
from maskvit.data.order import steps_per_epoch
from maskvit.data.records import _complaint, _EvalChunks, _TrainChunks
from maskvit.data.sources import Source
from maskvit.data.workers import LoaderError, Noted, Worker, WorkerTable, initializer

MAX_BAD_SHARE, MAX_BAD_COUNT = 0.01, 10  # a run stops where both are exceeded


_log = logging.getLogger(__name__)


def _join(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Chunks of rows -> one batch; lists (ids, complaints) are chained."""
    batch = {}
    for name, first in chunks[0].items():
        parts = [chunk[name] for chunk in chunks]
        batch[name] = [item for part in parts for item in part] if isinstance(first, list) else np.concatenate(parts)
    return batch


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

    def stage_seconds(self, count: int = 16) -> dict[str, float]:
        """What a record costs, by stages (`maskvit.data.costs.stage_seconds`); of batches for training alone."""
        return stage_seconds(self._chunks, count)

    @property
    def workers(self) -> int:
        """Worker processes; 0 where threads of this process prepare the batches."""
        return self._table.count

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
    num_classes: int = 0,
) -> Batches:
    """This process's rows of the global batches of steps start_step, start_step + 1, ... without end.

    Args:
      global_batch: rows over all processes.
      augment: keys of `Augment`.
      workers: processes that decode; 0 decodes in threads of this process.
      prefetch: finished batches kept ready.
      timeout: seconds to wait for one batch before LoaderError.
      inputs: the model's input modalities; all in their order if None.
      extras: further keys of a batch: "index" int32 "b", the number of the record; "box" float32 "b 4", the part of the whole
        picture that the sample shows (top, left, height, width as shares of it); "flip" bool "b", whether it is mirrored after that;
        "size" int32 "b 2", the (height, width) of the stored picture (0 of padding), which stays on the host.
      whole_every: with k > 0 `whole/<input>` holds the whole pictures of the process's rows 0, k, 2k, ..., squeezed to
        `image_size`, unmirrored.
      maps: a stored map set (`maskvit.data.maps`), cropped and mirrored with the picture: `guidance` float32 "b m gh gw" in
        0 ... 1 at the token grid of the first input; m is 1 (one map for all inputs) or one per input.
      blocks: (ratio, ratio_var) of `maskvit.data.block.draw_ratio`: `guidance` is then a block mask on that grid, 1 where hidden.
      num_classes: a record whose label is not below it is a bad one; 0: any label is fine.

    Returns: an iterator of dicts: modalities as `maskvit.core.types.Batch` says, `label` int32 "b" (-1 where there is none),
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
    settings = parse_augment(augment)
    chunks = _TrainChunks(
        source, modalities, image_size, rows, augment=settings, seed=int(seed), global_batch=global_batch,
        inputs=inputs, extras=extras, whole_every=whole_every, maps=maps, blocks=blocks, num_classes=num_classes,
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
    crop: float | int | str | None = 0.875,
    limit: int | None = None,
    start_batch: int = 0,
    inputs: Sequence[str] | None = None,
    extras: Sequence[str] = (),
    whole_every: int = 0,
    maps: str | None = None,
    blocks: tuple[Any, Any] | None = None,
    originals: Sequence[str] = (),
    num_classes: int = 0,
) -> Batches:
    """Every record (or `limit` of them) once, in stored order, middle crop, over all processes together.

    Args:
      batch_size: rows over all processes; each yields its contiguous rows of every batch, so all yield equally many batches.
      crop: image side over the side of the resized picture it is cut from; None squeezes the whole picture to `image_size`. "pad" makes
        the whole picture fit (`dense.fitting_size`) and pads it below and to the right, "shortest" makes it cover and cuts out the
        middle: the protocols of dense tasks, by OpenCV's rules (`maskvit.data.augment.dense`).
      limit: only so many records, evenly spread over the data.
      start_batch: batches to leave out at the beginning.
      extras, whole_every, maps, blocks, num_classes: as `train_batches`.
      originals: modalities whose values come at their stored size too, for figures at the original resolution.

    Returns: an iterator of dicts as `train_batches` gives, and `valid` bool "b" (False for padding and for unusable records),
      `index` int32 "b" (record number, -1 for padding), and lists that are not for the device: of str `id`, and `reason`, why a
      record is unusable ("" where it is not); of arrays "original/<modality>", in a batch's units, of 0 x 0 pixels where there is none.
    """
    rows = _process_rows(batch_size, "batch_size", process_index, process_count)
    if crop is not None and (crop not in EVAL_CROPS if isinstance(crop, str) else not 0 < crop <= 1):
        raise ValueError(f"crop is {crop!r}; it must be above 0 and at most 1, or one of {', '.join(map(repr, EVAL_CROPS))}, or None")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1, or None for every record")
    check_resize(resize, "resize")
    num_records = len(source) if limit is None else min(limit, len(source))
    chunks = _EvalChunks(
        source, modalities, image_size, rows, crop=crop, resize=resize, batch_size=batch_size, num_records=num_records,
        originals=originals, inputs=inputs, extras=extras, whole_every=whole_every, maps=maps, blocks=blocks, num_classes=num_classes,
    )  # fmt: skip
    return Batches(chunks, start_batch, math.ceil(num_records / batch_size), workers, prefetch, timeout)
