"""Pictures of a run: the same few samples every time, with what is hidden and what the model makes of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from maskvit.core.keys import sample_keys
from maskvit.core.types import DataNeeds, TrainState, batch_of
from maskvit.data.batches import eval_batches

PICTURE_SAMPLES = 4


class Painter:
    """Draws the same few unaugmented samples every time, on process 0."""

    def __init__(self, objective: Any, source: Any, modalities: Mapping[str, Any], seed: int, needs: DataNeeds):
        self._objective, self._seed = objective, seed
        self._modalities = modalities
        size = objective.model.image_size
        loading = needs._replace(whole_every=0).loading()
        batches = eval_batches(
            source, modalities, size, batch_size=PICTURE_SAMPLES, limit=PICTURE_SAMPLES, inputs=objective.model.inputs, **loading
        )
        with batches:
            first = next(batches)
        self._batch = batch_of({name: array for name, array in first.items() if isinstance(array, np.ndarray)})
        self._visualize = jax.jit(objective.visualize)

    def __call__(self, state: TrainState) -> dict[str, np.ndarray]:
        """{name: picture} for the writers."""
        from PIL import Image

        from maskvit.plots.panels import masking_panel

        # Parameters are the same on every device: one local copy serves, and the other processes need not take part.
        params, objective_state = jax.tree.map(lambda x: x.addressable_data(0), (state.params, state.objective_state))
        keys = sample_keys(self._seed, 0, PICTURE_SAMPLES)
        step = state.step.addressable_data(0)
        arrays = jax.device_get(self._visualize(params, objective_state, self._batch, keys, step=step))
        return {"masking": np.asarray(Image.open(io.BytesIO(masking_panel(arrays, self._modalities, PICTURE_SAMPLES))).convert("RGB"))}
