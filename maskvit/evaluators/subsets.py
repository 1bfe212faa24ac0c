"""An evaluator of every non-empty subset of the inputs that a model may be shown."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

MOST_INPUTS = 6  # of which there are 63 subsets


def subsets(inputs: Sequence[str], needed: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """All non-empty subsets in order of size, each in the order of `inputs`, that contain all `needed` ones.

    Raises ValueError where there are too many.
    """
    if len(inputs) > MOST_INPUTS:
        raise ValueError(f"subsets of {len(inputs)} inputs are {2 ** len(inputs) - 1}: name at most {MOST_INPUTS} of them as shown")
    found = [chosen for size in range(1, len(inputs) + 1) for chosen in itertools.combinations(inputs, size)]
    return [chosen for chosen in found if set(needed) <= set(chosen)]


class Subsets:
    """One evaluator per subset, whose figures are called "rgb+depth/top1" and so on, and a picture of all figures as a table, "subsets".

    Pictures of the evaluators themselves are left out.
    """

    def __init__(self, members: Mapping[tuple[str, ...], Any]):
        self._members = {"+".join(chosen): evaluator for chosen, evaluator in members.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures that `run` yields."""
        return tuple(f"{name}/{figure}" for name, evaluator in self._members.items() for figure in evaluator.names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """What the data call the model's classes, where the members have classes: all read the same data."""
        return getattr(next(iter(self._members.values())), "label_names", ())

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        return dict(subsets={name: evaluator.protocol() for name, evaluator in self._members.items()})

    def run(self, params: Any, objective_state: Any, between: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        """Yield the figures of each subset, then the table."""
        from maskvit.plots.tables import table_picture

        rows: dict[str, dict[str, float]] = {}
        for name, evaluator in self._members.items():
            figures = {key: value for key, value in evaluator.run(params, objective_state, between) if isinstance(value, (int, float))}
            rows[name] = figures
            yield from ((f"{name}/{key}", value) for key, value in figures.items())
        columns = list(dict.fromkeys(key for figures in rows.values() for key in figures))
        yield "subsets", table_picture(columns, [(name, [figures.get(key) for key in columns]) for name, figures in rows.items()])
