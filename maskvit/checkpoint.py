"""Checkpoints: Orbax writes them, a manifest of digests proves them, and another model can start from them.

One checkpoint is one directory named by its step, in `WORKDIR/checkpoints`:

    checkpoints/1200/state/         Orbax: a plain nested dict of arrays {"step", "params", "opt_state", "objective_state", "skipped"}
    checkpoints/1200/metadata/      Orbax: JSON with "config", "versions" and whatever the trainer adds (data position, source, licence)
    checkpoints/1200/manifest.json  size and SHA-256 of every other file, written last

Orbax 0.12 restores flipped bits without an error and never falls back to an older step; the manifest and
`CheckpointStore.latest_valid` add both. Names beside the steps: `.unfinished-N` marks a save in progress, so that a
step without a manifest is either the remains of a killed save (removed at the next start) or damaged (never
trusted); `N.damaged` is a step that failed its check and was moved out of the way.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

import maskvit
from maskvit.types import Params, TrainState, tree_paths

FORMAT = 1
MANIFEST = "manifest.json"
_ITEMS = ("state", "metadata")

# Keys a resumed run may change, because none of them changes what is computed at a step: how often things are written
# or evaluated, loader speed, how the global batch is split (equal but for rounding), when to stop (the schedule has
# lengths of its own), and where the data lies. Everything else makes it another run.
MAY_DIFFER = (
    "log_every",
    "picture_every",
    "checkpoint",
    "evaluators",
    "data.workers",
    "data.prefetch",
    "data.train.data_dir",
    "micro_batch",
    "total",
)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, trusted or used as asked."""


# ---------------------------------------------------------------------------------------------- trees on disk


def _plain(tree: Any) -> dict[str, Any]:
    """A nested dict with string keys of all leaves of any pytree; nodes without leaves (masked, empty states) vanish.

    Orbax then sees nothing but dicts, so that what is on disk depends neither on optax's classes nor on empty nodes.
    """
    plain: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        node = plain
        for key in path[:-1]:
            node = node.setdefault(_key_name(key), {})
        node[_key_name(path[-1])] = leaf
    return plain


def _key_name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _shaped_like(abstract: Any, plain: Mapping[str, Any]) -> Any:
    """The inverse of `_plain`: `abstract`'s structure with the leaves of `plain`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = []
    for path, _ in paths:
        node: Any = plain
        for key in path:
            node = node[_key_name(key)]
        leaves.append(node)
    return jax.tree_util.tree_unflatten(structure, leaves)


def _stored_shapes(step_dir: Path) -> dict[str, Any]:
    """The nested dict of array metadata (`.shape`, `.dtype`) of the state in `step_dir`."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(step_dir / "state")
    return metadata.tree if hasattr(metadata, "tree") else metadata


# ---------------------------------------------------------------------------------------------- manifest


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


def _steps(directory: Path) -> list[int]:
    """Steps with a finished checkpoint in `directory`, ascending; saves cut short are not among them."""
    if not directory.is_dir():
        return []
    steps = (int(path.name) for path in directory.iterdir() if path.name.isdigit() and path.is_dir())
    return sorted(step for step in steps if not (directory / f".unfinished-{step}").exists())


def _newest_sound(directory: Path, steps: Iterable[int]) -> tuple[int | None, dict[int, list[str]]]:
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
        steps = _steps(directory)
        if steps:
            step, skipped = _newest_sound(directory, steps)
            if step is None:
                raise CheckpointError(_none_sound(directory, skipped))
            return directory / str(step)
    raise CheckpointError(
        f"no checkpoint at {path}: looked for {path}/state (one step's directory), {path}/STEP (a checkpoints directory) and "
        f"{path}/checkpoints/STEP (a run's workdir). A PyTorch file is converted first: convert_torch_checkpoint.py"
    )


def _none_sound(directory: Path, skipped: Mapping[int, Sequence[str]]) -> str:
    listing = "\n".join(f"  step {step}: {problem}" for step, problems in skipped.items() for problem in problems)
    return (
        f"none of the checkpoints in {directory} is sound:\n{listing}\n"
        "Restore the named files from a copy, or start again in an empty workdir; nothing was deleted."
    )


