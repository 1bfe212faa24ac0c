"""The cells of a sweep: experiments that differ from one config in a few dotted keys."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from maskvit.core.config_files import config_of, get_value, parse_value, run_file, run_part, set_value
from maskvit.core.configuration import shown
from maskvit.core.errors import all_mistakes

# Keys of a cell that are none of its config: which function of the file gives the config that the others change, by default
# `get_config`; the cell whose weights of the same seed it begins with; and the one that it is compared with, by default the baseline.
CONFIG, AFTER, AGAINST = "config", "after", "against"


class Experiment(NamedTuple):
    """A config file: its plain config, the cells that its `get_sweep` names ({} where it has none), and the configs that cells name."""

    config: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    bases: Mapping[str, dict[str, Any]] = {}

    def base(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The config that a cell's other keys change."""
        return self.bases[changes[CONFIG]] if CONFIG in changes else self.config


def load_experiment(path: str | os.PathLike) -> Experiment:
    """Run a config file's `get_config` and, if there is one, `get_sweep`. Every key of a cell is checked.

    Raises FileNotFoundError, or ValueError for a file without `get_config` or a cell with a key that the config lacks.
    """
    module = run_file(path)
    config = config_of(module, path).to_dict()
    if not hasattr(module, "get_sweep"):
        return Experiment(config, {})
    cells = run_part(path, module.get_sweep)
    bases = {name: _named_config(module, path, name) for name in _asked(cells, CONFIG)}
    experiment = Experiment(config, {}, bases)
    return experiment._replace(cells=_checked(cells, path, experiment.base))


def load_cells(path: str | os.PathLike, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a file's `get_sweep`, checked against another file's config. Raises as `load_experiment`."""
    module = run_file(path)
    if not hasattr(module, "get_sweep"):
        raise ValueError(f"{path} defines no get_sweep()")
    cells = run_part(path, module.get_sweep)
    if named := [*_asked(cells, CONFIG), *_asked(cells, AFTER), *_asked(cells, AGAINST)]:
        raise ValueError(f"the cells of {path} are stages with configs of their own ({shown(named[0])}), not ways of masking of one config")
    return _checked(cells, path, lambda changes: config)


def _asked(cells: Any, key: str) -> list[str]:
    """What the cells name under one of their own keys."""
    changes = [cell for cell in cells.values() if isinstance(cell, Mapping)] if isinstance(cells, Mapping) else []
    return list(dict.fromkeys(cell[key] for cell in changes if key in cell))


def _named_config(module: ModuleType, path: str | os.PathLike, name: Any) -> dict[str, Any]:
    """The plain config that function `name` of a config file returns."""
    function = getattr(module, name, None) if isinstance(name, str) else None
    if not callable(function):
        raise ValueError(f"a cell of {path} has config = {shown(name)}, which is no function of that file")
    return run_part(path, function).copy_and_resolve_references().to_dict()


def _checked(cells: Any, path: str | os.PathLike, base: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    if not isinstance(cells, Mapping) or not all(isinstance(changes, Mapping) for changes in cells.values()):
        raise ValueError(f"get_sweep() of {path} must return {{cell: {{dotted key: value}}}}, not {shown(cells)}")
    with all_mistakes() as checks:
        for number, (name, changes) in enumerate(cells.items()):
            with checks.check():
                overrides(base(changes), own_keys(changes), f"cell {name!r} of {path}")
                if AFTER in changes and changes[AFTER] not in list(cells)[:number]:
                    raise ValueError(f"cell {name!r} of {path} comes after {shown(changes[AFTER])}, which is no cell before it")
                if AGAINST in changes and changes[AGAINST] not in cells:
                    raise ValueError(f"cell {name!r} of {path} is against {shown(changes[AGAINST])}, which is no cell of it")
    return {name: dict(changes) for name, changes in cells.items()}


def own_keys(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a config that a cell sets."""
    return {key: value for key, value in changes.items() if key not in (CONFIG, AFTER, AGAINST)}


def overrides(config: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of `config` with {dotted key: value} set (`config_files.set_value`); a value that is a dict replaces the block.

    Raises ValueError naming `where` and the key that cannot be set.
    """
    changed = copy.deepcopy(dict(config))
    for key, value in changes.items():
        set_value(changed, key, copy.deepcopy(value), where)
    return changed


def parse_grid(text: str, config: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """ "key=a,b" to (key, values), read as on a command line (`config_files.parse_value`); commas inside brackets do not split."""
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
    key = key.removeprefix("config.")
    return key, [parse_value(part.strip(), get_value(config, key)) for part in parts]


def make_cells(experiment: Experiment, grid: Sequence[tuple[str, Sequence[Any]]]) -> dict[str, dict[str, Any]]:
    """All cells by name: those of the config file, each with every combination of the grid.

    Raises ValueError where two cells get the same name or there is none.
    """
    if not experiment.cells and not grid:
        raise ValueError("nothing to sweep: give --grid key=a,b, or a config file with get_sweep()")
    if grid and any(AFTER in changes or AGAINST in changes for changes in experiment.cells.values()):
        raise ValueError("--grid multiplies cells, but some of this sweep refer to others: name what varies in its get_sweep()")
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
