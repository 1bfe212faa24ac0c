"""The checkpoints of one run: asynchronous saves, verification, fall-back, retention."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from maskvit.checkpoints.arrays import plain_tree, read_metadata, reading, root_cause, shaped_like, stored_shapes
from maskvit.checkpoints.lock import DirectoryLock
from maskvit.checkpoints.manifest import (
    FORMAT,
    ITEMS,
    MANIFEST,
    CheckpointError,
    best_step,
    local_path,
    newest_sound,
    none_sound_message,
    step_of,
    steps_in,
    verify,
    write_best,
    write_manifest,
)
from maskvit.core.errors import message
from maskvit.core.processes import ProcessError, agree, first_decides
from maskvit.core.types import TrainState, tree_paths

_STORES = itertools.count()  # every process opens the same stores in the same order


class CheckpointStore:
    """The checkpoints of one run: asynchronous saves, verification, fall-back, retention.

    Under `jax.distributed` every process must make the same calls in the same order; process 0 writes the manifests,
    deletes and decides which step is valid.

    Args:
      directory: the run's checkpoints directory; made if absent. CheckpointError at once where it cannot be written.
      keep: how many newest verified checkpoints stay. An older one goes only after the new one was verified, and the newest
        whose metadata do not say "healthy": false stays in any case, and the one that `keep_best` named.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"config.checkpoint.keep is {keep}; at least 1 checkpoint must stay")
        self.directory = local_path(directory, "a workdir")
        self.keep = keep
        self._saved: set[int] = set()  # saved or restored by this process: a second save of the same step is the same state
        self._verified: set[int] = set()  # by `latest_valid`, so that `restore` need not read the files once more
        self._pending: Future | None = None
        self._pending_step = -1
        self._decisions = (f"checkpoints/{store}/{number}" for store in [next(_STORES)] for number in itertools.count())
        with contextlib.ExitStack() as undo:
            with self._on_all():
                self._lock = _claim(self.directory)
                undo.callback(self._lock.release)
            self._by_first(lambda: _remove_leftovers(self.directory))
            options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)
            undo.pop_all()
        # One worker: after Orbax committed a step it writes the manifest, verifies and drops what is too old.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Copy `state` off the devices and write it in the background; `state` may be donated right after.

        `metadata` is JSON data. Waits for the save before, if that still runs, and raises its error. Saving a step
        again that this store has saved or restored does nothing.
        """
        self.save_plain(int(step), plain_tree(state), metadata)

    def save_plain(self, step: int, plain: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        """`save` for a state that is a nested dict already (see `plain_tree`)."""
        self.wait()
        if step in self._saved:
            return
        metadata = json.loads(json.dumps({"format": FORMAT, "step": step, **metadata}))  # what is no JSON data fails here, not in a thread
        with self._on_all():
            if jax.process_index() == 0 and (self.directory / str(step)).exists():
                raise CheckpointError(
                    f"{self.directory / str(step)} exists already and was not written by this process; choose another directory, or "
                    "resume from its newest checkpoint"
                )
            try:
                if jax.process_index() == 0:
                    (self.directory / f".unfinished-{step}").touch()
                items = ocp.args.Composite(state=ocp.args.StandardSave(plain), metadata=ocp.args.JsonSave(metadata))
                self._manager.save(step, args=items, force=True)
            except Exception as error:
                raise self._not_saved(step, error) from error
        self._pending_step = step
        self._pending = self._finisher.submit(self._finish, step, next(self._decisions))

    def _finish(self, step: int, decision: str) -> None:
        with self._on_all(decision):
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                step_dir = self.directory / str(step)
                write_manifest(step_dir)
                problems = verify(step_dir)
                if problems:
                    raise CheckpointError("; ".join(problems))
                (self.directory / f".unfinished-{step}").unlink()
                steps = self._sound_looking()
                healthy = [step for step in steps if self._is_healthy(step)]
                for old in set(steps[: -self.keep]) - set(healthy[-1:]) - {best_step(self.directory)}:
                    _remove(self.directory / str(old))
        self._saved.add(step)

    @contextlib.contextmanager
    def _on_all(self, decision: str | None = None) -> Iterator[None]:
        """A block that every process runs: where it fails on one of them, all raise CheckpointError. `decision` names it, unique."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            agree(decision or next(self._decisions), None if failure is None else message(failure))
        except ProcessError as error:
            raise CheckpointError(str(error)) from failure or error

    def _by_first(self, decide: Callable[[], Any]) -> Any:
        """What process 0 answers, on every process; its failure is everyone's CheckpointError."""
        try:
            return first_decides(next(self._decisions), decide)
        except (ProcessError, OSError) as error:
            raise CheckpointError(message(error)) from error

    def keep_best(self, step: int) -> None:
        """From now on `step`, which was saved last, is the best of the run: it stays, whatever is newer. Waits until it is on disk."""
        self.wait()
        self._by_first(lambda: write_best(self.directory, step))

    def has(self, step: int) -> bool:
        """Whether this store has saved or restored `step`."""
        return step in self._saved

    def latest_healthy(self) -> int | None:
        """The newest step that verifies and was saved without "healthy": false in its metadata; None if there is none."""
        self.wait()
        return self._by_first(lambda: newest_sound(self.directory, [step for step in self._sound_looking() if self._is_healthy(step)])[0])

    def _is_healthy(self, step: int) -> bool:
        return bool(read_metadata(self.directory / str(step)).get("healthy", True))

    def _sound_looking(self) -> list[int]:
        """Steps that have a manifest: the ones that retention counts. Unverified ones are nobody's to delete."""
        return [step for step in steps_in(self.directory) if (self.directory / str(step) / MANIFEST).exists()]

    def wait(self) -> None:
        """Wait until the last save is on disk and verified. Raises CheckpointError if it failed; older ones are kept."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:
            # Orbax raises a failed save once in every thread that waits for it: here too, or the next save would fail with it.
            with contextlib.suppress(Exception):
                self._manager.wait_until_finished()
            if jax.process_index() == 0:
                _remove_unfinished(self.directory, self._pending_step)
            raise self._not_saved(self._pending_step, error) from error

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        kept = ", ".join(str(other) for other in self._sound_looking() if other != step) or "none"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory} ({root_cause(error)}); free space or repair the "
            f"disk and start the same command again. Sound checkpoints kept: {kept}"
        )

    def latest_valid(self) -> int | None:
        """The newest step whose files all match their manifest; None if there is no checkpoint at all.

        A newer one that does not match is logged as an error, file by file, and moved to `STEP.damaged`, so that its
        step can be saved again. Raises CheckpointError if there are checkpoints and none is sound: starting from
        scratch over somebody's checkpoints is not a fall-back.
        """
        self.wait()
        found = self._by_first(self._newest_valid)
        if found is not None:
            self._saved = {step for step in self._saved if step <= found}
            self._verified.add(found)
            self._manager.reload()
        return found

    def _newest_valid(self) -> int | None:
        steps = steps_in(self.directory)
        step, skipped = newest_sound(self.directory, steps)
        if step is None and steps:
            raise CheckpointError(none_sound_message(self.directory, skipped))
        for damaged in skipped:
            aside = _free_name(self.directory / f"{damaged}.damaged")
            os.rename(self.directory / str(damaged), aside)
            logging.error("going back to step %d; the damaged checkpoint of step %d was moved to %s", step, damaged, aside)
        return step

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Read the state of `step` into the structure, dtypes and shardings of `abstract_state`.

        Leaves of `abstract_state` are arrays or `jax.ShapeDtypeStruct`s; the sharding of each is honoured, whatever
        the devices the checkpoint was written on, and a leaf without one goes to the first local device. What an objective keeps
        per record, spread over devices by its first axis, may have been written with fewer or more rows of padding at its end, and with
        rows that are not flattened.
        Raises CheckpointError for damaged files and for any tensor that is missing, left over or of another shape.
        """
        step_dir = self.directory / str(step)
        if not step_dir.is_dir():
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {steps_in(self.directory) or 'none'}")
        if step not in self._verified:
            problems = self._by_first(lambda: verify(step_dir))
            if problems:
                raise CheckpointError(f"the checkpoint {step_dir} is damaged: " + "; ".join(problems))
        abstract = jax.tree.map(_abstract_leaf, plain_tree(abstract_state))
        stored = stored_shapes(step_dir)
        differences = _shape_differences(stored, abstract)
        if differences:
            raise CheckpointError(
                f"the checkpoint {step_dir} does not fit this run's state:\n" + "\n".join(f"  {line}" for line in differences)
            )
        as_written = jax.tree.map(_with_rows_of, abstract, stored)
        with reading(step_dir):
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(as_written, strict=False)))
        self._saved.add(step)
        return shaped_like(abstract_state, jax.tree.map(_with_flat_rows, restored.state, abstract))

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON data saved with `step`."""
        return read_metadata(self.directory / str(step))

    def close(self) -> None:
        """Wait for the last save and release the threads. Raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown(wait=True)
            self._manager.close()
            self._lock.release()


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)