# ---------------------------------------------------------------------------------------------- the store


class CheckpointStore:
    """The checkpoints of one run: asynchronous saves, verification, fall-back, retention.

    Under `jax.distributed` every process must make the same calls in the same order; process 0 writes the manifests,
    deletes and decides which step is valid.

    Args:
      directory: the run's checkpoints directory; made if absent. CheckpointError at once where it cannot be written.
      keep: how many newest verified checkpoints stay. An older one goes only after the new one was verified.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"config.checkpoint.keep is {keep}; at least 1 checkpoint must stay")
        self.directory = Path(os.path.abspath(os.path.expanduser(directory)))
        self.keep = keep
        self._saved: set[int] = set()  # saved or restored by this process: a second save of the same step is the same state
        self._verified: set[int] = set()  # by `latest_valid`, so that `restore` need not read the files once more
        self._pending: Future | None = None
        self._pending_step = -1
        _require_writable(self.directory)
        if jax.process_index() == 0:
            _remove_leftovers(self.directory)
        _barrier("maskvit_checkpoint_open")
        options = ocp.CheckpointManagerOptions(max_to_keep=None, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=_ITEMS)
        # One worker: after Orbax committed a step it writes the manifest, verifies and drops what is too old.
        self._finisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def save(self, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
        """Copy `state` off the devices and write it in the background; `state` may be donated right after.

        `metadata` is JSON data. Waits for the save before, if that still runs, and raises its error. Saving a step
        again that this store has saved or restored does nothing.
        """
        self._save(int(step), _plain(state), metadata)

    def _save(self, step: int, plain: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        self.wait()
        if step in self._saved:
            return
        if (self.directory / str(step)).exists():
            raise CheckpointError(
                f"{self.directory / str(step)} exists already and was not written by this process; choose another directory, or resume "
                "from its newest checkpoint"
            )
        metadata = json.loads(json.dumps({"format": FORMAT, "step": step, **metadata}))  # what is no JSON data fails here, not in a thread
        try:
            if jax.process_index() == 0:
                (self.directory / f".unfinished-{step}").touch()
            items = ocp.args.Composite(state=ocp.args.StandardSave(plain), metadata=ocp.args.JsonSave(metadata))
            self._manager.save(step, args=items, force=True)
        except Exception as error:
            raise self._not_saved(step, error) from error
        self._pending_step = step
        self._pending = self._finisher.submit(self._finish, step)

    def _finish(self, step: int) -> None:
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            step_dir = self.directory / str(step)
            write_manifest(step_dir)
            problems = verify(step_dir)
            if problems:
                raise CheckpointError("; ".join(problems))
            (self.directory / f".unfinished-{step}").unlink()
            for old in self._sound_looking()[: -self.keep]:
                _remove(self.directory / str(old))
        self._saved.add(step)

    def _sound_looking(self) -> list[int]:
        """Steps that have a manifest: the ones that retention counts. Unverified ones are nobody's to delete."""
        return [step for step in _steps(self.directory) if (self.directory / str(step) / MANIFEST).exists()]

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
            f"the checkpoint of step {step} could not be written to {self.directory} ({_root_cause(error)}); free space or repair the "
            f"disk and start the same command again. Sound checkpoints kept: {kept}"
        )

    def latest_valid(self) -> int | None:
        """The newest step whose files all match their manifest; None if there is no checkpoint at all.

        A newer one that does not match is logged as an error, file by file, and moved to `STEP.damaged`, so that its
        step can be saved again. Raises CheckpointError if there are checkpoints and none is sound: starting from
        scratch over somebody's checkpoints is not a fall-back.
        """
        self.wait()
        found, message = -1, ""
        if jax.process_index() == 0:
            steps = _steps(self.directory)
            step, skipped = _newest_sound(self.directory, steps)
            if step is None and steps:
                found, message = -2, _none_sound(self.directory, skipped)
            elif step is not None:
                found = step
                self._verified.add(step)
                for damaged in skipped:
                    aside = _free_name(self.directory / f"{damaged}.damaged")
                    os.rename(self.directory / str(damaged), aside)
                    logging.error("going back to step %d; the damaged checkpoint of step %d was moved to %s", step, damaged, aside)
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == -2:
            raise CheckpointError(message or f"process 0 found no sound checkpoint in {self.directory}; see its log")
        if found < 0:
            return None
        self._saved = {step for step in self._saved if step <= found}
        self._manager.reload()
        return found

    def restore(self, step: int, abstract_state: TrainState) -> TrainState:
        """Read the state of `step` into the structure, dtypes and shardings of `abstract_state`.

        Leaves of `abstract_state` are arrays or `jax.ShapeDtypeStruct`s; the sharding of each is honoured, whatever
        the devices the checkpoint was written on, and a leaf without one goes to the first local device.
        Raises CheckpointError for damaged files and for any tensor that is missing, left over or of another shape.
        """
        step_dir = self.directory / str(step)
        if not step_dir.is_dir():
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {_steps(self.directory) or 'none'}")
        if jax.process_index() == 0 and step not in self._verified:
            problems = verify(step_dir)
            if problems:
                raise CheckpointError(f"the checkpoint {step_dir} is damaged: " + "; ".join(problems))
        abstract = jax.tree.map(_abstract_leaf, _plain(abstract_state))
        differences = _shape_differences(_stored_shapes(step_dir), abstract)
        if differences:
            raise CheckpointError(
                f"the checkpoint {step_dir} does not fit this run's state:\n" + "\n".join(f"  {line}" for line in differences)
            )
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        self._saved.add(step)
        return _shaped_like(abstract_state, restored.state)

    def metadata(self, step: int) -> dict[str, Any]:
        """The JSON data saved with `step`."""
        return _read_metadata(self.directory / str(step))

    def close(self) -> None:
        """Wait for the last save and release the threads. Raises CheckpointError if that save failed."""
        try:
            self.wait()
        finally:
            self._finisher.shutdown(wait=True)
            self._manager.close()


