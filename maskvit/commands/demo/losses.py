"""Held-out losses at fixed masks: of a model, and of a guess that sees nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from maskvit.core.types import Batch, MaskPlan, Params, batch_of


def loss_of_predictions(objective: Any, batch: Batch, plan: MaskPlan, predictions: Mapping[str, Array]) -> dict[str, Array]:
    """Sums and counts of every output's masked loss for given predictions."""
    prepared = objective.prepare(batch)
    layout = objective.model.layout_of(prepared.values_of(objective.model.inputs))
    return objective.loss_sums(predictions, prepared, plan, layout)


def held_out_losses(objective: Any, params: Params, batches: Sequence[Batch], plans: Sequence[MaskPlan]) -> dict[str, float]:
    """Masked loss per output over held-out batches, at given plans."""
    loss = jax.jit(lambda p, batch, plan: objective.loss(p, (), batch, None, jnp.int32(0), plan)[1][1])
    return _mean([loss(params, batch, plan) for batch, plan in zip(batches, plans, strict=True)])


def mean_patches(objective: Any, batches: Sequence[Batch]) -> dict[str, Float[Array, "n p c"]]:
    """What a model without eyes predicts: the mean over images of every output at every place; for classes, the
    logarithm of their frequency there. For an output of normalized patches that is each patch's own mean: zero."""

    def of_batch(batch: Batch) -> dict[str, Array]:
        prepared, result = objective.prepare(batch), {}
        for name in objective.model.outputs:
            target, spec = objective.target(name, prepared), objective.model.modality(name)
            result[name] = jax.nn.one_hot(target, spec.num_classes).mean(0) if spec.kind == "categorical" else target.mean(0)
        return result

    means = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *[jax.jit(of_batch)(batch) for batch in batches])
    for name in objective.model.outputs:
        spec = objective.model.modality(name)
        if spec.kind == "categorical":
            means[name] = jnp.log(means[name] + 1e-4)
        elif name != spec.name:
            means[name] = jnp.zeros_like(means[name])
    return means


def mean_patch_losses(objective: Any, means: Mapping[str, Array], batches: Sequence[Batch], plans: Sequence[MaskPlan]) -> dict[str, float]:
    """The masked losses of `mean_patches` on held-out batches at given plans."""

    def loss(batch: Batch, plan: MaskPlan) -> Any:
        b = plan.masked.shape[0]
        predictions = {name: jnp.broadcast_to(mean, (b, *mean.shape)) for name, mean in means.items()}
        return {f"loss/{name}": value for name, value in loss_of_predictions(objective, batch, plan, predictions).items()}

    return _mean([jax.jit(loss)(batch, plan) for batch, plan in zip(batches, plans, strict=True)])


def _mean(metrics: Sequence[Any]) -> dict[str, float]:
    from maskvit.metrics.accumulate import summarize

    return {name.removeprefix("loss/"): value for name, value in summarize(metrics).items()}


def batches_of(config: Mapping[str, Any], objective: Any, split: str, limit: int) -> list[Batch]:
    """Unaugmented batches of a split, on the device, with their labels."""
    from maskvit.data import open_source
    from maskvit.data.batches import eval_batches

    specs = {spec.name: spec for spec in objective.model.modalities}
    source = dict(config["data"]["train"], split=split)
    stream = eval_batches(
        open_source(source.pop("source"), specs, **source), specs, objective.model.image_size, batch_size=100, limit=limit, crop=1.0
    )
    arrays = ({key: jnp.asarray(value) for key, value in batch.items() if isinstance(value, np.ndarray)} for batch in stream)
    return [batch_of(one).only(tuple(specs))._replace(label=one["label"]) for one in arrays]
