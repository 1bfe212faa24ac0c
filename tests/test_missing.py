"""What stands in for an absent modality reaches nothing, and undeclared holes are named before training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.keys import sample_keys
from maskvit.core.modalities import parse_modalities
from maskvit.data.batches import train_batches
from maskvit.data.sources import ListSource
from tests.tiny import GUIDED, MODALITIES, fresh_params, on_device, tiny_batch, tiny_objective


def test_nan_of_absent_modalities_reaches_nothing():
    objective = tiny_objective(outputs=("rgb", "depth"), encoder=dict(width=48, depth=1, heads=3), **GUIDED)
    batch = tiny_batch(8, present=True)
    holes = {**batch, "depth": np.where(batch["present"][:, 1, None, None, None], batch["depth"], np.nan)}
    params = fresh_params(objective)
    step = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, (), b, sample_keys(0, 0, 8), jnp.int32(0))[0]))
    loss, gradients = step(params, on_device(batch))
    other_loss, other_gradients = step(params, on_device(holes))
    assert float(loss) == float(other_loss) and np.isfinite(loss)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True))


@pytest.mark.parametrize("name", ["depth", "normals", "semseg"])
@pytest.mark.parametrize("missing", [None, 255])
def test_an_output_that_some_samples_lack_counts_where_it_is(name, missing):
    # Only an output: its stand-ins (NaN, black, class -1) are no targets.
    specs = {"rgb": MODALITIES["rgb"], "depth": MODALITIES["depth"], "semseg": MODALITIES["semseg"]}
    specs["normals"] = dict(channels=3, patch=8, loss="l1", scale=1 / 255)
    specs = {"rgb": specs["rgb"], name: {**specs[name], "missing": missing}}
    sizes = dict(encoder=dict(width=48, depth=1, heads=3), num_visible=4)
    objective = tiny_objective(specs, inputs=("rgb",), outputs=("rgb", name), **sizes)
    batch = tiny_batch(8)
    batch["normals"] = batch["rgb"][:, ::-1].copy()
    batch = {key: batch[key] for key in ("rgb", name)}
    lacks = np.arange(8) % 2 == 1
    stand_in = {"depth": np.nan, "normals": 0, "semseg": -1}[name]
    batch[name][lacks] = stand_in
    batch["present"] = np.stack([np.ones(8, bool), ~lacks], axis=1)
    params = fresh_params(objective)
    keys = sample_keys(0, 0, 8)

    def loss_of(params, batch, keys):
        plan, counts = objective.plan(params, batch, keys)
        loss, (_, metrics) = objective.loss(params, (), batch, keys, jnp.int32(0), plan)
        return loss, (metrics[f"loss/{name}"], counts[name])

    (loss, ((total, count), planned)), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params, on_device(batch), keys)
    assert np.isfinite(loss) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    assert count == planned == 4
    only = {key: value[~lacks] for key, value in batch.items()}
    assert np.isclose(total, jax.jit(loss_of)(params, on_device(only), keys[~lacks])[1][0][0], rtol=1e-5)


def test_nan_in_a_modality_that_declares_none_missing():
    depth = np.ones((32, 32), np.float32)
    depth[3, 4] = np.nan
    records = [{"id": str(i), "depth": depth} for i in range(8)]
    specs = parse_modalities({"depth": MODALITIES["depth"]})
    with pytest.raises(ValueError, match="'depth' has NaN pixels, but config.modalities.depth.missing is None"):
        next(train_batches(ListSource(records), specs, (32, 32), seed=0, global_batch=4))


@pytest.mark.parametrize("name", ["label", "flip", "id"])
def test_a_modality_may_not_have_the_name_of_something_else_in_a_batch(name):
    with pytest.raises(ValueError, match=f"config.modalities names '{name}', which a batch holds already"):
        parse_modalities({name: MODALITIES["depth"]})
