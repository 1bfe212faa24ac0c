"""What stands in for an absent modality reaches nothing, and undeclared holes are named before training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.data.pipeline import train_batches
from maskvit.data.sources import ListSource
from maskvit.keys import sample_keys
from maskvit.modalities import parse_modalities
from tests.tiny import GUIDED, MODALITIES, on_device, tiny_batch, tiny_objective


def test_nan_of_absent_modalities_reaches_nothing():
    objective = tiny_objective(**GUIDED)
    batch = tiny_batch(8, present=True)
    holes = {**batch, "depth": np.where(batch["present"][:, 1, None, None, None], batch["depth"], np.nan)}
    params = objective.init(jax.random.key(0))[0]
    step = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, (), b, sample_keys(0, 0, 8), jnp.int32(0))[0]))
    loss, gradients = step(params, on_device(batch))
    other_loss, other_gradients = step(params, on_device(holes))
    assert float(loss) == float(other_loss) and np.isfinite(loss)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True))


def test_nan_in_a_modality_that_declares_none_missing():
    depth = np.ones((32, 32), np.float32)
    depth[3, 4] = np.nan
    records = [{"id": str(i), "depth": depth} for i in range(8)]
    specs = parse_modalities({"depth": MODALITIES["depth"]})
    with pytest.raises(ValueError, match="'depth' has NaN pixels, but config.modalities.depth.missing is None"):
        next(train_batches(ListSource(records), specs, (32, 32), seed=0, global_batch=4))
