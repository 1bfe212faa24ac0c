"""Weighted k-nearest-neighbor classification of frozen features: the quickest honest look at a representation.

The protocol is that of DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021), after
Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, Shaped

from maskvit.core.modalities import Modality
from maskvit.data.sources import has_labels
from maskvit.evaluators.reading import Reading, local, nothing
from maskvit.sharding import replicated

TRAIN_CHUNK, TEST_CHUNK = 8192, 128  # similarities held at a time; the result does not depend on them


# The classifier


def _normalize(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("ks", "num_classes", "num_train"))
def _ranks(
    train: Float[Array, "c r d"],
    train_labels: Int[Array, "c r"],
    test: Float[Array, "t d"],
    test_labels: Int[Array, " t"],
    temperature: Float[Array, ""],
    ks: tuple[int, ...],
    num_classes: int,
    num_train: int,
) -> Int[Array, "k t"]:
    """For every k, the place of each test example's own class among the votes, 0 = first. `train` comes in c chunks."""
    most, (chunks, rows, _) = max(ks), train.shape
    tests = test.shape[0]
    test = _normalize(test)

    def merge(best: Any, chunk: Any) -> tuple[Any, None]:
        index, features, labels = chunk
        similarity = jnp.matmul(test, _normalize(features).T, precision="highest", preferred_element_type=jnp.float32)
        similarity = jnp.where(index * rows + jnp.arange(rows) < num_train, similarity, -jnp.inf)
        # What was found before stands first: among equals `top_k` then takes the example that is stored earlier.
        candidates = jnp.concatenate([best[0], similarity], axis=1)
        values, where = jax.lax.top_k(candidates, most)
        candidate_labels = jnp.concatenate([best[1], jnp.broadcast_to(labels, (tests, rows))], axis=1)
        return (values, jnp.take_along_axis(candidate_labels, where, axis=1)), None

    none = jnp.full((tests, most), -jnp.inf), jnp.zeros((tests, most), jnp.int32)
    (similarity, labels), _ = jax.lax.scan(merge, none, (jnp.arange(chunks), train, train_labels))

    votes = jax.nn.one_hot(labels, num_classes) * jnp.exp(similarity / temperature)[..., None]
    classes = jnp.arange(num_classes)
    ranks = []
    for k in ks:
        scores = votes[:, :k].sum(axis=1)
        # A class that the training examples do not have gets no vote and comes last.
        own = jnp.take_along_axis(scores, test_labels[:, None], axis=1, mode="fill", fill_value=-1.0)
        before = (scores > own) | ((scores == own) & (classes < test_labels[:, None]))
        ranks.append(before.sum(axis=1, dtype=jnp.int32))
    return jnp.stack(ranks)


def weighted_knn(
    train_features: Num[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, " n"],
    test_features: Num[np.ndarray, "t d"],
    test_labels: Int[np.ndarray, " t"],
    ks: Sequence[int],
    num_classes: int,
    temperature: float = 0.07,
) -> dict[str, float]:
    """Classify by the k most similar training examples: {"top1_k20": percent right, "top5_k20": ...} for every k.

    Similarity is the cosine; a neighbor votes for its class with exp(similarity / temperature). Exact. Ties: the training
    example stored earlier is the nearer one, the class with the lower id ranks first. Classes without a vote are ranked
    too, and top-5 counts the first min(5, k) classes, both as DINO's protocol has it.

    Raises ValueError for a k above the number of training examples, labels out of range, or features that are not finite.
    """
    n, t = len(train_features), len(test_features)
    if not ks or min(ks) < 1 or max(ks) > n:
        raise ValueError(f"k-NN with ks = {tuple(ks)} over {n} training examples: each k must be between 1 and {n}")
    if not t:
        raise ValueError("k-NN without test examples")
    for name, labels in (("training", train_labels), ("test", test_labels)):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"k-NN: {name} labels range from {labels.min()} to {labels.max()}, for {num_classes} classes")
    for name, features in (("training", train_features), ("test", test_features)):
        if bad := int((~np.isfinite(features).all(axis=1)).sum()):
            raise ValueError(f"k-NN: the features of {bad} of {len(features)} {name} examples are not finite")
    rows = min(TRAIN_CHUNK, n)
    train = jnp.asarray(_in_chunks(np.asarray(train_features, np.float32), rows))
    classes = jnp.asarray(_in_chunks(np.asarray(train_labels, np.int32), rows))
    tests = _in_chunks(np.asarray(test_features, np.float32), min(TEST_CHUNK, t))
    own = _in_chunks(np.asarray(test_labels, np.int32), min(TEST_CHUNK, t))
    settings = dict(temperature=jnp.float32(temperature), ks=tuple(ks), num_classes=num_classes, num_train=n)
    rank = functools.partial(_ranks, train, classes, **settings)
    ranks = np.concatenate([np.asarray(rank(test=x, test_labels=y)) for x, y in zip(tests, own, strict=True)], axis=1)[:, :t]
    return {f"top{m}_k{k}": 100.0 * int((row < min(m, k)).sum()) / t for k, row in zip(ks, ranks, strict=True) for m in (1, 5)}


def _in_chunks(array: Shaped[np.ndarray, "n ..."], rows: int) -> Shaped[np.ndarray, "c r ..."]:
    """Cut into chunks of `rows`, the last one filled with zeros."""
    missing = -len(array) % rows
    return np.pad(array, ((0, missing),) + ((0, 0),) * (array.ndim - 1)).reshape(-1, rows, *array.shape[1:])


# Features of a whole data set


class Examples(NamedTuple):
    """Features by name and labels of all usable examples of a source, in stored order, on the host."""

    features: dict[str, Num[np.ndarray, "n d"]]
    labels: Int[np.ndarray, " n"]


