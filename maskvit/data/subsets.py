"""Which records of a split a run takes: the first of each class, or a share or a number of them drawn by a seed, stratified by class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int


def first_of_each_class(labels: Iterable[int], names: Sequence[str], per_class: int, where: str) -> Int[np.ndarray, " k"]:
    """The first `per_class` records of each class, in stored order; `labels` is read no further than it takes, negative ones do not count.

    Raises ValueError where a class has fewer; `where` names the data.
    """
    counts = np.zeros(len(names), int)
    chosen = []
    for index, label in enumerate(labels):
        if label >= 0 and counts[label] < per_class:
            counts[label] += 1
            chosen.append(index)
            if len(chosen) == per_class * len(counts):
                break
    if (counts < per_class).any():
        least = int(counts.argmin())
        raise ValueError(
            f"config.data per_class is {per_class}, but class {names[least]!r} of {where}, has "
            f"{counts[least]} records: lower it"
        )
    return np.array(chosen, np.int64)


def stratified(labels: Int[np.ndarray, " n"], count: int, seed: int) -> Int[np.ndarray, " k"]:
    """`count` records in stored order, each class with its share of them, drawn without replacement by `seed`.

    Shares are rounded so that they add up to `count`: first down; what is left goes one each to classes that would have none, then to
    those with the largest remainders. Records without a label (negative) are a class of their own. What is drawn of a class depends on
    the seed, the class and its records alone, so that a smaller subset lies within a larger one up to that rounding.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    quota = count * sizes / max(1, len(labels))
    taken = np.floor(quota + 1e-9).astype(int)
    left = count - int(taken.sum())
    order = np.lexsort((classes, -(quota - taken), taken > 0))
    taken[order[:left]] += 1
    chosen = [
        np.random.default_rng((seed, int(label) + 1)).permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64) if chosen else np.zeros(0, np.int64)
