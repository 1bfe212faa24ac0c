"""How maps of objects, a number per patch, agree with masks: CorLoc, IoU, accuracy and the F-measure, as sums per batch.

Source: Wang et al., "Self-Supervised Transformers for Unsupervised Object Discovery using Normalized Cut" (TokenCut), 2022, and its
saliency evaluation: beta^2 = 0.3, 255 thresholds, the mean over pictures at each threshold before the maximum over thresholds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

THRESHOLDS = np.linspace(0, 1 - 1e-10, 255)
BETA_SQUARE = 0.3


class LocalizationSums(NamedTuple):
    """Over pictures that have an object."""

    pictures: Any  # Int "", how many
    located: Any  # Int "", how many whose box overlaps with an object's by at least half
    iou: Any  # Float "", of the predicted and the true object, 0 ... 1
    accuracy: Any  # Float "", shares of pixels on the right side
    f_measure: Any  # Float "t", per threshold


def boxes(inside: Bool[Array, "*b h w"]) -> Float[Array, "*b 4"]:
    """(top, left, bottom, right) around what is inside, ends not included; of nothing an empty box."""

    def ends(along: Bool[Array, "*b n"]) -> tuple[Array, Array]:
        n = along.shape[-1]
        first, last = jnp.argmax(along, axis=-1), n - jnp.argmax(along[..., ::-1], axis=-1)
        there = along.any(axis=-1)
        return jnp.where(there, first, 0), jnp.where(there, last, 0)

    (top, bottom), (left, right) = ends(inside.any(axis=-1)), ends(inside.any(axis=-2))
    return jnp.stack([top, left, bottom, right], axis=-1).astype(jnp.float32)


def box_iou(one: Float[Array, "*b 4"], other: Float[Array, "*b 4"]) -> Float[Array, "*b"]:
    """Intersection over union; 0 of empty boxes."""
    area = lambda box: jnp.prod(jnp.maximum(box[..., 2:] - box[..., :2], 0.0), axis=-1)  # noqa: E731
    corners = jnp.maximum(one[..., :2], other[..., :2]), jnp.minimum(one[..., 2:], other[..., 2:])
    both = area(jnp.concatenate(corners, axis=-1))
    return both / jnp.maximum(area(one) + area(other) - both, 1e-9)


def sums(
    maps: Float[Array, "b gh gw"],
    predicted: Bool[Array, "b gh gw"],
    region: Bool[Array, "b gh gw"],
    ids: Int[Array, "b h w"],
    objects: Bool[Array, " k"],
    valid: Bool[Array, " b"],
) -> LocalizationSums:
    """The sums of a batch.

    Args:
      maps: importance in 0 ... 1 per patch; `predicted`: patches taken for the object; `region`: those around which its box is drawn.
      ids: of the pixels, negative where unknown; such pixels count nowhere, nor do pictures without an object.
      objects: which ids are objects; each has a box of its own, and that of any of them may be found.
    """
    (b, gh, gw), (h, w) = maps.shape, ids.shape[1:]
    known = ids >= 0
    inside = known & objects[jnp.maximum(ids, 0)]
    per_patch = lambda x: x.reshape(b, gh, h // gh, gw, w // gw).sum(axis=(2, 4)).reshape(b, -1).astype(jnp.float32)  # noqa: E731
    of_object, of_known = per_patch(inside), per_patch(known)
    total, everything = of_object.sum(axis=1), of_known.sum(axis=1)
    counted = valid & (total > 0)

    chosen = predicted.reshape(b, -1)
    right, marked = (jnp.where(chosen, x, 0.0).sum(axis=1) for x in (of_object, of_known))
    iou = right / jnp.maximum(marked + total - right, 1.0)
    accuracy = (everything - marked - total + 2 * right) / jnp.maximum(everything, 1.0)

    above = (maps.reshape(b, 1, -1) >= jnp.asarray(THRESHOLDS, jnp.float32)[:, None]).astype(jnp.float32)
    right, marked = (jnp.einsum("btn,bn->bt", above, x, precision="highest") for x in (of_object, of_known))
    precision, recall = right / jnp.maximum(marked, 1.0), right / jnp.maximum(total, 1.0)[:, None]
    f_measure = (1 + BETA_SQUARE) * precision * recall / jnp.maximum(BETA_SQUARE * precision + recall, 1e-12)

    own = boxes(region) * jnp.array([h // gh, w // gw] * 2)
    best = lambda k: jnp.where(objects[k], box_iou(own, boxes(ids == k)), 0.0)  # noqa: E731
    overlap = jax.lax.map(best, jnp.arange(len(objects))).max(axis=0)
    return LocalizationSums(
        counted.sum(dtype=jnp.int32), (counted & (overlap >= 0.5)).sum(dtype=jnp.int32), jnp.where(counted, iou, 0.0).sum(),
        jnp.where(counted, accuracy, 0.0).sum(), jnp.where(counted[:, None], f_measure, 0.0).sum(axis=0),
    )  # fmt: skip


def summarize(sums: LocalizationSums) -> dict[str, float]:
    """Percentages "corloc", "iou", "accuracy" and "max_f"; NaN where no picture has an object."""
    n = int(sums.pictures)
    if not n:
        return dict.fromkeys(("corloc", "iou", "accuracy", "max_f"), float("nan"))
    values = sums.located, sums.iou, sums.accuracy, np.max(sums.f_measure)
    return {name: 100.0 * float(value) / n for name, value in zip(("corloc", "iou", "accuracy", "max_f"), values, strict=True)}
