"""Weights alone: checkpoints of imported models, parts of a run's state, and starting a model from another one's weights."""

from __future__ import annotations

import collections
import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

import maskvit
from maskvit.checkpoints.arrays import plain_tree, read_metadata, read_state_part, shaped_like, stored_shapes
from maskvit.checkpoints.manifest import CheckpointError, find_checkpoint, manifest_digest
from maskvit.checkpoints.store import CheckpointStore
from maskvit.core.types import Params, tree_paths


def versions() -> dict[str, str]:
    """Versions of what computed a checkpoint, for its metadata."""
    packages = {"jax": "jax", "jaxlib": "jaxlib", "flax": "flax", "optax": "optax", "orbax": "orbax-checkpoint", "numpy": "numpy"}
    return {
        "maskvit": maskvit.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(package) for name, package in packages.items()},
    }


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
        store.save_plain(0, plain_tree(state), {"versions": versions(), **metadata})
    finally:
        store.close()


def load_params(path: str | os.PathLike) -> tuple[Params, dict[str, Any]]:
    """The parameters (nested dict of numpy arrays) and metadata of a verified checkpoint; `path` as in `find_checkpoint`."""
    step_dir = find_checkpoint(path)
    return read_state_part(step_dir, ("params",)), read_metadata(step_dir)


def load_objective_state(path: str | os.PathLike) -> dict[str, Any]:
    """What the objective of a verified checkpoint keeps beside its parameters, as numpy arrays; empty where it keeps nothing."""
    step_dir = find_checkpoint(path)
    if not stored_shapes(step_dir).get("objective_state"):
        return {}
    return read_state_part(step_dir, ("objective_state",))


def with_stored_teacher(objective_state: Any, path: str | os.PathLike) -> Any:
    """`objective_state` with teacher and centers of the checkpoint at `path`, where both have them and all are of the same shapes.

    Otherwise (another model, or one without a teacher) as it is: the teacher starts as the student.
    """
    if not isinstance(objective_state, Mapping) or "teacher" not in objective_state:
        return objective_state
    stored = load_objective_state(path)
    shapes = lambda tree: {name: tuple(leaf.shape) for name, leaf in tree_paths(tree).items()}  # noqa: E731
    if shapes(stored) != shapes(objective_state):
        logging.info("the teacher starts as the student: %s holds %s", path, "another one" if stored else "none")
        return objective_state
    logging.info("teacher and centers taken from %s", path)
    return stored


def load_epochs_done(path: str | os.PathLike) -> float | None:
    """For how many epochs the weights of a verified checkpoint were trained before they were imported; None where it does not say."""
    source = read_metadata(find_checkpoint(path)).get("source")
    epochs = source.get("epochs_done") if isinstance(source, Mapping) else None
    if epochs is not None and not (isinstance(epochs, (int, float)) and 0 <= epochs <= 1e9):
        raise CheckpointError(f"the checkpoint {path} states epochs_done = {str(epochs)[:80]!r}, which is no number of epochs")
    return epochs


def load_origin(path: str | os.PathLike) -> dict[str, Any]:
    """What a run that starts from a verified checkpoint records of it in its own, so that source and licence of the weights are not lost.

    `started_from`: {"checkpoint": path, "digest": of its manifest, "source": the file that was imported, also where runs lie between}.
    `licence`: that of the weights, None where none is recorded; checkpoints written before it was recorded have neither.
    """
    step_dir = find_checkpoint(path)
    metadata = read_metadata(step_dir)
    before = metadata.get("started_from")
    source = metadata.get("source") or (before.get("source") if isinstance(before, Mapping) else None)
    return dict(
        started_from=dict(checkpoint=os.fspath(path), digest=manifest_digest(step_dir), source=source), licence=metadata.get("licence")
    )


def load_label_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Names of the classes that a verified checkpoint's head was trained on; () where it does not say."""
    names = read_metadata(find_checkpoint(path)).get("label_names")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def load_teacher(path: str | os.PathLike) -> Params | None:
    """The teacher of a verified checkpoint of self-distillation, which stands for the run; None where there is none."""
    return _kept_by_objective(path, "teacher")


def load_statistics(path: str | os.PathLike) -> dict[str, Any]:
    """Running means and variances of a verified checkpoint's head; empty where it keeps none."""
    return _kept_by_objective(path, "statistics") or {}


def _kept_by_objective(path: str | os.PathLike, name: str) -> dict[str, Any] | None:
    """One entry of what the objective of a verified checkpoint keeps; None where there is none."""
    step_dir = find_checkpoint(path)
    part = ("objective_state", name)
    return read_state_part(step_dir, part) if name in (stored_shapes(step_dir).get(part[0]) or {}) else None


# Which weights of a checkpoint a run may begin from, and where they stand.
WEIGHTS = {"params": ("params",), "teacher": ("objective_state", "teacher"), "ema": ("objective_state", "ema")}


