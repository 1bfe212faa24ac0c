"""Figures of one class per picture: on one set, on corrupted pictures, on exchanged backgrounds; of whole pictures or parts of them."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from maskvit.core.configuration import check_arguments
from maskvit.core.keys import stream_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.data.sources import Source, has_labels
from maskvit.evaluators.answers import Answers, Figures
from maskvit.evaluators.reading import merged
from maskvit.guidance.attention import self_attention
from maskvit.heads.values import prepare
from maskvit.metrics import classification
from maskvit.metrics.test_sets import ALEXNET_ERRORS, BACKGROUNDS, NINE_OF_THOUSAND, SEVERITIES
from maskvit.sharding import batch_sharding, place_batch

WHERE = "config.evaluators options"


def hidden_block(*, share: float, by: str = "random", seed: int = 0) -> dict[str, Any]:
    """`options.hidden`: the share of the patches that are black, chosen at random by `seed`, or those attended to most ("attention")."""
    if not 0 < share < 1:
        raise ValueError(f"{WHERE}.hidden.share is {share}; it must be between 0 and 1")
    if by not in ("random", "attention"):
        raise ValueError(f"{WHERE}.hidden.by is {by!r}; known: random, attention")
    return dict(share=float(share), by=by, seed=seed)


def label_sets(source: Source) -> Bool[np.ndarray, "n k"] | None:
    """Which classes are right for each record, where the data have such sets (ImageNet ReaL)."""
    return source.label_sets() if hasattr(source, "label_sets") else None


class Classification(Answers):
    """Top-1 and top-5 of one class per picture, mean over classes, cross-entropy; a picture of the confusion matrix.

    Figures: "top1", "top5", "mean_class" in percent, "loss" in nats; of data with sets of labels also "real", percent of the pictures
    that are given one of theirs.

    Options:
      classes: names of classes, or a file of them, one per line: the model may answer with no other, as on ImageNet-A and -R.
      hidden: dict(share, by, seed): a share of the patches is black (stored value 0), as in AttMask's accuracy drop: random ones, or those
        that the global token (where there is none, all tokens) attends to most in the model's own last block.
    """

    task = "classification"
    given: tuple[str, ...] = ("top1", "top5", "mean_class", "loss")

    @staticmethod
    def read_options(*, classes: Sequence[str] | str | None = None, hidden: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What `options` may hold."""
        if isinstance(classes, str):
            path = os.path.expanduser(classes)
            if not os.path.isfile(path):
                raise FileNotFoundError(f"{WHERE}.classes: there is no file {path}; give names of classes, or a file with one per line")
            with open(path, encoding="utf-8") as file:
                classes = [line.strip() for line in file if line.strip()]
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise ValueError(f"{WHERE}.classes must be names of classes, each once")
        if hidden is not None:
            check_arguments(f"{WHERE}.hidden", hidden_block, hidden)
            hidden = hidden_block(**hidden)
        return dict(classes=None if classes is None else tuple(classes), hidden=hidden)

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """Match the classes with the data's names, and look whether patches can be hidden."""
        self._classes: np.ndarray | None = None
        if self.options.get("classes"):
            names = self.reading.source.label_names
            if len(names) != self.num_classes:
                raise ValueError(
                    f"{WHERE}.classes are looked up in the names of the data's classes, {len(names)} for a model of {self.num_classes}"
                )
            if unknown := [name for name in self.options["classes"] if name not in names]:
                raise ValueError(f"{WHERE}.classes names {unknown[0]!r}, which is no class of the data: {self.reading.source.describe()}")
            self._classes = np.array(sorted(names.index(name) for name in self.options["classes"]))
        if self.options.get("hidden"):
            if len(self.inputs) > 1 or read[self.inputs[0]].kind != "continuous":
                raise ValueError(f"{WHERE}.hidden blackens patches of pictures, but the model is shown {', '.join(self.inputs)}: set shown")
        self._sets = label_sets(self.reading.source)
        if self._sets is not None and self._sets.shape[1] != self.num_classes:
            raise ValueError(f"the data's sets of labels are of {self._sets.shape[1]} classes, but the model has {self.num_classes}")
        if self._sets is not None:
            self.given = (*self.given, "real")

    @property
    def label_names(self) -> tuple[str, ...]:
        """What the data call the model's classes; () where they have other classes, or no names."""
        return self.reading.source.label_names

    def labeled(self, source: Source) -> bool:
        """Whether pictures have a class or a set of them."""
        return has_labels(source) or label_sets(source) is not None

    def _hidden(self, params: Any, state: Any, batch: Batch) -> Batch:
        """The batch with patches blackened."""
        name, model, settings = self.inputs[0], self.objective.model, self.options["hidden"]
        prepared = prepare(model, batch.only(self.inputs))
        tokens = model.embed(self.objective.encoder_params(params, state), prepared.values_of(self.inputs), prepared.present)
        if settings["by"] == "attention":
            scores = self_attention(model, params, tokens, "global" if model.num_global_tokens else "mean")
        else:
            key = stream_keys(jax.random.key(settings["seed"]), "hidden")
            of_record = lambda index: jax.random.uniform(jax.random.fold_in(key, index), (tokens.layout.num_tokens,))  # noqa: E731
            scores = jax.vmap(of_record)(batch.record.index)
        hidden = highest(scores, round(settings["share"] * tokens.layout.num_tokens))
        pixels = model.modality(name).patch_pixels
        mask = hidden.reshape(-1, *tokens.layout.grids[0]).repeat(pixels, axis=1).repeat(pixels, axis=2)[..., None]
        values = batch.values[name]
        return batch._replace(values={**batch.values, name: jnp.where(mask, jnp.zeros((), values.dtype), values)})

    def _logits(self, params: Any, state: Any, batch: Batch) -> Float[Array, "b k"]:
        """Class scores of all classes, those that are none of `classes` at minus infinity."""
        shown = self._hidden(params, state, batch) if self.options.get("hidden") else batch
        logits = self._answers(params, state, shown)
        if self._classes is None:
            return logits
        return jnp.where(jnp.zeros(self.num_classes, bool).at[self._classes].set(True), logits, -jnp.inf)

    def evaluate(self, params: Any, state: Any, between: Callable[[], None]) -> Figures:
        """The figures of these parameters."""

        def items() -> Iterator[tuple[Batch, Any]]:
            for host in self.reading.host_batches(self.task, between):
                sets = None
                if self._sets is not None:
                    rows = self._sets[np.maximum(host["index"], 0)]
                    sets = jax.make_array_from_process_local_data(batch_sharding(self.reading.mesh), rows)
                yield place_batch(host, self.reading.mesh), sets

        yield from self.figures(functools.partial(self.sums, params, state), items())

    def _sums(self, params: Any, state: Any, item: Any) -> Any:
        batch, sets = item
        logits, label = self._logits(params, state, batch), batch.label
        confusion = classification.confusion_matrix(logits.argmax(axis=-1), label, self.num_classes, batch.valid)
        of_sets = None if sets is None else classification.set_counts(logits, sets, batch.valid)
        if self._classes is not None:  # a class outside of `classes` is said to be wrong data, not a wrong answer
            positions = jnp.full(self.num_classes, len(self._classes)).at[self._classes].set(jnp.arange(len(self._classes)))
            label = jnp.where(label >= 0, positions[jnp.maximum(label, 0)], -1)
            logits = classification.of_classes(logits, self._classes.tolist())
        return classification.counts(logits, label, batch.valid), confusion, of_sets

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figures, and "confusion", a picture where there are few enough classes."""
        from maskvit.plots.confusion import MOST_CLASSES, confusion_picture

        counts, confusion, sets = merged(sums, batches)
        yield from classification.summarize(counts).items()
        if sets is not None:
            yield from classification.summarize(sets).items()
        if self.num_classes <= MOST_CLASSES:
            names = self.reading.source.label_names or tuple(map(str, range(self.num_classes)))
            yield "confusion", confusion_picture(confusion, names)


def highest(scores: Float[Array, "b n"], count: int) -> Bool[Array, "b n"]:
    """True for the `count` highest of each row; of equal ones the earlier."""
    order = jnp.argsort(-scores, axis=1, stable=True)
    return jnp.zeros(scores.shape, bool).at[jnp.arange(len(scores))[:, None], order[:, :count]].set(True)


class SeveralSets(Classification):
    """Top-1 on several splits of one data set; `figures_of(accuracy by split)` says what follows of them."""

    def evaluate(self, params: Any, state: Any, between: Callable[[], None]) -> Figures:
        """The figures of these parameters."""
        found = {}
        for split, reading in self.readings.items():
            right = merged(functools.partial(self.sums, params, state), reading.batches(f"{self.task} {split}", between))
            found[split] = 100.0 * int(right[0]) / int(right[1]) if int(right[1]) else float("nan")
        yield from self.figures_of(found)

    def _right(self, logits: Float[Array, "b k"], label: Any) -> Bool[Array, " b"]:
        return logits.argmax(axis=-1) == label

    def _sums(self, params: Any, state: Any, item: Any) -> Any:
        batch: Batch = item
        counted = batch.valid & (batch.label >= 0)
        right = self._right(self._logits(params, state, batch), batch.label) & counted
        return right.sum(dtype=jnp.int32), counted.sum(dtype=jnp.int32)

    def figures_of(self, accuracy: Mapping[str, float]) -> Figures:
        """The figures out of the percentages right."""
        raise NotImplementedError


class Corruptions(SeveralSets):
    """ImageNet-C: the errors on corrupted pictures, split "<corruption>_<severity>" each.

    Figures, in percent: "error/<corruption>", the mean top-1 error over severities, and "mean_error" over corruptions; with all five
    severities "ce/<corruption>", that error over AlexNet's, and with all 15 corruptions their mean "mce".

    Options: `corruptions`, `severities`: those to measure, by default all.
    """

    @staticmethod
    def read_options(  # type: ignore[override]
        *, corruptions: Sequence[str] = tuple(ALEXNET_ERRORS), severities: Sequence[int] = SEVERITIES
    ) -> dict[str, Any]:
        """What `options` may hold."""
        if unknown := [name for name in corruptions if name not in ALEXNET_ERRORS]:
            raise ValueError(f"{WHERE}.corruptions names {unknown[0]!r}; known: {', '.join(ALEXNET_ERRORS)}")
        if not corruptions or not severities or set(severities) - set(SEVERITIES):
            raise ValueError(f"{WHERE}: {len(corruptions)} corruptions of severities {tuple(severities)}; give some, severities of 1 to 5")
        return dict(corruptions=tuple(corruptions), severities=tuple(severities))

    @property
    def _complete(self) -> bool:
        return set(self.options["severities"]) == set(SEVERITIES)

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """Which figures there are."""
        super().prepare(read, image_size, crop)
        names = [f"error/{name}" for name in self.options["corruptions"]]
        names += [f"ce/{name}" for name in self.options["corruptions"]] if self._complete else []
        names += ["mce"] if self._complete and set(self.options["corruptions"]) == set(ALEXNET_ERRORS) else []
        self.given = (*names, "mean_error")

    def splits(self) -> tuple[str, ...]:
        """One per corruption and severity."""
        return tuple(f"{name}_{severity}" for name in self.options["corruptions"] for severity in self.options["severities"])

    def figures_of(self, accuracy: Mapping[str, float]) -> Figures:
        """The figures out of the percentages right."""
        severities = self.options["severities"]
        errors = {name: float(np.mean([100.0 - accuracy[f"{name}_{s}"] for s in severities])) for name in self.options["corruptions"]}
        for name, error in errors.items():
            yield f"error/{name}", error
        yield "mean_error", float(np.mean(list(errors.values())))
        if self._complete:
            relative = {name: error / ALEXNET_ERRORS[name] for name, error in errors.items()}
            for name, error in relative.items():
                yield f"ce/{name}", error
            if set(relative) == set(ALEXNET_ERRORS):
                yield "mce", float(np.mean(list(relative.values())))


class Backgrounds(SeveralSets):
    """ImageNet-9, a split per variant of the backgrounds: percent right of nine classes.

    Answers of 1,000 classes are mapped to the nine; one that belongs to none of them is wrong. Figures: each variant's name, and
    "background_gap", mixed_same less mixed_rand.

    Options: `variants`: those to measure, by default all eight.
    """

    @staticmethod
    def read_options(*, variants: Sequence[str] = BACKGROUNDS) -> dict[str, Any]:  # type: ignore[override]
        """What `options` may hold."""
        if not variants or set(variants) - set(BACKGROUNDS):
            raise ValueError(f"{WHERE}.variants is {tuple(variants)}; known: {', '.join(BACKGROUNDS)}")
        return dict(variants=tuple(variants))

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """Which class is which."""
        super().prepare(read, image_size, crop)
        if self.num_classes not in (9, 1000):
            raise ValueError(f"ImageNet-9 is for models of its 9 or of ImageNet's 1000 classes, not of {self.num_classes}")
        self._of_nine = np.full(self.num_classes, -2)
        for number, members in enumerate(NINE_OF_THOUSAND if self.num_classes == 1000 else ((i,) for i in range(9))):
            self._of_nine[list(members)] = number
        gap = ("background_gap",) if {"mixed_same", "mixed_rand"} <= set(self.options["variants"]) else ()
        self.given = (*self.options["variants"], *gap)

    @property
    def label_names(self) -> tuple[str, ...]:
        """None: the nine are classes of their own."""
        return ()

    def splits(self) -> tuple[str, ...]:
        """One per variant."""
        return self.options["variants"]

    def _right(self, logits: Float[Array, "b k"], label: Any) -> Bool[Array, " b"]:
        return jnp.asarray(self._of_nine)[logits.argmax(axis=-1)] == label

    def figures_of(self, accuracy: Mapping[str, float]) -> Figures:
        """The figures out of the percentages right."""
        yield from accuracy.items()
        if "background_gap" in self.given:
            yield "background_gap", accuracy["mixed_same"] - accuracy["mixed_rand"]