def _shape_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line per path where the two trees of shaped leaves differ in presence or shape."""
    have = {path: tuple(leaf.shape) for path, leaf in tree_paths(stored).items()}
    leaves = tree_paths(wanted)
    want = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    lines = []
    for path in sorted(have.keys() | want.keys()):
        if path not in have:
            lines.append(f"{path}: {want[path]} in this run, not in the checkpoint")
        elif path not in want:
            lines.append(f"{path}: {have[path]} in the checkpoint, not in this run")
        elif have[path] != want[path] and not (path.startswith("objective_state/") and _differs_in_padding(have[path], leaves[path])):
            lines.append(f"{path}: {have[path]} in the checkpoint, {want[path]} in this run")
    return lines


def _differs_in_padding(stored: tuple[int, ...], leaf: jax.ShapeDtypeStruct) -> bool:
    """Whether `leaf` is spread by its first axis, and was written with all its rows but for some of the padding of its parts; the
    first versions did not flatten a row.

    That there are as many records is seen where the data are compared (`check_same_run`).
    """
    spec = getattr(leaf.sharding, "spec", ())
    if not spec or spec[0] is None or leaf.shape[1:] not in (stored[1:], (math.prod(stored[1:]),)):
        return False
    parts = leaf.shape[0] // leaf.sharding.shard_shape(leaf.shape)[0]
    return stored[0] > leaf.shape[0] - parts


def _with_rows_of(leaf: jax.ShapeDtypeStruct, stored: Any) -> jax.ShapeDtypeStruct:
    """`leaf` with its rows in the shape in which they were written."""
    if len(stored.shape) == len(leaf.shape):
        return leaf
    sharding = jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec(leaf.sharding.spec[0]))
    return jax.ShapeDtypeStruct((leaf.shape[0], *stored.shape[1:]), leaf.dtype, sharding=sharding)


def _with_flat_rows(value: jax.Array, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if value.shape == leaf.shape:
        return value
    return jax.jit(lambda x: x.reshape(leaf.shape), out_shardings=leaf.sharding)(value)


def _claim(directory: Path) -> DirectoryLock:
    """Make the directory, lock it (on process 0, for all) and see that it can be written."""
    probe = directory / f".probe-{jax.process_index()}"
    with contextlib.ExitStack() as undo:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            lock = DirectoryLock(directory, shared=jax.process_index() > 0)
            undo.callback(lock.release)
            probe.write_bytes(b"writable")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {directory} ({error.strerror}: {error.filename}); "
                "choose another --workdir or make this one a writable directory"
            ) from error
        undo.pop_all()
    return lock


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left: unfinished saves, Orbax's temporaries, half-deleted checkpoints."""
    for path in sorted(directory.iterdir()):
        kind, _, rest = path.name.partition("-")
        step = step_of(rest.partition(".")[0])
        if kind == ".unfinished" and step is not None:
            logging.warning("the save of step %d was cut short; its remains are removed", step)
            _remove_unfinished(directory, step)
        elif kind == ".deleted" and step is not None:
            shutil.rmtree(path, ignore_errors=True)
        elif kind == ".probe" and step is not None:
            path.unlink()


def _remove_unfinished(directory: Path, step: int) -> None:
    """Remove a save that did not come to its end; one that did, but for the removal of its mark, stays."""
    for path in directory.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    step_dir = directory / str(step)
    if step_dir.is_dir() and verify(step_dir):
        _remove(step_dir)
    (directory / f".unfinished-{step}").unlink(missing_ok=True)


def _remove(step_dir: Path) -> None:
    """Delete a checkpoint so that a kill in between never leaves half of one under its name."""
    doomed = _free_name(step_dir.with_name(f".deleted-{step_dir.name}"))
    os.rename(step_dir, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _free_name(path: Path) -> Path:
    candidates = [path, *(path.with_name(f"{path.name}.{number}") for number in range(1, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())
