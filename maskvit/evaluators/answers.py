"""Figures of what a supervised model says: classes of pictures, classes of pixels, depths, normals and other maps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.data.sources import has_labels
from maskvit.evaluators.reading import Reading, local, merged, nothing
from maskvit.losses.dense import l1
from maskvit.metrics import classification, depth, normals, segmentation
from maskvit.sharding import replicated

Figures = Iterator[tuple[str, Any]]


class Answers:
    """What the evaluators here share: held-out data, the model's answers to them, and the averaged weights beside the raw ones.

    Args:
      data_from: a source with labels or targets, as `config.data.train`; by default that data set's split "val".
      limit: only so many examples, evenly spread over the data; None for all.
      batch_size: images at once over all devices; no figure depends on it but those that are named per batch.
      crop: how pictures are brought to the model's size, as in `maskvit.data.batches.eval_batches`.
      shown: inputs that the model is shown; by default all of its own.
      options: what the evaluator alone knows; the signature of its `read_options`.

    Raises ValueError where the objective gives no such answers, or the data lack what they are compared with.
    """

    task = ""  # the row of `maskvit.objectives.tasks.TASKS` that gives such answers
    channels = 0  # of the target, where only one number is right
    given: tuple[str, ...] = ()  # names of the figures

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        data_from: Mapping[str, Any] | None = None,
        limit: int | None = None,
        batch_size: int = 256,
        crop: float | int | str | None = 0.875,
        shown: Sequence[str] | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        given = type(getattr(objective, "task", None)).__name__.lower()
        if given != self.task:
            raise ValueError(
                f"the evaluator {type(self).__name__.lower()!r} takes figures of the task {self.task!r}, but config.objective "
                + (f"learns {given!r}" if given != "nonetype" else "is not supervised: use 'knn', or fine-tune the model first")
            )
        self.inputs = tuple(objective.model.inputs if shown is None else shown)
        if not self.inputs or set(self.inputs) - set(objective.model.inputs):
            raise ValueError(f"shown names {self.inputs}; the model's inputs are {objective.model.inputs}")
        self.objective, self.target = objective, objective.task.target
        names = (*self.inputs, self.target) if self.target else self.inputs
        self.spec = modalities[self.target] if self.target else None
        self.num_classes = self.spec.num_classes if self.spec else objective.task.num_classes
        block = data_from or {**dict(data["train"]), "split": "val"}
        read = {name: modalities[name] for name in names}
        self.reading = Reading(block, read, image_size, mesh, data, inputs=self.inputs, batch_size=batch_size, limit=limit, crop=crop)
        if not self.target and not has_labels(self.reading.source):
            raise ValueError(f"an accuracy needs labels, but the data have none: {self.reading.source.describe()}")
        check_arguments("config.evaluators options", self.read_options, options or {})
        self.options = self.read_options(**(options or {}))
        if self.channels and self._spec().channels != self.channels:
            raise ValueError(
                f"the evaluator {type(self).__name__.lower()!r} is for {self.channels} channel(s), but {self.target!r} has "
                f"{self._spec().channels}: use 'maps'"
            )
        self.sums = jax.jit(self._sums, out_shardings=replicated(mesh))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all figures that `run` yields."""
        averaged = [f"ema/{name}" for name in self.given] if self.objective.ema_decay is not None else []
        return (*self.given, *averaged)

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        return dict(self.reading.protocol(), figures=type(self).__name__.lower(), **self.options)

    @staticmethod
    def read_options() -> dict[str, Any]:
        """What `options` may hold: nothing here."""
        return {}

    def _spec(self) -> Modality:
        """The modality that is predicted."""
        assert self.spec is not None
        return self.spec

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Figures:
        """Yield the figures of the parameters, then, called "ema/...", those of their average where one is kept."""
        weights = {"": params}
        if isinstance(objective_state, Mapping) and "ema" in objective_state:
            weights["ema/"] = objective_state["ema"]
        state = {name: value for name, value in (objective_state or {}).items() if name != "ema"}
        for prefix, tree in weights.items():
            batches = self.reading.batches(self.task, between)
            for name, value in self.figures(functools.partial(self.sums, tree, state), batches):
                yield prefix + name, value

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figures out of the sums of all batches."""
        raise NotImplementedError

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        """The sums of a batch, padding left out."""
        raise NotImplementedError

    def _answers(self, params: Any, state: Any, batch: Batch) -> Any:
        """The model's one answer, in stored units where it is numbers."""
        return next(iter(self.objective.answers(params, state, batch, self.inputs).values()))