def _abstract_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype, sharding=sharding)


def _shape_differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One line per path where the two trees of shaped leaves differ in presence or shape."""
    have = {path: tuple(leaf.shape) for path, leaf in tree_paths(stored).items()}
    want = {path: tuple(leaf.shape) for path, leaf in tree_paths(wanted).items()}
    lines = []
    for path in sorted(have.keys() | want.keys()):
        if path not in have:
            lines.append(f"{path}: {want[path]} in this run, not in the checkpoint")
        elif path not in want:
            lines.append(f"{path}: {have[path]} in the checkpoint, not in this run")
        elif have[path] != want[path]:
            lines.append(f"{path}: {have[path]} in the checkpoint, {want[path]} in this run")
    return lines


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _require_writable(directory: Path) -> None:
    probe = directory / f".probe-{jax.process_index()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"writable")
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"checkpoints cannot be written to {directory} ({error.strerror}: {error.filename}); "
            "choose another --workdir or make this one a writable directory"
        ) from error


def _remove_leftovers(directory: Path) -> None:
    """Remove what a killed process left: unfinished saves, Orbax's temporaries, half-deleted checkpoints."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".unfinished-"):
            logging.warning("the save of step %s was cut short; its remains are removed", path.name.removeprefix(".unfinished-"))
            _remove_unfinished(directory, int(path.name.removeprefix(".unfinished-")))
        elif path.name.startswith(".deleted-"):
            shutil.rmtree(path, ignore_errors=True)


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


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _read_metadata(step_dir: Path) -> dict[str, Any]:
    return ocp.JsonCheckpointHandler().restore(step_dir / "metadata", args=ocp.args.JsonRestore())


