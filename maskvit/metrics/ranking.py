"""How several models compare over several tasks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def mean_ranks(losses: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """{model: {task: loss}} to {model: (mean of its losses, mean of its ranks)}: rank 1 has the least loss of a task.

    Equal losses share the mean of their ranks; a loss that is not finite comes last. Raises ValueError unless all have the same tasks. As
    MultiMAE compares initializations on the tasks of Taskonomy, by their L1 losses.
    """
    tasks = sorted(next(iter(losses.values()), {}))
    for model, of_model in losses.items():
        if sorted(of_model) != tasks or not tasks:
            raise ValueError(
                f"{model!r} has losses of {sorted(of_model)}, others of {tasks}: ranks need the same tasks of all, at least one"
            )
    table = np.array([[of_model[task] for task in tasks] for of_model in losses.values()], np.float64)
    order = np.where(np.isnan(table), np.inf, table)
    less, equal = (relation(order[None], order[:, None]).sum(axis=1) for relation in (np.less, np.equal))
    ranks = less + (equal + 1) / 2
    return {model: (float(row.mean()), float(rank.mean())) for model, row, rank in zip(losses, table, ranks, strict=True)}