class Classification(Answers):
    """Top-1 and top-5 of one class per picture, mean over classes, cross-entropy; a picture of the confusion matrix.

    Figures: "top1", "top5", "mean_class" in percent, "loss" in nats.
    """

    task = "classification"
    given = ("top1", "top5", "mean_class", "loss")

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        logits = self._answers(params, state, batch)
        confusion = classification.confusion_matrix(logits.argmax(axis=-1), batch.label, self.num_classes, batch.valid)
        return classification.counts(logits, batch.label, batch.valid), confusion

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figures, and "confusion", a picture where there are few enough classes."""
        from maskvit.plots.confusion import MOST_CLASSES, confusion_picture

        counts, confusion = merged(sums, batches)
        yield from classification.summarize(counts).items()
        if self.num_classes <= MOST_CLASSES:
            names = self.reading.source.label_names or tuple(map(str, range(self.num_classes)))
            yield "confusion", confusion_picture(confusion, names)


class Segmentation(Answers):
    """Mean IoU, mean class accuracy and pixel accuracy of a class per pixel, at the model's size.

    Figures: "mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard" in percent (`maskvit.metrics.segmentation.summarize`).
    """

    task = "segmentation"
    given = ("mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard")

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        prediction = self._answers(params, state, batch).argmax(axis=-1)
        return segmentation.counts(prediction, batch.values[self.target], self.num_classes, batch.valid)

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figures."""
        yield from segmentation.summarize(merged(sums, batches)).items()


class Depth(Answers):
    """delta1 to 3, relative and absolute errors of a depth, in meters where `metres_per_count` is known.

    Options: `aggregation`, "per_image" (mean over pictures), "per_batch" (MultiMAE's: mean over batches, which depends on their size) or
    "pixels" (over all pixels at once); `eigen_crop`, `depth_range` (in the figures' unit), `align`: as `maskvit.metrics.depth.sums`.
    """

    task, channels = "regression", 1
    given = ("delta_1", "delta_2", "delta_3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")

    @staticmethod
    def read_options(
        *,
        aggregation: str = "per_image",
        eigen_crop: bool = False,
        depth_range: tuple[float, float] | None = None,
        align: str | None = None,
    ) -> dict[str, Any]:
        """What `options` may hold."""
        look_up("config.evaluators options.aggregation", depth.AGGREGATIONS, aggregation)
        if align is not None:
            look_up("config.evaluators options.align", depth.ALIGNMENTS, align)
        return dict(aggregation=aggregation, eigen_crop=eigen_crop, depth_range=depth_range and tuple(depth_range), align=align)

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        unit = self._spec().metres_per_count or 1.0
        prediction, target = self._answers(params, state, batch)[..., 0], batch.values[self.target][..., 0].astype(jnp.float32)
        options = {key: self.options[key] for key in ("eigen_crop", "depth_range", "align")}
        return depth.sums(prediction * unit, target * unit, None, batch.valid, **options)

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figures."""
        yield from depth.summarize([local(sums(batch)) for batch in batches], self.options["aggregation"]).items()


class Normals(Answers):
    """Angles between predicted and true surface normals: mean and median in degrees, share below 11.25, 22.5 and 30."""

    task, channels = "regression", 3

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        spec = self._spec()
        directions = lambda x: (x.astype(jnp.float32) * spec.scale - jnp.array(spec.mean)) / jnp.array(spec.std)  # noqa: E731
        answer, target = self._answers(params, state, batch), batch.values[self.target]
        return normals.sums(directions(answer), directions(target), None, batch.valid)

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figures."""
        yield from normals.summarize(merged(sums, batches)).items()


class Maps(Answers):
    """Mean absolute error over the measured pixels and channels, in model values: Taskonomy's one figure, "l1"."""

    task = "regression"
    given = ("l1",)

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        spec = self._spec()
        values = lambda x: (x.astype(jnp.float32) * spec.scale - jnp.array(spec.mean)) / jnp.array(spec.std)  # noqa: E731
        target = values(batch.values[self.target])
        known = jnp.isfinite(target).all(axis=-1) & batch.valid[:, None, None]
        sums, counts = l1(values(self._answers(params, state, batch)), target, known)
        return sums.sum(), counts.sum()

    def figures(self, sums: Callable[[Batch], Any], batches: Iterator[Batch]) -> Figures:
        """The figure."""
        total, count = merged(sums, batches)
        yield "l1", float(total / count) if count else float(np.nan)
