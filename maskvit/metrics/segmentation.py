"""Figures of a semantic segmentation: pixels counted per class on the device, and percentages of what they add up to.

`maskvit.metrics.accumulate.added` adds batches up on the host in 64 bits: a data set has more pixels than 32 bits count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


class SegmentationSums(NamedTuple):
    """Labeled pixels by class: given their own class, given the class whatever they are, labeled with it; given no class; wrong labels."""

    intersection: Any  # Int "k"
    predicted: Any  # Int "k"
    labeled: Any  # Int "k"
    unassigned: Any  # Int ""
    outside: Any  # Int "", targets above k - 1


def counts(
    prediction: Int[Array, "b h w"], target: Int[Array, "b h w"], num_classes: int, valid: Bool[Array, " b"] | None = None
) -> SegmentationSums:
    """The sums of a batch of fewer than 2^31 pixels.

    Pixels whose target is negative (void, padding) do not count at all, whole pictures where `valid` is False neither. A prediction
    outside of 0 ... k - 1 is of no class.
    """
    labeled = target >= 0 if valid is None else (target >= 0) & valid[:, None, None]
    known = labeled & (target < num_classes)
    inside = (prediction >= 0) & (prediction < num_classes)

    def histogram(ids: Any, counted: Any) -> Any:
        places = jnp.where(counted, ids, num_classes).reshape(-1)  # one past the end: dropped
        return jnp.zeros(num_classes, jnp.int32).at[places].add(1, mode="drop")

    return SegmentationSums(
        histogram(target, known & (prediction == target)), histogram(prediction, known & inside), histogram(target, known),
        (known & ~inside).sum(dtype=jnp.int32), (labeled & ~known).sum(dtype=jnp.int32),
    )  # fmt: skip


def class_iou(sums: SegmentationSums) -> np.ndarray:
    """Per class, percent of intersection over union; NaN for a class that is neither labeled nor predicted anywhere."""
    intersection, predicted, labeled = (np.asarray(x, np.float64) for x in sums[:3])
    union = predicted + labeled - intersection
    return 100.0 * np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)


def summarize(sums: SegmentationSums) -> dict[str, float]:
    """Percentages over all labeled pixels of the set, not rounded; NaN where there are none.

    "mean_iou": mean over classes that are labeled or predicted anywhere; one that is predicted and never labeled counts 0.
    "mean_accuracy": mean over labeled classes of the share of their pixels given right; "pixel_accuracy": the share of all pixels.
    Source of these: MMSegmentation's older metric, as MultiMAE has it.
    "macro_jaccard": as "mean_iou", with "no class" as one more class of IoU 0 where any labeled pixel was given it: what scikit-learn's
    macro average makes of a predictor that may also give the ignored label, as CAPI measures. Equal where it cannot.

    Raises ValueError where targets are not among the classes.
    """
    if int(sums.outside):
        last = len(sums.labeled) - 1
        raise ValueError(f"{int(sums.outside)} pixels have targets above {last}, the last class: store void pixels as negative numbers")
    intersection, labeled = (np.asarray(x, np.float64) for x in (sums.intersection, sums.labeled))
    iou, present = class_iou(sums), labeled > 0
    if not present.any():
        return dict.fromkeys(("mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard"), float("nan"))
    known = iou[~np.isnan(iou)]
    return {
        "mean_iou": float(known.mean()),
        "mean_accuracy": float(100.0 * (intersection[present] / labeled[present]).mean()),
        "pixel_accuracy": float(100.0 * intersection.sum() / labeled.sum()),
        "macro_jaccard": float(known.sum() / (len(known) + (int(sums.unassigned) > 0))),
    }