def load_weights(path: str | os.PathLike, weights: str = "params", key: str = "config.init_from.weights") -> Params:
    """One of `WEIGHTS` of a verified checkpoint. Raises CheckpointError, naming `key`, where it holds none of that name."""
    step_dir, part = find_checkpoint(path), WEIGHTS[weights]
    tree: Any = stored_shapes(step_dir)
    for name in part:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    if not tree:
        raise CheckpointError(f"{key} is {weights!r}, but the checkpoint {path} holds none")
    return read_state_part(step_dir, part)


def load_adam(path: str | os.PathLike) -> dict[str, Any] | None:
    """Adam's {"count", "mu", "nu"} of a verified checkpoint as numpy arrays, None if it has none.

    Found in an imported checkpoint and in a run's own alike; `mu` and `nu` lack the frozen tensors.
    """
    step_dir = find_checkpoint(path)
    part = _find_adam(stored_shapes(step_dir).get("opt_state", {}), ("opt_state",))
    if part is None:
        return None
    adam = read_state_part(step_dir, part)
    if np.shape(adam["count"]) or not np.issubdtype(np.asarray(adam["count"]).dtype, np.integer):
        raise CheckpointError(f"the checkpoint {path} holds optimizer moments whose count is no whole number")
    return adam


def _find_adam(tree: Any, path: tuple[str, ...]) -> tuple[str, ...] | None:
    if not isinstance(tree, Mapping):
        return None
    if tree.keys() >= {"count", "mu", "nu"}:
        return path
    found = (_find_adam(child, (*path, key)) for key, child in tree.items())
    return next((part for part in found if part is not None), None)


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
    initial: Params,
    path: str | os.PathLike,
    fresh: Sequence[str] = (),
    drop: Sequence[str] = (),
    weights: str = "params",
    differences: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[list[str], list[str]]] | None = None,
) -> tuple[Params, list[LoadRow]]:
    """Start a model from a checkpoint of the same or a similar model.

    Args:
      initial: freshly initialized parameters, a nested dict of numpy or jax arrays.
      path: as in `find_checkpoint`.
      fresh: regular expressions, each matched against the *whole* path ("outputs/semseg/head/.*") of the model's
        tensors: those keep their fresh values.
      drop: the same for the checkpoint's tensors that are not wanted.
      weights: which of the checkpoint's: a row of `WEIGHTS`.
      differences: (shapes stored, own shapes) by name -> (names that also begin fresh, names that also are dropped).

    Returns:
      (parameters in the structure, dtypes and shardings of `initial`; one LoadRow per tensor of either side.)
      Position tables ("pos_embed", "learned_pos_embed") of another grid are resampled as the model does at run time.

    Raises CheckpointError listing every difference that neither list names, with the expressions that would accept
    it, and ValueError for an expression that is invalid or matches nothing.
    """
    loaded = load_weights(path, weights)
    model, stored = tree_paths(initial), tree_paths(loaded)
    if differences is not None:
        shapes = [{name: tuple(leaf.shape) for name, leaf in tree.items()} for tree in (stored, model)]
        also_fresh, also_dropped = differences(*shapes)
        fresh, drop = (*fresh, *map(re.escape, also_fresh)), (*drop, *map(re.escape, also_dropped))
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
            values[name] = _resampled(name, source, shape[:2])
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
    return shaped_like(initial, _nested(placed)), rows


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


def _resampled(name: str, table: Any, grid: tuple[int, int]) -> Any:
    from maskvit.core.patches import resample_learned, resample_pos_embed

    learned = name.rpartition("/")[2] == "learned_pos_embed"
    return resample_learned(table, grid) if learned else resample_pos_embed(table, grid, "bicubic")


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
    named = set(named)
    mixed = {prefix for name in set(everything) - named for prefix in _prefixes(name)}
    patterns: dict[str, None] = {}
    for name in sorted(named):
        whole = next((prefix for prefix in _prefixes(name) if prefix not in mixed), None)
        patterns[re.escape(name) if whole is None else re.escape(whole) + ".*"] = None
    return list(patterns)


def _prefixes(path: str) -> list[str]:
    """The sub-trees that a path lies in, the largest first."""
    parts = path.split("/")
    return ["/".join(parts[:length]) + "/" for length in range(1, len(parts))]


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
    # A whole sub-tree of which the same was done is one line: decoders that a task does not need have many tensors.
    done: dict[str, collections.Counter] = {}
    for row in rows:
        for prefix in _prefixes(row.path):
            done.setdefault(prefix, collections.Counter())[row.action] += 1
    told: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.action == "loaded":
            continue
        whole = next((prefix for prefix in _prefixes(row.path) if done[prefix].keys() == {row.action}), "")
        if whole and done[whole][row.action] > 1:
            told[row.action, whole] = done[whole][row.action]
        else:
            lines.append(f"{row.action:<8} {row.path}  {_shape_text(row.source_shape)} -> {_shape_text(row.shape)}")
    lines += [f"{action:<8} {whole}...  {count} tensors" for (action, whole), count in told.items()]
    return "\n".join(lines)


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else "x".join(map(str, shape)) or "scalar"
