"""Figures of what a supervised model says of every pixel: classes, depths, normals and other maps; at the model's or the stored size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from maskvit.core.configuration import check_arguments, look_up
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.evaluators.answers import Answers, Figures
from maskvit.evaluators.reading import local, merged, nothing
from maskvit.evaluators.windows import Round, StoredSize, read_out
from maskvit.losses.dense import l1
from maskvit.metrics import depth, normals, segmentation
from maskvit.sharding import batch_sharding, place_batch, replicated

MOST_EXAMPLES = 8
WHERE = "config.evaluators options"


def sliding_block(*, window: int, stride: int) -> tuple[int, int]:
    """`options.sliding`: windows of `window` pixels on pictures whose short side is as long, every `stride` pixels."""
    if not 1 <= stride <= window:
        raise ValueError(f"{WHERE}.sliding.stride is {stride}; it must be at least 1 and at most the window, {window}")
    return window, stride


def dense_options(
    resolution: str = "model", sliding: Mapping[str, Any] | None = None, flip: bool = False, examples: int = 4
) -> dict[str, Any]:
    """The options of `Dense`, checked."""
    if resolution not in ("model", "original"):
        raise ValueError(f"{WHERE}.resolution is {resolution!r}; known: model, original")
    if resolution == "model" and (sliding is not None or flip):
        key = "sliding" if sliding is not None else "flip"
        raise ValueError(f"{WHERE}.{key} is for answers at the stored size: set resolution to 'original', or leave it out")
    if sliding is not None:
        check_arguments(f"{WHERE}.sliding", sliding_block, sliding)
        sliding = dict(zip(("window", "stride"), sliding_block(**sliding), strict=True))
    if not 0 <= examples <= MOST_EXAMPLES:
        raise ValueError(f"{WHERE}.examples is {examples}; it must be at least 0 and at most {MOST_EXAMPLES}")
    return dict(resolution=resolution, sliding=sliding, flip=flip, examples=examples)


class Dense(Answers):
    """What the evaluators of pixels share: answers at the stored size, and a picture "examples" of inputs, truth and answers.

    An evaluator has those of the options that it can use, `examples` always.

    Options:
      examples: how many examples the picture shows, at the model's size; 0 for none.
      resolution: "model", or "original": answers are resized bilinearly to each picture's stored size, the padded part cut off first;
        crop must be "pad" or None.
      sliding: dict(window, stride): with "original", each picture is resized so that its short side is `window`, and answers of
        overlapping windows are averaged before they are resized (logits, as MMSegmentation has it). MMSegmentation also limits the long
        side to four times the short one.
      flip: with "original", the mean of the answers to the picture and its mirror image; of classes the mean of their probabilities.
    """

    multiple = 128  # sides at the stored size are rounded up to it

    @staticmethod
    def read_options(*, examples: int = 4) -> dict[str, Any]:
        """What `options` may hold."""
        return dense_options(examples=examples)

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """Compile what reads pictures and answers at the stored size."""
        mesh, sliding = self.reading.mesh, self.options["sliding"]
        self._pictures = jax.jit(self._examples, out_shardings=replicated(mesh))
        self._stored_size: StoredSize | None = None
        if self.options["resolution"] == "model":
            return
        if lacking := [name for name in self.inputs if sliding and name in self.reading.source.may_lack]:
            raise ValueError(f"{WHERE}.sliding needs all inputs of every picture, but some may lack {lacking[0]!r}: leave it out of shown")
        of_windows = None if sliding is None else (sliding["window"], sliding["stride"])
        self._stored_size = StoredSize(
            read, self.inputs, self.target, image_size, mesh, crop, of_windows, self.options["flip"], self.multiple
        )  # fmt: skip
        self._of_windows = jax.jit(self._answers, out_shardings=batch_sharding(mesh))
        self._of_round = jax.jit(self._round_sums, out_shardings=replicated(mesh))

    def evaluate(self, params: Any, state: Any, between: Callable[[], None] = nothing) -> Figures:
        """The figures of these parameters, and the examples."""
        examples: list[Any] = []

        def items() -> Iterator[Batch | Round]:
            for host in self.reading.host_batches(self.task, between):
                batch = place_batch(host, self.reading.mesh)
                if sum(len(part[-1]) for part in examples) < self.options["examples"]:
                    inputs, target, answer, valid = local(self._pictures(params, state, batch))
                    examples.append(({name: x[valid] for name, x in inputs.items()}, target[valid], answer[valid]))
                if self._stored_size is None:
                    yield batch
                else:
                    yield from self._stored_size.rounds(host)

        def sums(item: Batch | Round) -> Any:
            if isinstance(item, Round):
                return self._of_round(self._of_windows(params, state, item.windows), item)
            return self.sums(params, state, item)

        yield from self.figures(sums, items())
        if examples and any(len(part[-1]) for part in examples):
            from maskvit.plots.answers import answers_picture

            join = lambda *parts: np.concatenate(parts)[: self.options["examples"]]  # noqa: E731
            inputs, target, answer = jax.tree.map(join, *examples)
            specs = {spec.name: spec for spec in self.objective.model.modalities}
            yield "examples", answers_picture(inputs, target, answer, specs, self.target)

    def _examples(self, params: Any, state: Any, batch: Batch) -> Any:
        """(Inputs, target, answer as ids or stored values, valid) of the first rows of a batch."""
        few = jax.tree.map(lambda x: x[: self.options["examples"]], batch)
        answer = self._answers(params, state, few)
        answer = answer.argmax(axis=-1).astype(jnp.int32) if self._spec().kind == "categorical" else answer
        return {name: few.values[name] for name in self.inputs}, few.values[self.target], answer, few.valid

    def _round_sums(self, values: Any, round_: Round) -> Any:
        """The sums of a round."""
        raise NotImplementedError


class Segmentation(Dense):
    """Mean IoU, mean class accuracy and pixel accuracy of a class per pixel.

    Figures: "mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard" in percent (`maskvit.metrics.segmentation.summarize`), and
    "classes", a picture of the IoU of every class. Options as `Dense`.
    """

    task = "segmentation"
    given = ("mean_iou", "mean_accuracy", "pixel_accuracy", "macro_jaccard")

    @staticmethod
    def read_options(
        *, resolution: str = "model", sliding: Mapping[str, Any] | None = None, flip: bool = False, examples: int = 4
    ) -> dict[str, Any]:
        """What `options` may hold."""
        return dense_options(resolution, sliding, flip, examples)

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        prediction = self._answers(params, state, batch).argmax(axis=-1)
        return segmentation.counts(prediction, batch.values[self.target], self.num_classes, batch.valid)

    def _round_sums(self, values: Any, round_: Round) -> Any:
        def best(logits: Float[Array, "b v u p k"]) -> Shaped[Array, "b u p"]:
            # Of one view the softmax changes no maximum.
            mean = logits[:, 0] if logits.shape[1] == 1 else jax.nn.softmax(logits, axis=-1).mean(axis=1)
            return mean.argmax(axis=-1)

        return segmentation.counts(read_out(values, round_, best), round_.target, self.num_classes, round_.valid)

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figures, and "classes", a picture where there are few enough of them."""
        from maskvit.plots.class_iou import MOST_CLASSES, class_iou_picture

        counts = merged(sums, batches)
        yield from segmentation.summarize(counts).items()
        if self.num_classes <= MOST_CLASSES:
            names = self.reading.source.pixel_classes.get(self.target) or tuple(map(str, range(self.num_classes)))
            yield "classes", class_iou_picture(segmentation.class_iou(counts), np.asarray(counts.labeled), names)

    @property
    def pixel_classes(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes by modality, as the data have them."""
        names = self.reading.source.pixel_classes.get(self.target)
        return {self.target: names} if names else {}


class Depth(Dense):
    """delta1 to 3, relative and absolute errors of a depth, in meters where `metres_per_count` is known.

    Options, beside those of `Dense`: `aggregation`, "per_image" (mean over pictures), "per_batch" (MultiMAE's: mean over batches, which
    depends on their size) or "pixels" (over all pixels at once); `eigen_crop`, `depth_range` (in the figures' unit), `align`: as
    `maskvit.metrics.depth.sums`.
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
        resolution: str = "model",
        sliding: Mapping[str, Any] | None = None,
        flip: bool = False,
        examples: int = 4,
    ) -> dict[str, Any]:
        """What `options` may hold."""
        look_up(f"{WHERE}.aggregation", depth.AGGREGATIONS, aggregation)
        if align is not None:
            look_up(f"{WHERE}.align", depth.ALIGNMENTS, align)
        if aggregation == "per_batch" and resolution != "model":
            raise ValueError(f"{WHERE}.aggregation 'per_batch' is over batches at the model's size: set resolution to 'model'")
        measure = dict(aggregation=aggregation, eigen_crop=eigen_crop, depth_range=depth_range and tuple(depth_range), align=align)
        return measure | dense_options(resolution, sliding, flip, examples)

    def prepare(self, read: Mapping[str, Modality], image_size: tuple[int, int], crop: Any) -> None:
        """As `Dense`; the crop of NYUv2's pictures is counted from their own edges."""
        if self.options["eigen_crop"]:
            self.multiple = 1
        super().prepare(read, image_size, crop)

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        batches = dict(batch_size=self.reading.batch_size) if self.options["aggregation"] == "per_batch" else {}
        return super().protocol() | batches

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        return self._compared(self._answers(params, state, batch)[..., 0], batch.values[self.target], batch.valid)

    def _round_sums(self, values: Any, round_: Round) -> Any:
        mean = read_out(values, round_, lambda views: views.mean(axis=1))
        return self._compared(mean[..., 0], round_.target, round_.valid)

    def _compared(self, prediction: Float[Array, "b h w"], target: Shaped[Array, "b h w 1"], valid: Any) -> Any:
        """The sums, in meters."""
        unit = self._spec().metres_per_count or 1.0
        options = {key: self.options[key] for key in ("eigen_crop", "depth_range", "align")}
        return depth.sums(prediction * unit, target[..., 0].astype(jnp.float32) * unit, None, valid, **options)

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figures."""
        yield from depth.summarize([local(sums(batch)) for batch in batches], self.options["aggregation"]).items()


class Normals(Dense):
    """Angles between predicted and true surface normals: mean and median in degrees, share below 11.25, 22.5 and 30."""

    task, channels = "regression", 3
    given = ("mean", "median", "rmse", *(f"under_{threshold:g}" for threshold in normals.THRESHOLDS))

    def _sums(self, params: Any, state: Any, batch: Batch) -> Any:
        spec = self._spec()
        directions = lambda x: (x.astype(jnp.float32) * spec.scale - jnp.array(spec.mean)) / jnp.array(spec.std)  # noqa: E731
        answer, target = self._answers(params, state, batch), batch.values[self.target]
        return normals.sums(directions(answer), directions(target), None, batch.valid)

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figures."""
        yield from normals.summarize(merged(sums, batches)).items()


class Maps(Dense):
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

    def figures(self, sums: Callable[[Any], Any], batches: Iterator[Any]) -> Figures:
        """The figure."""
        total, count = merged(sums, batches)
        yield "l1", float(total / count) if count else float(np.nan)
