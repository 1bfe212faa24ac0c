"""Frozen patch tokens against the pixels below them: k-NN, logistic regression and ridge regression, without any training of a head.

Protocol of the first two: Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling" (CAPI), 2025: pictures are
squeezed to the model's size, features standardized over the training patches, settings chosen on a tenth of the training pictures.
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

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.evaluators.features import Examples, Extraction, check_features
from maskvit.evaluators.frozen import held_out
from maskvit.evaluators.logistic import STRENGTHS, Regression, Scaler, check_strengths, scores
from maskvit.evaluators.reading import Reading, check_shown, local, nothing, target_modality
from maskvit.heads.dense import resize
from maskvit.metrics import depth, segmentation
from maskvit.metrics.accumulate import added
from maskvit.sharding import batch_sharding, replicated, sample_devices

WHERE = "config.evaluators options"
TRAIN_CHUNK, TEST_CHUNK = 65_536, 2048  # patches compared at a time; no figure depends on them
Index = Int[np.ndarray, "_"]  # numbers of pictures


class Patches:
    """What evaluators of patch tokens share: tokens and maps of training and test pictures, and what is held out of the former.

    Args:
      target: a modality of the model, or a declaration of one, as in `config.modalities`, with its "name"; its patch is the input's.
      train, test: sources with such maps, as `config.data.train`; by default that data set itself and its split "val".
      limit_train, limit_test: only so many pictures, evenly spread over the data; None for all.
      crop: None squeezes whole pictures to the model's size, as CAPI does; else as in `maskvit.data.batches.eval_batches`.
      batch_size, norm, cache: as in `maskvit.evaluators.frozen.Frozen`; `shown`: one input, by default the model's first.
      hold_out, seed: the share of the training pictures by which settings are chosen, and of which permutation.
      options: what the evaluator alone knows; the signature of its `read_options`.

    Tokens of all pictures are held in memory, or with `cache` on disk.
    """

    what, kind = "", "categorical"
    names: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        target: str | Mapping[str, Any],
        train: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        limit_train: int | None = None,
        limit_test: int | None = None,
        batch_size: int = 256,
        crop: float | int | None = None,
        shown: Sequence[str] | None = None,
        norm: bool = True,
        cache: str | None = None,
        hold_out: float = 0.1,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ):
        check_arguments(WHERE, self.read_options, options or {})
        self.options, self.mesh = self.read_options(**(options or {})), mesh
        if not 0 < hold_out < 1:
            raise ValueError(f"{self.what} hold_out is {hold_out}; it must be a share between 0 and 1")
        self._hold_out, self._seed = float(hold_out), seed
        inputs = check_shown(objective, objective.model.inputs[:1] if shown is None else shown)
        if len(inputs) > 1:
            raise ValueError(f"{self.what} reads the tokens of one input, but shown names {', '.join(inputs)}")
        check_features(self.what, objective, (), norm, ())
        spec = self.spec = target_modality(self.what, target, modalities, self.kind, inputs)
        self.grid = modalities[inputs[0]].grid(image_size)
        if spec.grid(image_size) != self.grid:
            raise ValueError(f"{self.what} target {spec.name!r} must have the patch of the input {inputs[0]!r}")
        default = dict(data["train"])
        blocks = {"train": (train or default, limit_train), "test": (test or {**default, "split": "val"}, limit_test)}
        read = {name: modalities[name] for name in inputs} | {spec.name: spec}
        self.extractions = {}
        for split, (block, limit) in blocks.items():
            reading = Reading(block, read, image_size, mesh, data, inputs=inputs, batch_size=batch_size, limit=limit, crop=crop)
            if inputs[0] in reading.source.may_lack:
                raise ValueError(f"{self.what} needs {inputs[0]!r} of every picture, but some may lack it: {reading.source.describe()}")
            self.extractions[split] = Extraction(
                f"{self.what} {split}", objective, reading, inputs=inputs, norm=norm, target=spec.name, cache=cache
            )  # fmt: skip
        if len(self.extractions["train"].reading) < 2:
            raise ValueError(f"{self.what} needs at least 2 training pictures, one to fit to and one to choose by")

    @staticmethod
    def read_options() -> dict[str, Any]:
        """What `options` may hold."""
        raise NotImplementedError

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        parts = {split: extraction.protocol() for split, extraction in self.extractions.items()}
        return dict(
            parts, figures=type(self).__name__.lower(), target=self.spec.name, hold_out=self._hold_out, seed=self._seed, **self.options
        )  # fmt: skip

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Iterator[tuple[str, float]]:
        """Yield the figures."""
        train, test = (self.extractions[split](params, objective_state, ("tokens",), between) for split in ("train", "test"))
        fitted, chosen_by = held_out(np.arange(len(train.labels)), self._hold_out, self._seed)
        yield from self.fit(train, test, fitted, chosen_by, between)

    def fit(self, train: Examples, test: Examples, fitted: Index, chosen_by: Index, between: Callable[[], None]) -> Any:
        """The figures of what is fitted to the training pictures `fitted` and chosen by `chosen_by`."""
        raise NotImplementedError

    def tokens(self, examples: Examples, index: Index) -> Float[np.ndarray, "m d"]:
        """Patch tokens of some pictures, one after the other."""
        tokens = np.asarray(examples.features["tokens"][index])[:, : self.grid[0] * self.grid[1]]
        return tokens.reshape(-1, tokens.shape[2])

    def blocks(self, examples: Examples, index: Index) -> Num[np.ndarray, "m p"]:
        """The pixels below those patches, row by row."""
        maps = np.asarray(examples.labels[index])
        maps = maps.reshape(len(maps), maps.shape[1], maps.shape[2])  # numbers have one channel
        side = self.spec.patch_pixels
        blocks = maps.reshape(len(maps), self.grid[0], side, self.grid[1], side).transpose(0, 1, 3, 2, 4)
        return blocks.reshape(-1, side * side)


def majority(blocks: Int[np.ndarray, "m p"], num_classes: int) -> Int[np.ndarray, " m"]:
    """The most frequent class of each block, -1 where more pixels have none; of equal ones the least, -1 before all."""
    counts = np.zeros((len(blocks), num_classes + 1), np.int32)
    np.add.at(counts, (np.arange(len(blocks))[:, None], blocks + 1), 1)
    return counts.argmax(axis=1).astype(np.int32) - 1


class Segmented(Patches):
    """Patch tokens against classes of pixels. Figures as of the evaluator "segmentation", of which CAPI reports "macro_jaccard"."""

    figures = ("mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard")

    def patches(self, examples: Examples, index: Index) -> tuple[Float[np.ndarray, "m d"], Int[np.ndarray, "m p"], Int[np.ndarray, " m"]]:
        """(Tokens, pixels, most frequent class) of the patches that are mostly labeled; ValueError where none is."""
        blocks = self.blocks(examples, index)
        label = majority(blocks, self.spec.num_classes)
        if not (label >= 0).any():
            raise ValueError(f"{self.what}: no training patch is labeled: {self.extractions['train'].reading.source.describe()}")
        return self.tokens(examples, index)[label >= 0], blocks[label >= 0], label[label >= 0]

    def sums(self, prediction: Int[Array, "m p"], blocks: Int[Array, "m p"]) -> Any:
        """The sums of some patches."""
        return segmentation.counts(prediction[:, None], blocks[:, None], self.spec.num_classes)


@functools.partial(jax.jit, static_argnames=("most", "cosine"))
def _nearer(
    best: tuple[Float[Array, "t k"], Int[Array, "t k"]], test: Float[Array, "t d"], train: Float[Array, "r d"], first: Int[Array, ""],
    count: Int[Array, ""], most: int, cosine: bool,
) -> tuple[Float[Array, "t k"], Int[Array, "t k"]]:  # fmt: skip
    """The nearest of what was found before and of training patches first ... first + count - 1; of equal ones the earlier."""
    if cosine:
        test, train = (x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (test, train))
    near = jnp.matmul(test, train.T, precision="highest")
    if not cosine:
        near = 2 * near - jnp.square(train).sum(axis=1)  # less what is the same for all
    near = jnp.where(jnp.arange(len(train)) < count, near, -jnp.inf)
    places = jnp.broadcast_to(first + jnp.arange(len(train)), near.shape)
    values, where = jax.lax.top_k(jnp.concatenate([best[0], near], axis=1), most)
    return values, jnp.take_along_axis(jnp.concatenate([best[1], places], axis=1), where, axis=1)


class PatchKnn(Segmented):
    """k-NN of patches: each pixel gets the most frequent class of that pixel in the k nearest training patches; of equal ones the least.

    Figures on the test data: "mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard" with the setting of the best "macro_jaccard"
    on held-out pictures, then of all training patches; "held_out_macro_jaccard", "k", and "cosine", 1 for cosines and 0 for distances.

    Options: `ks`, `metrics` ("cosine", "euclidean"): their products are the settings.
    """

    what = "patch k-NN"
    names = (*Segmented.figures, "held_out_macro_jaccard", "k", "cosine")

    @staticmethod
    def read_options(*, ks: Sequence[int] = (1, 3, 10, 30), metrics: Sequence[str] = ("cosine", "euclidean")) -> dict[str, Any]:
        """What `options` may hold."""
        if not ks or min(ks) < 1:
            raise ValueError(f"{WHERE}.ks is {tuple(ks)}; give numbers of neighbors, at least 1")
        if not metrics or set(metrics) - {"cosine", "euclidean"}:
            raise ValueError(f"{WHERE}.metrics is {tuple(metrics)}; known: cosine, euclidean")
        return dict(ks=tuple(sorted(ks)), metrics=tuple(metrics))

    def fit(self, train: Examples, test: Examples, fitted: Index, chosen_by: Index, between: Callable[[], None]) -> Any:
        """The figures."""
        every = [(k, metric) for metric in self.options["metrics"] for k in self.options["ks"]]
        found = self._classified(train, fitted, train, chosen_by, every, between)
        best = max(every, key=lambda setting: found[setting]["macro_jaccard"])
        everything = np.arange(len(train.labels))
        figures = self._classified(train, everything, test, np.arange(len(test.labels)), [best], between)[best]
        yield from figures.items()
        yield "held_out_macro_jaccard", found[best]["macro_jaccard"]
        yield "k", float(best[0])
        yield "cosine", float(best[1] == "cosine")

    def _classified(
        self, train: Examples, fitted: Index, test: Examples, tested: Index, settings: Sequence[tuple[int, str]],
        between: Callable[[], None],
    ) -> dict[tuple[int, str], dict[str, float]]:  # fmt: skip
        """The figures of each setting on pictures of `test`."""
        x, pixels, _ = self.patches(train, fitted)
        scaler = Scaler(x)
        ks = sorted({k for k, _ in settings})
        if ks[-1] > len(x):
            raise ValueError(f"{self.what} with k = {ks[-1]} over {len(x)} labeled training patches: lower ks")
        found: dict[tuple[int, str], dict[str, float]] = {}
        for metric in dict.fromkeys(metric for _, metric in settings):
            totals: dict[int, Any] = dict.fromkeys(ks)
            group = max(1, TEST_CHUNK // (self.grid[0] * self.grid[1]))  # whole pictures
            for neighbors, index in self._neighbors(x, scaler, test, tested, group, ks[-1], metric == "cosine"):
                between()
                truth = self.blocks(test, index)
                near = pixels[neighbors]  # "m k p"
                for k in ks:
                    prediction = _mode(jnp.asarray(near[:, :k]), self.spec.num_classes)
                    totals[k] = added(totals[k], self.sums(prediction, jnp.asarray(truth)))
            found |= {(k, metric): segmentation.summarize(totals[k]) for k in ks}
        return found

    def _neighbors(
        self, train: Float[np.ndarray, "r d"], scaler: Scaler, test: Examples, tested: Index, group: int, most: int, cosine: bool
    ) -> Iterator[tuple[Int[np.ndarray, "m k"], Index]]:
        """(The nearest training patches, pictures) of groups of pictures; features are scaled here, part by part."""
        groups = [tested[first : first + group] for first in range(0, len(tested), group)]
        rows = min(TRAIN_CHUNK, len(train))
        devices = sample_devices(self.mesh)
        size = -(-group * self.grid[0] * self.grid[1] // devices) * devices
        spread = functools.partial(jax.device_put, device=batch_sharding(self.mesh))
        best = [(spread(np.full((size, most), -np.inf, np.float32)), spread(np.zeros((size, most), np.int32))) for _ in groups]
        for first in range(0, len(train), rows):
            part = train[first : first + rows]
            chunk = jax.device_put(np.pad(scaler(part), ((0, rows - len(part)), (0, 0))), replicated(self.mesh))
            for number, index in enumerate(groups):
                features = scaler(self.tokens(test, index))
                features = spread(np.pad(features, ((0, size - len(features)), (0, 0))))
                best[number] = _nearer(best[number], features, chunk, np.int32(first), np.int32(len(part)), most, cosine)
        gather = jax.jit(lambda x: x, out_shardings=replicated(self.mesh))
        for (_, places), index in zip(best, groups, strict=True):
            yield local(gather(places))[: len(index) * self.grid[0] * self.grid[1]], index


@functools.partial(jax.jit, static_argnames="num_classes")
def _mode(near: Int[Array, "m k p"], num_classes: int) -> Int[Array, "m p"]:
    """The most frequent class of each pixel, -1 where that is none; of equal ones the least, a class before none."""

    def of_patch(ids: Int[Array, "k p"]) -> Int[Array, " p"]:
        rows = jnp.where(ids < 0, num_classes, ids)
        counts = jnp.zeros((num_classes + 1, ids.shape[1]), jnp.int32).at[rows, jnp.arange(ids.shape[1])].add(1)
        best = counts.argmax(axis=0)
        return jnp.where(best == num_classes, -1, best)

    return jax.lax.map(of_patch, near, batch_size=256)


class PatchLogistic(Segmented):
    """Logistic regression of each patch's most frequent class; all its pixels get what is predicted.

    Figures on the test data of the regression fitted anew to all training patches with the strength of the best "macro_jaccard" on
    held-out pictures: those of "segmentation"; "held_out_macro_jaccard" and "c", the strength.

    Options: `strengths`, `iterations`, `tolerance`: as of the evaluator "logistic".
    """

    what = "patch logistic regression"
    names = (*Segmented.figures, "held_out_macro_jaccard", "c")

    @staticmethod
    def read_options(*, strengths: Sequence[float] = STRENGTHS, iterations: int = 1000, tolerance: float = 1e-6) -> dict[str, Any]:
        """What `options` may hold."""
        check_strengths(strengths, iterations)
        return dict(strengths=tuple(sorted(map(float, strengths))), iterations=iterations, tolerance=tolerance)

    def fit(self, train: Examples, test: Examples, fitted: Index, chosen_by: Index, between: Callable[[], None]) -> Any:
        """The figures."""
        best, weights = (-1.0, 0.0), None
        scaler, regression = self._regression(train, fitted)
        for strength in self.options["strengths"]:
            between()
            weights = regression(strength, weights)
            best = max(best, (self._tested(weights, scaler, train, chosen_by)["macro_jaccard"], -strength))
        del regression
        scaler, regression = self._regression(train, np.arange(len(train.labels)))
        yield from self._tested(regression(-best[1]), scaler, test, np.arange(len(test.labels))).items()
        yield "held_out_macro_jaccard", best[0]
        yield "c", -best[1]

    def _regression(self, train: Examples, index: Index) -> tuple[Scaler, Regression]:
        x, _, label = self.patches(train, index)
        scaler = Scaler(x)
        settings = self.mesh, self.options["iterations"], self.options["tolerance"]
        return scaler, Regression(scaler(x), label, self.spec.num_classes, *settings)

    def _tested(self, weights: Any, scaler: Scaler, test: Examples, tested: Index) -> dict[str, float]:
        weights, total = local(weights), segmentation.SegmentationSums(*[np.int64(0)] * 5)
        group = max(1, TEST_CHUNK // (self.grid[0] * self.grid[1]))
        for first in range(0, len(tested), group):
            index = tested[first : first + group]
            label = _best(weights, jnp.asarray(scaler(self.tokens(test, index))))
            blocks = jnp.asarray(self.blocks(test, index))
            total = added(total, self.sums(jnp.broadcast_to(label[:, None], blocks.shape), blocks))
        return segmentation.summarize(total)


_best = jax.jit(lambda weights, x: scores(weights, x).argmax(axis=-1).astype(jnp.int32))


class PatchRidge(Patches):
    """Ridge regression of each patch's mean depth, resized bilinearly to pixels: closed form, one decomposition for all strengths.

    Figures on the test data, each picture's averaged, in meters where `metres_per_count` is known: those of "depth", with the strength of
    the least "rmse" on held-out pictures, then fitted to all training patches; "held_out_rmse" and "ridge", the strength.

    Options: `strengths`: factors on |w|^2 beside the sum of squared errors of standardized features; `depth_range`: as of "depth".
    """

    what, kind = "patch ridge regression", "continuous"
    figures = ("delta_1", "delta_2", "delta_3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
    names = (*figures, "held_out_rmse", "ridge")

    @staticmethod
    def read_options(
        *, strengths: Sequence[float] = tuple(10.0**x for x in range(-2, 6)), depth_range: tuple[float, float] | None = None
    ) -> dict[str, Any]:
        """What `options` may hold."""
        check_strengths(strengths, 1)
        return dict(strengths=tuple(sorted(map(float, strengths))), depth_range=depth_range and tuple(depth_range))

    def fit(self, train: Examples, test: Examples, fitted: Index, chosen_by: Index, between: Callable[[], None]) -> Any:
        """The figures."""
        if self.spec.channels != 1:
            raise ValueError(f"{self.what} is for one channel, but {self.spec.name!r} has {self.spec.channels}")
        model = self._decomposed(train, fitted)
        found = {strength: self._tested(model, strength, train, chosen_by)["rmse"] for strength in self.options["strengths"]}
        between()
        best = min(found, key=lambda strength: found[strength])
        yield from self._tested(self._decomposed(train, np.arange(len(train.labels))), best, test, np.arange(len(test.labels))).items()
        yield "held_out_rmse", found[best]
        yield "ridge", best

    def _decomposed(self, train: Examples, index: Index) -> tuple[Scaler, Any, Any, Any, float]:
        """(Scaler, eigenvalues, eigenvectors, products with the target, its mean), in float64, of patches with measured pixels."""
        blocks = self.blocks(train, index).astype(np.float64)
        measured = np.isfinite(blocks).any(axis=1)
        if not measured.any():
            raise ValueError(f"{self.what}: no training patch has a measurement: {self.extractions['train'].reading.source.describe()}")
        y = np.nanmean(blocks[measured], axis=1)
        x = self.tokens(train, index)[measured]
        scaler = Scaler(x)
        gram, products = np.zeros((x.shape[1],) * 2), np.zeros(x.shape[1])
        for first in range(0, len(x), TRAIN_CHUNK):
            part = scaler(x[first : first + TRAIN_CHUNK]).astype(np.float64)
            gram += part.T @ part
            products += part.T @ (y[first : first + TRAIN_CHUNK] - y.mean())
        values, vectors = np.linalg.eigh(gram)
        return scaler, np.maximum(values, 0.0), vectors, vectors.T @ products, float(y.mean())

    def _tested(self, model: Any, strength: float, test: Examples, tested: Index) -> dict[str, float]:
        scaler, values, vectors, products, mean = model
        weights = (vectors @ (products / (values + strength))).astype(np.float32)
        unit, parts = self.spec.metres_per_count or 1.0, []
        group = max(1, TEST_CHUNK // (self.grid[0] * self.grid[1]))
        for first in range(0, len(tested), group):
            index = tested[first : first + group]
            target = np.asarray(test.labels[index])[..., 0].astype(np.float32)
            coarse = (scaler(self.tokens(test, index)) @ weights + mean).reshape(-1, *self.grid, 1)
            parts.append(_depth_sums(jnp.asarray(coarse * unit), jnp.asarray(target * unit), self.options["depth_range"]))
        return depth.summarize([local(part) for part in parts])


@functools.partial(jax.jit, static_argnames="depth_range")
def _depth_sums(coarse: Float[Array, "b gh gw 1"], target: Shaped[Array, "b h w"], depth_range: Any) -> Any:
    return depth.sums(resize(coarse, target.shape[1:])[..., 0], target, depth_range=depth_range)