def pixel_features(images: Num[Array, "b h w c"]) -> dict[str, Num[Array, "b d"]]:
    """What any representation must beat: the mean color, and the pixels themselves. Missing pixels count as 0."""
    known = jnp.nan_to_num(images) if jnp.issubdtype(images.dtype, jnp.floating) else images
    return {"mean_colour": known.astype(jnp.float32).mean(axis=(1, 2)), "raw_pixels": known.reshape(len(known), -1)}


class Knn:
    """Weighted k-NN on the features of an unmasked pass over the first input modality.

    Figures: "<feature>/top1_k<k>" and top5, in percent, for every feature of `objective.predict` (of a MultiMAE "mean" and
    "global") and, with `baselines`, "mean_colour" and "raw_pixels" of the same images.

    Args:
      train, test: sources with labels, as `config.data.train`; by default that data set itself and its split "val".
      limit_train, limit_test: only so many examples, evenly spread over the data (which may be stored class by class); None for all.
      ks: numbers of neighbors.
      temperature: of the votes.
      batch_size: images at once over all devices, rounded up to a multiple of them; the figures do not depend on it.
      crop: image side over the side of the resized picture it is cut from; 1.0 where pictures come in the model's size.
      baselines: also classify by mean color and raw pixels, centered on the training examples; for small images.

    Raises ValueError for data without labels or with fewer training examples than neighbors.
    """

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        train: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        limit_train: int | None = None,
        limit_test: int | None = None,
        ks: Sequence[int] = (10, 20),
        temperature: float = 0.07,
        batch_size: int = 256,
        crop: float | int = 0.875,
        baselines: bool = False,
    ):
        self._objective = objective
        self._input = objective.model.inputs[0]
        read = {self._input: modalities[self._input]}
        if baselines and read[self._input].kind != "continuous":
            raise ValueError(f"k-NN baselines need pixels, but the first input {self._input!r} has class ids: set baselines=False")
        self._ks, self._temperature, self._baselines = tuple(int(k) for k in ks), temperature, baselines
        default = dict(data["train"])
        blocks = {"train": (train or default, limit_train), "test": (test or {**default, "split": "val"}, limit_test)}
        self._readings = {
            split: Reading(block, read, image_size, mesh, data, inputs=(self._input,), batch_size=batch_size, limit=limit, crop=crop)
            for split, (block, limit) in blocks.items()
        }
        for split, reading in self._readings.items():
            if not has_labels(reading.source):
                raise ValueError(
                    f"k-NN needs labels, but the {split} data have none: {reading.source.describe()}. Drop the k-NN from "
                    "config.evaluators, give it data with labels as its train and test, or set config.data label"
                )
        available = len(self._readings["train"])
        if not self._ks or min(self._ks) < 1 or max(self._ks) > available:
            raise ValueError(f"k-NN with ks = {self._ks} over {available} training examples: each k must be between 1 and {available}")
        self._baseline_figures: list[tuple[str, float]] = []
        self._extract = jax.jit(self._features, static_argnames="pixels", out_shardings=replicated(mesh))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the figures of the model's features."""
        features = ("mean", "global") if self._objective.model.num_global_tokens else ("mean",)
        return tuple(f"{feature}/top{m}_k{k}" for feature in features for k in self._ks for m in (1, 5))

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        parts = {split: reading.protocol() for split, reading in self._readings.items()}
        return dict(parts, figures="knn", temperature=self._temperature)

    def _features(self, params: Any, state: Any, batch: Any, pixels: bool) -> tuple[dict[str, Array], Array, Array]:
        """(features by name, labels, valid) of a global batch, whole on every device."""
        features = self._objective.predict(params, state, batch.only((self._input,)))
        features |= pixel_features(batch.values[self._input]) if pixels else {}
        return features, batch.label, batch.valid

    def examples(self, split: str, params: Any, objective_state: Any, pixels: bool, between: Callable[[], None] = nothing) -> Examples:
        """All usable examples of "train" or "test", each once, the same on every process."""
        reading = self._readings[split]
        parts: list[tuple[dict[str, np.ndarray], np.ndarray]] = []
        for batch in reading.batches(f"k-NN {split}", between):
            features, labels, valid = local(self._extract(params, objective_state, batch, pixels))
            parts.append(({name: values[valid] for name, values in features.items()}, labels[valid]))
        labels = np.concatenate([part for _, part in parts])
        if (labels < 0).any():
            raise ValueError(f"k-NN needs labels, but {(labels < 0).sum()} of {len(labels)} records have none: {reading.source.describe()}")
        return Examples({name: np.concatenate([features[name] for features, _ in parts]) for name in parts[0][0]}, labels)

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Iterator[tuple[str, float]]:
        """Yield ("mean/top1_k20", percent) and so on; the baselines, which no training changes, are computed once."""
        pixels = self._baselines and not self._baseline_figures
        train = self.examples("train", params, objective_state, pixels, between)
        test = self.examples("test", params, objective_state, pixels, between)
        names = [len(reading.source.label_names) for reading in self._readings.values()]
        num_classes = int(max(*names, train.labels.max() + 1, test.labels.max() + 1))
        for feature, train_features in train.features.items():
            test_features = test.features[feature]
            baseline = feature in ("mean_colour", "raw_pixels")
            if baseline:  # all colors lie in one octant: the cosine must see how they differ
                center = train_features.mean(axis=0, dtype=np.float32)
                train_features, test_features = train_features - center, test_features - center
            figures = weighted_knn(train_features, train.labels, test_features, test.labels, self._ks, num_classes, self._temperature)
            for name, value in figures.items():
                if baseline:
                    self._baseline_figures.append((f"{feature}/{name}", value))
                else:
                    yield f"{feature}/{name}", value
        yield from self._baseline_figures
