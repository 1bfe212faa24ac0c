"""Pictures of a run: the same few samples every time, with what is hidden and what the model makes of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from maskvit.core.keys import sample_keys
from maskvit.core.types import TrainState, batch_of
from maskvit.data.batches import eval_batches
from maskvit.sharding import replicated, whole

PICTURE_SAMPLES = 4


def shown_records(num_records: int) -> Int[np.ndarray, " k"]:
    """The records of which pictures are made, as `eval_batches` chooses them; -1 where there are too few."""
    slots, shown = np.arange(PICTURE_SAMPLES, dtype=np.int32), min(PICTURE_SAMPLES, num_records)
    return np.where(slots < shown, slots * num_records // shown, -1).astype(np.int32)


class Painter:
    """Draws the same few unaugmented samples every time, on process 0."""

    def __init__(self, objective: Any, source: Any, modalities: Mapping[str, Any], seed: int, mesh: Mesh):
        self._objective, self._seed = objective, seed
        self._modalities = modalities
        self._index = shown_records(len(source))
        self._kept = jax.jit(lambda state, index: objective.recall(state, index)[1], out_shardings=replicated(mesh))
        if jax.process_index():
            return
        size = objective.model.image_size
        loading = objective.needs._replace(whole_every=0).loading()
        batches = eval_batches(
            source, modalities, size, batch_size=PICTURE_SAMPLES, limit=PICTURE_SAMPLES, inputs=objective.model.inputs, **loading
        )
        with batches:
            first = next(batches)
        self._batch = batch_of({name: array for name, array in first.items() if isinstance(array, np.ndarray)})
        self._visualize = jax.jit(objective.visualize)

    def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
        """{name: picture} for the writers; empty on other processes, which must take part: they hold what is kept of some records."""
        kept = self._kept(state.objective_state, self._index)
        shared, _ = self._objective.recall(state.objective_state, None)
        params, shared = whole((state.params, shared))
        if jax.process_index():
            return {}
        # All of it is the same on every device: one local copy serves.
        params, shared, kept, step = jax.tree.map(lambda x: x.addressable_data(0), (params, shared, kept, state.step))
        keys = sample_keys(self._seed, 0, PICTURE_SAMPLES)
        arrays = jax.device_get(self._visualize(params, shared, self._batch._replace(kept=kept), keys, step=step))
        if arrays["masked"]:
            from PIL import Image

            from maskvit.plots.panels import masking_panel

            page = masking_panel(arrays, self._modalities, PICTURE_SAMPLES)
            return {"masking": np.asarray(Image.open(io.BytesIO(page)).convert("RGB"))}
        from maskvit.plots.answers import answers_picture

        pictures = {}
        for name, answer in arrays["reconstructions"].items():  # of one target, if any: classes have nothing to see
            shown = dict(arrays["inputs"])
            pictures["masking"] = answers_picture(shown, shown.pop(name), answer, self._modalities, name)
        return pictures
