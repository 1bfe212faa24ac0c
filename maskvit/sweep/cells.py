"""The cells of a sweep: experiments that differ from one config in a few dotted keys."""

from __future__ import annotations

import ast
import copy
import importlib.machinery
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Experiment(NamedTuple):
    """A config file: its plain config, and the cells that its `get_sweep` names ({} where it has none)."""

    config: dict[str, Any]
    cells: dict[str, dict[str, Any]]


def load_experiment(path: str | os.PathLike) -> Experiment:
    """Run a config file's `get_config` and, if there is one, `get_sweep`. Every key of a cell is checked.

    Raises FileNotFoundError, or ValueError for a file without `get_config` or a cell with a key that the config lacks.
    """
    module = _run_file(path)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    config = module.get_config().to_dict()
    return Experiment(config, _cells(module, path, config) if hasattr(module, "get_sweep") else {})


def load_cells(path: str | os.PathLike, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a file's `get_sweep`, checked against another file's config. Raises as `load_experiment`."""
    module = _run_file(path)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{path} defines no get_sweep()")
    return _cells(module, path, config)


def _run_file(path: str | os.PathLike) -> ModuleType:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config file {path}")
    loader = importlib.machinery.SourceFileLoader("experiment", str(path))
    module = ModuleType("experiment")
    module.__file__ = str(path)
    loader.exec_module(module)
    return module


def _cells(module: Any, path: str | os.PathLike, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    cells = {name: dict(changes) for name, changes in module.get_sweep().items()}
    for name, changes in cells.items():
        overrides(config, changes, f"cell {name!r} of {path}")
    return cells


def overrides(config: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of `config` with {dotted key: value} set; a value that is a dict replaces the block.

    Raises ValueError naming `where` and the key that the config does not have.
    """
    changed = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *blocks, last = key.split(".")
        node: Any = changed
        for depth, name in enumerate([*blocks, last]):
            if not isinstance(node, dict) or name not in node:
                inside = "config." + ".".join([*blocks, last][:depth]) if depth else "config"
                known = ", ".join(map(str, node)) if isinstance(node, dict) else "no keys, it is a value"
                raise ValueError(f"{where} sets {key!r}, but {inside.rstrip('.')} has no {name!r}; it has: {known or 'no keys'}")
            node = node if depth == len(blocks) else node[name]
        node[last] = copy.deepcopy(value)
    return changed


def parse_grid(text: str) -> tuple[str, list[Any]]:
    """ "key=a,b" to (key, values): Python literals where they are such, else text; commas inside brackets do not split."""
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise ValueError(f"--grid {text!r} is not of the form key=value,value")
    parts, depth = [""], 0
    for character in values:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return key, [_literal(part.strip()) for part in parts]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make_cells(experiment: Experiment, grid: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """All cells by name: those of the config file, each with every combination of the grid.

    Raises ValueError where two cells get the same name or there is none.
    """
    if not experiment.cells and not grid:
        raise ValueError("nothing to sweep: give --grid key=a,b, or a config file with get_sweep()")
    cells: dict[str, dict[str, Any]] = {}
    for name, changes in (experiment.cells or {"": {}}).items():
        for values in itertools.product(*[values for _, values in grid]):
            chosen = {key: value for (key, _), value in zip(grid, values, strict=True)}
            parts = [name, *(f"{key}={value}" for key, value in chosen.items())]
            cell = re.sub(r"[^\w.=,+-]+", "_", ",".join(filter(None, parts)))
            if cell in cells:
                raise ValueError(f"two cells are called {cell!r}")
            cells[cell] = {**changes, **chosen}
    return cells
