"""How far cheap guidance agrees with the exact one: common tokens, corrected for chance and held against a ceiling."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from maskvit.core.types import TokenLayout

# What MultiMAE shows of its tokens when the most attended are hidden, and the share that hints and object maps look at.
LOW, HIGH = 0.17, 0.25


def lowest(scores: Float[np.ndarray, " n"], count: int) -> Bool[np.ndarray, " n"]:
    """True for the `count` lowest; ties by lower index."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(scores, kind="stable")[:count]] = True
    return chosen


def ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 0, equal values sharing their mean rank."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    first = np.cumsum(counts) - counts
    return (first + (counts - 1) / 2.0)[group].astype(np.float64)


def spearman(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    """Rank correlation; 0 where one of them is constant."""
    a, b = ranks(one) - (len(one) - 1) / 2, ranks(other) - (len(other) - 1) / 2
    norm = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / norm) if norm else 0.0


def overlap(scores: Float[np.ndarray, "b n"], exact: Float[np.ndarray, "b n"]) -> dict[str, float]:
    """Means over samples: share of common tokens among the `LOW` lowest- and `HIGH` highest-scored ("low", "high"), and "spearman"."""
    n = exact.shape[1]
    low, high = max(1, round(LOW * n)), max(1, round(HIGH * n))
    pairs = list(zip(scores, exact, strict=True))
    common = lambda sign, k: np.mean([(lowest(sign * a, k) & lowest(sign * b, k)).sum() / k for a, b in pairs])  # noqa: E731
    return dict(low=float(common(1, low)), high=float(common(-1, high)), spearman=float(np.mean([spearman(a, b) for a, b in pairs])))


def chance(tokens: int) -> dict[str, float]:
    """What `overlap` expects of random scores."""
    return dict(low=max(1, round(LOW * tokens)) / tokens, high=max(1, round(HIGH * tokens)) / tokens, spearman=0.0)


def agreement(
    scores: Float[np.ndarray, "b n"], exact: Float[np.ndarray, "b n"], mirrored: Float[np.ndarray, "b n"], layout: TokenLayout
) -> dict[str, dict[str, float]]:
    """Per modality: `overlap`, and "<measure>_corrected" = (overlap - chance) / (overlap of `mirrored` - chance).

    `mirrored`: the exact scores of the mirrored samples, mirrored back: what a change that means nothing leaves of the agreement,
    hence the ceiling. NaN where the ceiling is not above chance.
    """
    found = {}
    for name, span in zip(layout.names, layout.spans(), strict=True):
        ours, ceiling = overlap(scores[:, span], exact[:, span]), overlap(mirrored[:, span], exact[:, span])
        base = chance(span.stop - span.start)
        found[name] = ours | {f"{key}_corrected": corrected(ours[key], base[key], ceiling[key]) for key in ours}
    return found


def corrected(value: float, base: float, ceiling: float) -> float:
    """0 at chance, 1 at the ceiling; NaN where the ceiling is not above chance."""
    return (value - base) / (ceiling - base) if ceiling > base else float("nan")


def mean_over_modalities(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Every measure averaged over modalities, those without a value left out."""
    keys = next(iter(found.values()))
    return {key: float(np.nanmean([values[key] for values in found.values()])) for key in keys}
