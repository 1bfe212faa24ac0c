"""Weighted k-nearest-neighbor classification of frozen features: the quickest honest look at a representation.

The protocol is that of DINO (Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021), after
Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Num, Shaped

from maskvit.core.modalities import Modality
from maskvit.evaluators.features import BASELINES, Examples, Extraction, check_features
from maskvit.evaluators.reading import check_labels, check_shown, labeled_splits, nothing

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


# The evaluator


def few_of_each_class(labels: Int[np.ndarray, " n"], per_class: int, seed: int) -> Int[np.ndarray, " k"]:
    """`per_class` examples of every class that occurs, drawn by `seed`, in stored order; fewer are part of more.

    Raises ValueError where a class has too few.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise ValueError(f"k-NN per_class is {per_class}, but class {label} has {len(members)} training examples: lower it")
        chosen.append(np.random.default_rng((seed, int(label))).permutation(members)[:per_class])
    return np.sort(np.concatenate(chosen))


class Knn:
    """Weighted k-NN on the features of an unmasked pass.

    Figures: "<feature>/top1_k<k>" and top5, in percent, for every feature and, with `baselines`, "mean_colour" and "raw_pixels" of the
    same images. With `per_class` also "<feature>/<n>_per_class/top1_k<k>", the mean over `draws` draws of n training examples of each
    class, and "..._std", the standard deviation over them (AttMask's few-example k-NN, there of fixed draws).

    Args:
      train, test: sources with labels, as `config.data.train`; by default that data set itself and its split "val".
      limit_train, limit_test: only so many examples, evenly spread over the data (which may be stored class by class); None for all.
      ks: numbers of neighbors.
      temperature: of the votes.
      batch_size: images at once over all devices, rounded up to a multiple of them; the figures do not depend on it.
      crop: image side over the side of the resized picture it is cut from; 1.0 where pictures come in the model's size.
      baselines: also classify by mean color and raw pixels, centered on the training examples; for small images.
      features: of "mean", "global" and "both" side by side; by default "mean" and, where the model has a global token, "global".
      shown: inputs that the model is shown; by default its first.
      norm: False for tokens as they leave the last block of a model that has a final norm, as efficient probing's k-NN reads them.
      per_class, draws: numbers of examples, and how often each is drawn.
      cache: a folder for features (`Extraction`), which other evaluators of the same weights then need not take again.

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
        features: Sequence[str] | None = None,
        shown: Sequence[str] | None = None,
        norm: bool = True,
        per_class: Sequence[int] = (),
        draws: int = 5,
        cache: str | None = None,
    ):
        model = objective.model
        inputs = check_shown(objective, model.inputs[:1] if shown is None else shown)
        self._features = tuple(features or (("mean", "global") if model.num_global_tokens else ("mean",)))
        check_features("k-NN", objective, self._features, norm, ("mean", "global", "both"))
        if baselines and modalities[inputs[0]].kind != "continuous":
            raise ValueError(f"k-NN baselines need pixels, but the first input {inputs[0]!r} has class ids: set baselines=False")
        self._ks, self._temperature, self._baselines = tuple(int(k) for k in ks), temperature, baselines
        self._per_class, self._draws = tuple(per_class), draws
        readings = labeled_splits(
            "k-NN", modalities, image_size, mesh, data, inputs, train, test, limit_train, limit_test, batch_size, crop
        )  # fmt: skip
        self._extractions = {
            split: Extraction(f"k-NN {split}", objective, reading, inputs=inputs, norm=norm, cache=cache)
            for split, reading in readings.items()
        }
        available = len(readings["train"])
        if not self._ks or min(self._ks) < 1 or max(self._ks) > available:
            raise ValueError(f"k-NN with ks = {self._ks} over {available} training examples: each k must be between 1 and {available}")
        if self._per_class and (min(self._per_class) < 1 or draws < 1):
            raise ValueError(f"k-NN per_class is {self._per_class} and draws {draws}; each must be at least 1")
        classes = len(readings["train"].source.label_names)
        if few := [n for n in self._per_class if classes and n * classes < max(self._ks)]:
            raise ValueError(f"k-NN per_class {few[0]} of {classes} classes is fewer than the {max(self._ks)} neighbors of ks: lower ks")
        self._baseline_figures: list[tuple[str, float]] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Of the figures of the model's features."""
        plain = [f"top{m}_k{k}" for k in self._ks for m in (1, 5)]
        few = [f"{n}_per_class/{name}{end}" for n in self._per_class for name in plain for end in ("", "_std")]
        figures = plain + few
        return tuple(f"{feature}/{figure}" for feature in self._features for figure in figures)

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        parts = {split: extraction.protocol() for split, extraction in self._extractions.items()}
        return dict(parts, figures="knn", temperature=self._temperature, draws=self._draws if self._per_class else 0)

    def examples(self, split: str, params: Any, objective_state: Any, pixels: bool, between: Callable[[], None] = nothing) -> Examples:
        """All usable examples of "train" or "test", each once, the same on every process."""
        kinds = [kind for kind in ("mean", "global") if kind in self._features or "both" in self._features]
        examples = self._extractions[split](params, objective_state, (*kinds, *(BASELINES if pixels else ())), between)
        check_labels("k-NN", examples, self._extractions[split].reading)
        return examples

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Iterator[tuple[str, float]]:
        """Yield ("mean/top1_k20", percent) and so on; the baselines, which no training changes, are computed once."""
        pixels = self._baselines and not self._baseline_figures
        train = self.examples("train", params, objective_state, pixels, between)
        test = self.examples("test", params, objective_state, pixels, between)
        names = [len(extraction.reading.source.label_names) for extraction in self._extractions.values()]
        num_classes = int(max(*names, train.labels.max() + 1, test.labels.max() + 1))
        classify = functools.partial(weighted_knn, ks=self._ks, num_classes=num_classes, temperature=self._temperature)
        for feature in self._features:
            one, other = train.feature(feature), test.feature(feature)
            for name, value in classify(one, train.labels, other, test.labels).items():
                yield f"{feature}/{name}", value
            for number in self._per_class:
                draws = []
                for draw in range(self._draws):
                    few = few_of_each_class(train.labels, number, draw)
                    draws.append(classify(one[few], train.labels[few], other, test.labels))
                for name in draws[0]:
                    values = [figures[name] for figures in draws]
                    yield f"{feature}/{number}_per_class/{name}", float(np.mean(values))
                    yield f"{feature}/{number}_per_class/{name}_std", float(np.std(values))
        for feature in BASELINES if pixels else ():  # all colors lie in one octant: the cosine must see how they differ
            center = train.features[feature].mean(axis=0, dtype=np.float32)
            one, other = train.features[feature] - center, test.features[feature] - center
            figures = classify(one, train.labels, other, test.labels)
            self._baseline_figures += [(f"{feature}/{name}", value) for name, value in figures.items()]
        yield from self._baseline_figures
