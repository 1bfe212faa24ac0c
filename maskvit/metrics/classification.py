"""Figures of a classifier: sums that a batch gives on the device, and percentages of what they add up to.

`counts` and its like are for the device; `maskvit.metrics.accumulate.added` adds batches up on the host, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


class ClassSums(NamedTuple):
    """Per class of the label: samples, and how many of them have it as first, and among the first five; the summed loss; wrong labels."""

    samples: Any  # Int "k"
    first: Any  # Int "k"
    among_five: Any  # Int "k"
    loss: Any  # Float "", nats
    outside: Any  # Int "", labels above k - 1


class SetSums(NamedTuple):
    """Samples that have a set of labels, and how many of them are given one of theirs."""

    samples: Any  # Int ""
    correct: Any  # Int ""


def of_classes(logits: Float[Array, "b k"], classes: Sequence[int]) -> Float[Array, "b j"]:
    """The logits of some classes alone, in their order, for a test set that has only those: ImageNet-A and -R have 200 of 1,000.

    Labels are then positions in `classes`.
    """
    return logits[:, jnp.asarray(classes)]


def counts(logits: Float[Array, "b k"], label: Int[Array, " b"], valid: Bool[Array, " b"] | None = None) -> ClassSums:
    """The sums of a batch. Samples with a negative label, and the padding where `valid` is False, do not count.

    Equal logits: the lower class is first.
    """
    classes = logits.shape[-1]
    logits = logits.astype(jnp.float32)
    labeled = label >= 0 if valid is None else (label >= 0) & valid
    known = labeled & (label < classes)
    order = jax.lax.top_k(logits, min(5, classes))[1]
    hits = order == label[:, None]
    row = jnp.where(known, label, classes)  # one past the end: dropped
    loss = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, jnp.clip(label, 0, classes - 1)[:, None], axis=-1)[:, 0]
    per_class = lambda counted: jnp.zeros(classes, jnp.int32).at[row].add(counted.astype(jnp.int32), mode="drop")  # noqa: E731
    return ClassSums(
        per_class(known), per_class(hits[:, 0]), per_class(hits.any(axis=-1)), jnp.where(known, loss, 0.0).sum(),
        (labeled & ~known).sum(dtype=jnp.int32),
    )  # fmt: skip


def confusion_matrix(
    prediction: Int[Array, "*b"], label: Int[Array, "*b"], num_classes: int, valid: Bool[Array, "*b"] | None = None
) -> Int[Array, "k k"]:
    """How often a sample of class (row) is given class (column); those without a label or a prediction in 0 ... k - 1 do not count."""
    known = (label >= 0) & (label < num_classes) & (prediction >= 0) & (prediction < num_classes)
    known = known if valid is None else known & valid
    cell = jnp.where(known, label * num_classes + prediction, num_classes**2)
    matrix = jnp.zeros(num_classes**2, jnp.int32).at[cell.reshape(-1)].add(1, mode="drop")
    return matrix.reshape(num_classes, num_classes)


def set_counts(logits: Float[Array, "b k"], labels: Bool[Array, "b k"], valid: Bool[Array, " b"] | None = None) -> SetSums:
    """Against sets of labels, one row of flags each: right is what names any of them; samples with an empty set do not count.

    Source: Beyer et al., "Are we done with ImageNet?", 2020 (ReaL).
    """
    known = labels.any(axis=-1) if valid is None else labels.any(axis=-1) & valid
    correct = jnp.take_along_axis(labels, logits.argmax(axis=-1)[:, None], axis=-1)[:, 0]
    return SetSums(known.sum(dtype=jnp.int32), (known & correct).sum(dtype=jnp.int32))


def class_accuracy(sums: ClassSums) -> np.ndarray:
    """Per class, percent of its samples that are given it; NaN for classes without samples."""
    samples = np.asarray(sums.samples, np.float64)
    return 100.0 * np.divide(sums.first, samples, out=np.full(samples.shape, np.nan), where=samples > 0)


def summarize(sums: ClassSums | SetSums) -> dict[str, float]:
    """Percent right ("top1", "top5", "mean_class" over classes that have samples; of sets "real"), and the mean loss; NaN of nothing.

    "top5" is there where there are more than five classes. Raises ValueError where labels are not among the classes.
    """
    sums = jax.tree.map(np.asarray, sums)
    if isinstance(sums, SetSums):
        return {"real": 100.0 * int(sums.correct) / int(sums.samples) if sums.samples else math.nan}
    if int(sums.outside):
        raise ValueError(
            f"{int(sums.outside)} samples have labels above {len(sums.samples) - 1}, the last class: give the logits of all classes"
        )
    total = int(np.sum(sums.samples, dtype=np.int64))
    share = lambda hits: 100.0 * int(np.sum(hits, dtype=np.int64)) / total if total else math.nan  # noqa: E731
    figures = {"top1": share(sums.first)} | ({"top5": share(sums.among_five)} if len(sums.samples) > 5 else {})
    per_class = class_accuracy(sums)
    figures["mean_class"] = float(np.nanmean(per_class)) if total else math.nan
    return figures | {"loss": float(sums.loss) / total if total else math.nan}
