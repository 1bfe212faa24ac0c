"""A linear classifier of patch features, its regularization chosen by leaving out one photo at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, Shaped

from maskvit.commands.segment.photos import class_map, confusion, patch_labels
from maskvit.core.patches import patchify
from maskvit.core.types import Batch
from maskvit.data.batches import eval_batches
from maskvit.evaluators.logistic import Regression, Scaler
from maskvit.evaluators.reading import local
from maskvit.features import LoadedModel, Pictures, first_input
from maskvit.heads.values import encoded_tokens, prepare
from maskvit.metrics.segmentation import SegmentationSums, class_iou, summarize
from maskvit.sharding import make_mesh

# Factors C of the sum of losses beside |W|^2 / 2, from strong regularization to weak; features are standardized.
STRENGTHS = tuple(10.0**x for x in range(-6, 1))
ITERATIONS, TOLERANCE = 200, 1e-5
CHECKPOINT, RANDOM, PIXELS = "checkpoint", "randomly initialized encoder", "raw pixels"  # what features are of

Encoder = Callable[[Num[Array, "b h w c"]], Float[Array, "b n d"]]


# Features


def encoders(loaded: LoadedModel) -> dict[str, Encoder]:
    """Patch features of the checkpoint, of the same encoder with fresh weights, and the pixels of each patch themselves."""
    model, spec = loaded.model, first_input(loaded.model)
    fresh = loaded.objective.init(jax.random.key(0))[0]

    @jax.jit
    def tokens(params: Any, values: Any) -> Any:
        return encoded_tokens(model, params, Batch({spec.name: values}), inputs=(spec.name,)).patches

    pixels = jax.jit(lambda values: patchify(prepare(model, Batch({spec.name: values})).values[spec.name], spec.patch_pixels))
    return {CHECKPOINT: lambda x: tokens(loaded.params, x), RANDOM: lambda x: tokens(fresh, x), PIXELS: pixels}


class Seen(NamedTuple):
    """A photo and the features of its patches by encoder; `picture`: stored values at the photo's own size."""

    place: int
    picture: Shaped[np.ndarray, "h w c"]
    features: dict[str, Float[np.ndarray, "n d"]]


def see(
    loaded: LoadedModel, functions: Mapping[str, Encoder], paths: Sequence[Path], size: tuple[int, int], left_out: dict[Path, str]
) -> Iterator[Seen]:
    """Photos squeezed to `size`, one after the other. `left_out` receives those that cannot be read, with the reason."""
    spec = first_input(loaded.model)
    settings: dict[str, Any] = dict(batch_size=1, crop=None, originals=(spec.name,))
    with eval_batches(Pictures(paths, spec.name), {spec.name: spec}, size, **settings) as batches:
        for batch in batches:
            place = int(batch["index"][0])
            if not batch["valid"][0]:
                left_out[paths[place]] = batch["reason"][0]
                continue
            values = jnp.asarray(batch[spec.name])
            features = {name: np.asarray(function(values)[0], np.float32) for name, function in functions.items()}
            yield Seen(place, np.asarray(batch[f"original/{spec.name}"][0]), features)


# The classifier


class Weights(NamedTuple):
    """Scores of classes are features @ kernel + bias; features as the encoder gives them."""

    kernel: Float[np.ndarray, "d k"]
    bias: Float[np.ndarray, " k"]

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n k"]:
        """Of some patches."""
        return features @ self.kernel + self.bias


class Probe(NamedTuple):
    """What was fitted to the labeled photos.

    `tried`: strength -> mean IoU on photos left out, percent; `best`: the one chosen; `maps`: each photo's class map by the probe that did
    not see it, and `matrix` their confusion matrix, of that strength; `patches`: labeled ones by class.
    """

    weights: Weights
    tried: dict[float, float]
    best: float
    maps: list[Int[np.ndarray, "u v"]]
    matrix: Int[np.ndarray, "k k"]
    patches: Int[np.ndarray, " k"]


def sums_of(matrix: Int[np.ndarray, "k k"]) -> SegmentationSums:
    """A confusion matrix (true class, given class) in the form that `maskvit.metrics.segmentation` summarizes."""
    return SegmentationSums(np.diag(matrix), matrix.sum(axis=0), matrix.sum(axis=1), np.int64(0), np.int64(0))


def mean_iou(matrix: Int[np.ndarray, "k k"]) -> float:
    """In percent, over classes that are labeled or predicted."""
    return summarize(sums_of(matrix))["mean_iou"]


def ious(matrix: Int[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    """In percent by class, NaN where a class is neither labeled nor predicted."""
    return class_iou(sums_of(matrix))


def fit_probe(
    features: Sequence[Float[np.ndarray, "n d"]], counts: Sequence[Int[np.ndarray, "u v k"]], patch: int, between: Callable[[], None]
) -> Probe:
    """Multinomial logistic regression of the labeled patches.

    For every strength each photo is predicted by a probe of all others; of the strengths the one of the best mean IoU over the labeled
    pixels of all photos is taken, of equal ones the strongest regularization. Features are standardized over the labeled patches of all
    photos: a photo left out takes part in that, its labels do not. `between` is called after every photo that was left out.
    """
    height, width, num_classes = counts[0].shape
    grid, size = (height // patch, width // patch), (height, width)
    labels = np.concatenate([patch_labels(one, patch) for one in counts])
    photo = np.repeat(np.arange(len(counts)), grid[0] * grid[1])[labels >= 0]
    x, y = np.concatenate(features)[labels >= 0], labels[labels >= 0]
    scaler = Scaler(x)
    regression = Regression(scaler(x), y, num_classes, make_mesh(), ITERATIONS, TOLERANCE)
    tried: dict[float, tuple[Any, list[Any]]] = {}
    started: list[Any] = [None] * len(counts)
    for strength in STRENGTHS:
        maps = []
        for place, one in enumerate(features):
            started[place] = regression(strength, started[place], photo == place)  # from the next weaker strength's weights
            maps.append(class_map(_unscaled(started[place], scaler).scores(one), grid, size))
            between()
        tried[strength] = sum(confusion(*pair) for pair in zip(maps, counts, strict=True)), maps
    found = {strength: mean_iou(matrix) for strength, (matrix, _) in tried.items()}
    best = max(found, key=lambda strength: (found[strength], -strength))
    matrix, maps = tried[best]
    weights = _unscaled(regression(best), scaler)
    return Probe(weights, found, best, maps, matrix, np.bincount(y, minlength=num_classes))


def _unscaled(weights: Any, scaler: Scaler) -> Weights:
    """Weights of standardized features as those of the features themselves."""
    kernel, bias = (np.asarray(part, np.float64) for part in (local(weights)["kernel"], local(weights)["bias"]))
    kernel = kernel / scaler.deviation[:, None]
    return Weights(kernel.astype(np.float32), (bias - scaler.mean @ kernel).astype(np.float32))
