"""A state as Orbax sees it: nested dicts of arrays on disk, read back whole or in part."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maskvit.checkpoints.manifest import CheckpointError, check_format
from maskvit.core.errors import message, printable
from maskvit.core.types import tree_paths


def plain_tree(tree: Any) -> dict[str, Any]:
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


def shaped_like(abstract: Any, plain: Mapping[str, Any]) -> Any:
    """The inverse of `plain_tree`: `abstract`'s structure with the leaves of `plain`."""
    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    leaves = []
    for path, _ in paths:
        node: Any = plain
        for key in path:
            node = node[_key_name(key)]
        leaves.append(node)
    return jax.tree_util.tree_unflatten(structure, leaves)


def stored_shapes(step_dir: Path) -> dict[str, Any]:
    """The nested dict of array metadata (`.shape`, `.dtype`) of the state in `step_dir`."""
    with reading(step_dir):
        metadata = ocp.PyTreeCheckpointHandler().metadata(step_dir / "state")
        tree = metadata.tree if hasattr(metadata, "tree") else metadata
        for path, leaf in tree_paths(tree).items():
            if not hasattr(leaf, "shape"):
                raise ValueError(f"{path} is no array")
    return tree


def read_state_part(step_dir: Path, part: tuple[str, ...]) -> dict[str, Any]:
    """The sub-tree `part` of a stored state as numpy arrays, on any topology; nothing else is read."""
    tree = stored_shapes(step_dir)
    with reading(step_dir):
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


def read_metadata(step_dir: Path) -> dict[str, Any]:
    """The JSON data saved with a checkpoint; its "config", where there is one, is a dict."""
    with reading(step_dir):
        metadata = ocp.JsonCheckpointHandler().restore(step_dir / "metadata", args=ocp.args.JsonRestore())
        if not isinstance(metadata, dict):
            raise ValueError(f"its metadata are a {type(metadata).__name__}, not a table")
        check_format(metadata)
        if not isinstance(metadata.get("config", {}), dict):
            raise ValueError("its config is no table")
    return metadata


@contextlib.contextmanager
def reading(step_dir: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the checkpoint's fault (its files match their manifest, but make no sense): CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"the checkpoint {step_dir} cannot be read: {root_cause(error)}") from error


@contextlib.contextmanager
def trusting(path: str | os.PathLike) -> Iterator[None]:
    """What a checkpoint says of its model is as little trusted as any file: what fails inside on its config is a CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"the config inside the checkpoint {path} cannot be used: it lacks {printable(str(error))}") from error
    except Exception as error:
        said = message(error)
        said = said if len(said) <= 1000 else f"{said[:1000]} ..."
        raise CheckpointError(f"the config inside the checkpoint {path} cannot be used: {said}") from error


def root_cause(error: BaseException) -> str:
    """The first line of the error that began it, with its type."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