def versions() -> dict[str, str]:
    """Versions of what computed a checkpoint, for its metadata."""
    packages = {"jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "numpy": "numpy"}
    return {
        "maskvit": maskvit.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
    }


# ---------------------------------------------------------------------------------------------- weights alone


def save_imported(
    directory: str | os.PathLike,
    params: Params,
    metadata: Mapping[str, Any],
    adam: Mapping[str, Any] | None = None,
    objective_state: Mapping[str, Any] | None = None,
) -> None:
    """Write converted weights as the checkpoint of step 0 in `directory`, in the form of a training checkpoint.

    `params` is a nested dict of arrays; `metadata` holds "config", "source", "licence" ("versions" is added where
    absent); `adam` is {"count": int32 scalar, "mu": tree, "nu": tree}, trees of `params`' names without the frozen
    ones; `objective_state` what the objective keeps beside the parameters (a teacher). Raises CheckpointError if
    `directory` already holds step 0 or cannot be written.
    """
    state: dict[str, Any] = {"step": np.int32(0), "params": params, "skipped": np.int32(0)}
    if adam is not None:
        state["opt_state"] = {"adam": {name: adam[name] for name in ("count", "mu", "nu")}}
    if objective_state:
        state["objective_state"] = dict(objective_state)
    state = jax.tree.map(np.asarray, state)
    store = CheckpointStore(directory, keep=1)
    try:
        store._save(0, _plain(state), {"versions": versions(), **metadata})
    finally:
        store.close()


def _read_state_part(step_dir: Path, part: tuple[str, ...]) -> dict[str, Any]:
    """The sub-tree `part` of a stored state as numpy arrays, on any topology; nothing else is read."""
    tree = _stored_shapes(step_dir)
    for key in part:
        tree = tree[key]
    item = jax.tree.map(lambda _: 0, tree)
    arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    for key in reversed(part):
        item, arguments = {key: item}, {key: arguments}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(
            step_dir / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
        )
    for key in part:
        restored = restored[key]
    return restored


def load_params(path: str | os.PathLike) -> tuple[Params, dict[str, Any]]:
    """The parameters (nested dict of numpy arrays) and metadata of a verified checkpoint; `path` as in `find_checkpoint`."""
    step_dir = find_checkpoint(path)
    return _read_state_part(step_dir, ("params",)), _read_metadata(step_dir)


def load_objective_state(path: str | os.PathLike) -> dict[str, Any]:
    """What the objective of a verified checkpoint keeps beside its parameters, as numpy arrays; empty where it keeps nothing."""
    step_dir = find_checkpoint(path)
    if not _stored_shapes(step_dir).get("objective_state"):
        return {}
    return _read_state_part(step_dir, ("objective_state",))


def with_stored_teacher(objective_state: Any, path: str | os.PathLike) -> Any:
    """`objective_state` with teacher and centres of the checkpoint at `path`, where both have them and all are of the same shapes.

    Otherwise (another model, or one without a teacher) as it is: the teacher starts as the student.
    """
    if not isinstance(objective_state, Mapping) or "teacher" not in objective_state:
        return objective_state
    stored = load_objective_state(path)
    shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in tree_paths(tree).items()}  # noqa: E731
    if shapes(stored) != shapes(objective_state):
        logging.info("the teacher starts as the student: %s holds %s", path, "another one" if stored else "none")
        return objective_state
    logging.info("teacher and centres taken from %s", path)
    return stored


def load_teacher(path: str | os.PathLike) -> Params | None:
    """The teacher of a verified checkpoint of self-distillation, which stands for the run; None where there is none."""
    step_dir = find_checkpoint(path)
    part = ("objective_state", "teacher")
    return _read_state_part(step_dir, part) if part[1] in (_stored_shapes(step_dir).get(part[0]) or {}) else None


def load_adam(path: str | os.PathLike) -> dict[str, Any] | None:
    """Adam's {"count", "mu", "nu"} of a verified checkpoint as numpy arrays, None if it has none.

    Found in an imported checkpoint and in a run's own alike; `mu` and `nu` lack the frozen tensors.
    """
    step_dir = find_checkpoint(path)
    part = _find_adam(_stored_shapes(step_dir).get("opt_state", {}), ("opt_state",))
    return None if part is None else _read_state_part(step_dir, part)


