"""How guidance agrees with masks of objects: maps of a model's own attention, of TokenCut or of any other source, per patch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from maskvit.core.configuration import named_function
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch, DataNeeds, TokenBatch, TokenLayout
from maskvit.evaluators.reading import Reading, check_shown, merged, nothing, target_modality
from maskvit.guidance import GUIDANCE, Request, build_source
from maskvit.guidance.discovery import attention_map
from maskvit.guidance.tokencut import tokencut_map, with_neighbors
from maskvit.heads.values import prepare
from maskvit.losses.weights import unit_range
from maskvit.metrics import localization
from maskvit.sharding import replicated

WHERE = "config.evaluators guidance"
MAPS: dict[str, Any] = {"attention": attention_map, "tokencut": tokencut_map}


class Localization:
    """Maps of the first input shown against masks.

    Figures, in percent, over pictures that have an object: "corloc", pictures where the box around the found part overlaps with that of
    an object by at least half; "iou" and "accuracy" of the found pixels; "max_f", the F-measure (beta^2 = 0.3) at the best threshold.

    Args:
      target: a categorical modality of the model, or a declaration of one, as in `config.modalities`, with its "name".
      guidance: {"name": ..., **fields}: "attention" (`maskvit.guidance.discovery.attention_map`), "tokencut"
        (`maskvit.guidance.tokencut.tokencut_map`), or a row of `maskvit.guidance.GUIDANCE` that keeps nothing and reads no maps.
      objects: ids that are objects, each with a box of its own; by default all but 0.
      threshold: patches above it are the object, of maps scaled to 0 ... 1 in each picture; None: above the picture's mean. The box
        is around the part that holds the highest patch.
      data_from: a source with masks, as `config.data.train`; by default that data set's split "val".
      limit, batch_size, crop, shown: as in other evaluators; the crop must fit pictures and masks alike.

    Raises ValueError where guidance needs more than the model and its input, or masks do not fit.
    """

    names = ("corloc", "iou", "accuracy", "max_f")

    def __init__(
        self,
        *,
        objective: Any,
        modalities: Mapping[str, Modality],
        image_size: tuple[int, int],
        mesh: Mesh,
        data: Mapping[str, Any],
        target: str | Mapping[str, Any],
        guidance: Mapping[str, Any] | None = None,
        objects: Sequence[int] = (),
        threshold: float | None = None,
        data_from: Mapping[str, Any] | None = None,
        limit: int | None = None,
        batch_size: int = 64,
        crop: float | int | None = None,
        shown: Sequence[str] | None = None,
    ):
        model = objective.model
        self._objective, self._threshold = objective, threshold
        self._inputs = check_shown(objective, model.inputs[:1] if shown is None else shown)
        self._target = target_modality("localization", target, modalities, "categorical", self._inputs)
        if self._target.grid(image_size) != modalities[self._inputs[0]].grid(image_size):
            raise ValueError(f"localization target {self._target.name!r} must have the patch of the input {self._inputs[0]!r}")
        self._objects = tuple(objects) or tuple(range(1, self._target.num_classes))
        if wrong := [number for number in self._objects if not 0 <= number < self._target.num_classes]:
            last = self._target.num_classes - 1
            raise ValueError(f"localization objects names {wrong[0]}; ids of {self._target.name!r} are 0 ... {last}")
        if threshold is not None and not 0 < threshold < 1:
            raise ValueError(f"localization threshold is {threshold}; it must be between 0 and 1, or None for the mean of each picture")
        self._guidance = dict(guidance or dict(name="attention"))
        self._map = self._reader(model)
        block = data_from or {**dict(data["train"]), "split": "val"}
        read = {name: modalities[name] for name in self._inputs} | {self._target.name: self._target}
        self._reading = Reading(block, read, image_size, mesh, data, inputs=self._inputs, batch_size=batch_size, limit=limit, crop=crop)
        if lacking := [name for name in self._inputs if name in self._reading.source.may_lack]:
            raise ValueError(f"localization needs all inputs of every picture, but some may lack {lacking[0]!r}: leave it out of shown")
        self._sums = jax.jit(self._of_batch, out_shardings=replicated(mesh))

    def _reader(self, model: Any) -> Callable[..., Float[Array, "b gh gw"]]:
        """`(params, prepared values, tokens, batch) -> maps` of the first input."""
        name = self._guidance.get("name")
        if name in MAPS:
            function, pairs = named_function(WHERE, MAPS, self._guidance, ("model", "params", "batch", "modality"))
            layout = TokenLayout(self._inputs, tuple(model.modality(name).grid(model.image_size) for name in self._inputs))
            tokens = jax.ShapeDtypeStruct((1, layout.num_tokens, model.width), jnp.float32)
            # Wrong values of its fields are said here, and not after a run's first steps.
            jax.eval_shape(
                lambda params, tokens: function(model, params, TokenBatch(tokens, layout), **dict(pairs)),
                jax.eval_shape(model.init, jax.random.key(0)), tokens,
            )  # fmt: skip
            return lambda params, values, tokens, batch: function(model, params, tokens, **dict(pairs))
        if name not in GUIDANCE:
            raise ValueError(f"{WHERE}.name is {name!r}; known: {', '.join((*MAPS, *GUIDANCE))}")
        source = build_source(self._guidance, WHERE)
        source.check(model)
        memory = jax.tree.leaves(jax.eval_shape(lambda: source.init(model, model.init(jax.random.key(0)), 1)))
        if source.needs != DataNeeds() or source.observes or source.predicts_errors or memory:
            raise ValueError(f"{WHERE}.name {name!r} needs maps, errors or a memory that an evaluator has not: take one of the model alone")

        def read(params: Any, values: Any, tokens: Any, batch: Batch) -> Float[Array, "b gh gw"]:
            fold = lambda index: jax.random.fold_in(jax.random.key(0), index)  # noqa: E731
            keys = jax.vmap(fold)(batch.record.index)
            scores = source(Request(model, params, (), tokens, values, batch, keys, _not_here, _not_here))
            layout = tokens.layout
            return scores[:, layout.span(layout.names[0])].reshape(-1, *layout.grids[0])

        return read

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        return dict(
            self._reading.protocol(), figures="localization", guidance=self._guidance, objects=self._objects, threshold=self._threshold,
            target=self._target.name,
        )  # fmt: skip

    def _of_batch(self, params: Any, state: Any, batch: Batch) -> Any:
        prepared = prepare(self._objective.model, batch.only(self._inputs))
        params, values = self._objective.encoder_params(params, state), prepared.values_of(self._inputs)
        tokens = self._objective.model.embed(params, values, prepared.present)
        maps = self._map(params, values, tokens, batch)
        maps = unit_range(maps.reshape(len(maps), -1)).reshape(maps.shape)
        limit = maps.mean(axis=(1, 2), keepdims=True) if self._threshold is None else self._threshold
        objects = jnp.asarray(np.isin(np.arange(self._target.num_classes), self._objects))
        ids = batch.values[self._target.name]
        return localization.sums(maps, maps > limit, connected(maps, maps > limit), ids, objects, batch.valid)

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Iterator[tuple[str, float]]:
        """Yield the figures."""
        batches = self._reading.batches("localization", between)
        yield from localization.summarize(merged(lambda batch: self._sums(params, objective_state, batch), batches)).items()


def connected(maps: Float[Array, "b gh gw"], chosen: Bool[Array, "b gh gw"]) -> Bool[Array, "b gh gw"]:
    """The part of the chosen patches that hangs together with the highest one, by four neighbors; nothing where none is chosen."""
    seed = jnp.argmax(maps.reshape(len(maps), -1), axis=1)
    start = (jnp.arange(maps[0].size) == seed[:, None]).reshape(maps.shape) & chosen

    def grow(masks: tuple[Array, Array]) -> tuple[Array, Array]:
        return with_neighbors(masks[0], jnp) & chosen, masks[0]

    return jax.lax.while_loop(lambda masks: (masks[0] != masks[1]).any(), grow, (start, jnp.zeros_like(start)))[0]


def _not_here(*_: Any) -> Any:
    raise ValueError(f"{WHERE} asks for more than the model's own tokens")
