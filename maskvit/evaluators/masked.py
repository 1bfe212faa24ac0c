"""The loss of hidden tokens on data of its own, at masks that depend on nothing that training changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maskvit.core.keys import stream_keys
from maskvit.core.modalities import Modality
from maskvit.core.types import Batch
from maskvit.evaluators.answers import Figures
from maskvit.evaluators.reading import Reading, merged, nothing
from maskvit.sharding import replicated


class MaskedLoss:
    """Losses of a masked autoencoder on held-out pictures whose random masks are the same at every evaluation and in every run.

    Figures: "total" and one for each output, unweighted means over the samples that have it. A training loss is taken on the tokens
    that a run hides, with its weights: runs that hide differently cannot be compared by it, but by these.

    Args:
      data_from: a source, as `config.data.train`; by default that data set's split "val".
      limit: only so many examples, evenly spread over the data; None for all.
      batch_size: images at once over all devices; no figure depends on it.
      crop: how pictures are brought to the model's size, as in `maskvit.data.batches.eval_batches`.
      seed: of the masks; a record's own depend on its number and on nothing else.

    Raises ValueError for an objective that hides no tokens.
    """

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
        crop: float | int | str | None = 1.0,
        seed: int = 0,
    ):
        if not hasattr(objective, "with_random_masks"):
            raise ValueError("the evaluator 'masked_loss' takes the loss of hidden tokens, but config.objective hides none: drop it")
        objective = objective.with_random_masks()
        block = dict(data_from or {**dict(data["train"]), "split": "val"})
        inputs, outputs = objective.model.inputs, [objective.model.modality(name).name for name in objective.model.outputs]
        read = {name: modalities[name] for name in dict.fromkeys((*inputs, *outputs))}
        self.reading = Reading(block, read, image_size, mesh, data, inputs=inputs, batch_size=batch_size, limit=limit, crop=crop)
        self.objective, self._seed = objective, seed
        self.names = ("total", *objective.model.outputs)
        self._sums = jax.jit(self._of_batch, out_shardings=replicated(mesh))

    def protocol(self) -> dict[str, Any]:
        """How the figures are taken, as plain data."""
        return dict(self.reading.protocol(), figures="masked_loss", visible=self.objective.num_visible, seed=self._seed)

    def run(self, params: Any, objective_state: Any, between: Callable[[], None] = nothing) -> Figures:
        """Yield "total" and the loss of every output."""
        sums = merged(functools.partial(self._sums, params), self.reading.batches("masked loss", between))
        means = {name: float(sums[name][0]) / max(float(sums[name][1]), 1.0) for name in self.objective.model.outputs}
        yield "total", sum(means.values())
        yield from means.items()

    def _of_batch(self, params: Any, batch: Batch) -> Any:
        """{output: (sum of losses, number of samples)}, padding left out."""
        keys = stream_keys(jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self._seed)))(batch.record.index), "masked_loss")

        def of_sample(sample: Batch, key: Any) -> Any:
            one = jax.tree.map(lambda x: x[None], (sample, key))
            return self.objective.loss(params, {}, *one, jnp.zeros((), jnp.int32))[1][1]

        real = batch.valid
        found = jax.vmap(of_sample)(batch, keys)
        return {
            name.removeprefix("loss/"): tuple(jnp.where(real, x, 0.0).sum() for x in pair)
            for name, pair in found.items()
            if name.removeprefix("loss/") in self.objective.model.outputs
        }