def _find_adam(tree: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    if not isinstance(tree, Mapping):
        return None
    if tree.keys() >= {"count", "mu", "nu"}:
        return path
    found = (_find_adam(child, (*path, key)) for key, child in tree.items())
    return next((part for part in found if part is not None), None)


# ---------------------------------------------------------------------------------------------- starting from another model


class LoadRow(NamedTuple):
    """What `init_from` did with one tensor.

    `action`: "loaded", "resized", "fresh" or "dropped". `source_shape` is None where the checkpoint lacks the tensor,
    `shape` None where the model lacks it.
    """

    path: str
    action: str
    source_shape: tuple[int, ...] | None
    shape: tuple[int, ...] | None


def init_from(
    initial: Params, path: str | os.PathLike, fresh: Sequence[str] = (), drop: Sequence[str] = ()
) -> tuple[Params, list[LoadRow]]:
    """Start a model from a checkpoint of the same or a similar model.

    Args:
      initial: freshly initialised parameters, a nested dict of numpy or jax arrays.
      path: as in `find_checkpoint`.
      fresh: regular expressions, each matched against the *whole* path ("outputs/semseg/head/.*") of the model's
        tensors: those keep their fresh values.
      drop: the same for the checkpoint's tensors that are not wanted.

    Returns:
      (parameters in the structure, dtypes and shardings of `initial`; one LoadRow per tensor of either side.)
      Position tables ("pos_embed", "learned_pos_embed") of another grid are resampled bicubically, torch-exact.

    Raises CheckpointError listing every difference that neither list names, with the expressions that would accept
    it, and ValueError for an expression that is invalid or matches nothing.
    """
    loaded, _ = load_params(path)
    model, stored = tree_paths(initial), tree_paths(loaded)
    is_fresh = _matcher("config.init_from.fresh", fresh, model, "the model")
    is_dropped = _matcher("config.init_from.drop", drop, stored, f"the checkpoint {path}")

    rows, values, needs_fresh, needs_drop = [], {}, {}, {}
    for name, leaf in model.items():
        shape = tuple(leaf.shape)
        source = stored.get(name)
        source_shape = () if source is None else tuple(source.shape)
        if is_fresh(name):
            rows.append(LoadRow(name, "fresh", None if source is None else source_shape, shape))
        elif source is None or is_dropped(name):
            needs_fresh[name] = f"{name}: {shape} in the model, {'not' if source is None else 'dropped'} in the checkpoint"
        elif source_shape == shape:
            values[name] = source
            rows.append(LoadRow(name, "loaded", source_shape, shape))
        elif _is_other_grid(name, source_shape, shape):
            from maskvit.patches import resample_pos_embed  # einops and jax.numpy only where a table is resampled

            values[name] = resample_pos_embed(source, shape[:2], method="bicubic")
            rows.append(LoadRow(name, "resized", source_shape, shape))
        else:
            needs_fresh[name] = f"{name}: {shape} in the model, {source_shape} in the checkpoint"
    for name, source in stored.items():
        if name not in model:
            if is_dropped(name):
                rows.append(LoadRow(name, "dropped", tuple(source.shape), None))
            else:
                needs_drop[name] = f"{name}: {tuple(source.shape)} in the checkpoint, not in the model"
    if needs_fresh or needs_drop:
        raise CheckpointError(_differences_message(path, needs_fresh, needs_drop, model, stored))
    placed = {name: _placed_like(values[name], leaf) if name in values else leaf for name, leaf in model.items()}
    return _shaped_like(initial, _nested(placed)), rows


def _matcher(key: str, patterns: Sequence[str], names: Iterable[str], whose: str):
    """A predicate "some pattern matches the whole path"; ValueError for a pattern that is broken or matches no name."""
    if isinstance(patterns, str):
        raise ValueError(f"{key} is the string {patterns!r}; it must be a list of regular expressions")
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"{key} holds {pattern!r}, which is no regular expression: {error}") from error
        if not any(compiled[-1].fullmatch(name) for name in names):
            raise ValueError(
                f"{key} holds {pattern!r}, which matches no tensor of {whose}; it is matched against whole paths such as "
                f"{next(iter(names), 'encoder/block_00/norm1/scale')!r}"
            )
    return lambda name: any(expression.fullmatch(name) for expression in compiled)


def _is_other_grid(name: str, source: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return name.rpartition("/")[2] in ("pos_embed", "learned_pos_embed") and len(source) == len(target) == 3 and source[2] == target[2]


def _placed_like(value: Any, leaf: Any) -> Any:
    value = np.asarray(value).astype(leaf.dtype)
    return jax.device_put(value, leaf.sharding) if isinstance(leaf, jax.Array) else value


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def covering(named: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Few regular expressions that match exactly `named` among `everything`: whole sub-trees where all of one is named."""
    named, patterns = set(named), []
    others = set(everything) - named
    for name in sorted(named):
        parts = name.split("/")
        prefixes = ("/".join(parts[:length]) + "/" for length in range(1, len(parts)))
        whole = next((prefix for prefix in prefixes if not any(other.startswith(prefix) for other in others)), None)
        pattern = re.escape(name) if whole is None else re.escape(whole) + ".*"
        if pattern not in patterns:
            patterns.append(pattern)
    return patterns


def _differences_message(path: Any, needs_fresh: dict, needs_drop: dict, model: Iterable[str], stored: Iterable[str]) -> str:
    lines = [f"the checkpoint {path} differs from the model:"]
    lines += [f"  {line}" for line in (*needs_fresh.values(), *needs_drop.values())]
    lines.append("If that is meant, name it:")
    if needs_fresh:
        lines.append(f"  config.init_from.fresh += {covering(needs_fresh, model)}")
    if needs_drop:
        lines.append(f"  config.init_from.drop += {covering(needs_drop, stored)}")
    return "\n".join(lines)


def format_report(rows: Sequence[LoadRow]) -> str:
    """What `init_from` did as a text table: counts per top-level part, then every tensor that was not simply loaded."""
    counts: dict[str, collections.Counter] = {}
    for row in rows:
        counts.setdefault(row.path.partition("/")[0], collections.Counter())[row.action] += 1
    actions = ("loaded", "resized", "fresh", "dropped")
    lines = [f"{'part':<16}" + "".join(f"{action:>9}" for action in actions)]
    lines += [f"{part:<16}" + "".join(f"{count[action]:>9}" for action in actions) for part, count in sorted(counts.items())]
    for row in rows:
        if row.action != "loaded":
            lines.append(f"{row.action:<8} {row.path}  {_shape_text(row.source_shape)} -> {_shape_text(row.shape)}")
    return "\n".join(lines)


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape)) or "scalar"


# ---------------------------------------------------------------------------------------------- is it the same run?


def check_same_run(
    saved_config: Mapping[str, Any], config: Mapping[str, Any] | ml_collections.ConfigDict, may_differ: Sequence[str] = MAY_DIFFER
) -> list[str]:
    """Compare the config of a checkpoint with this run's before resuming.

    Args:
      saved_config: the config in the checkpoint's metadata. `config`: this run's.
      may_differ: dotted keys that may change; a key covers everything below it.

    Returns the allowed differences as lines (they are logged too). Raises ValueError listing all others: the workdir
    holds another config's run.
    """
    saved, current = _dotted(_as_json(saved_config)), _dotted(_as_json(config))
    allowed: list[str] = []
    refused: list[str] = []
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key, "(absent)"), current.get(key, "(absent)")
        if before != now:
            covered = any(key == free or key.startswith(free + ".") for free in may_differ)
            (allowed if covered else refused).append(f"{key}: {before!r} in the checkpoint, {now!r} in this config")
    if refused:
        listing = "\n".join(f"  {line}" for line in refused)
        raise ValueError(
            f"the workdir holds a run of another config:\n{listing}\n"
            "Choose another --workdir, or set these keys back. Free to change on resuming: " + ", ".join(may_differ)
        )
    for line in allowed:
        logging.info("config changed on resuming: %s", line)
    return allowed


def _as_json(config: Any) -> Any:
    """The config as it reads back from JSON: tuples are lists, ConfigDicts are dicts."""
    return json.loads(json.dumps(config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config))


def _dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of nested dicts; an empty dict is a leaf of its own, lists are leaves."""
    if not isinstance(tree, Mapping) or (prefix and not tree):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_dotted(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat
