"""MAE against numbers recorded from the PyTorch reference (no torch here)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_names import to_tree
from tiny import fresh_params

from maskvit.convert import open_checkpoint
from maskvit.core.keys import sample_keys
from maskvit.core.types import Batch, MaskPlan, tree_paths
from maskvit.nn import attention
from maskvit.objectives import build_objective

FORWARD = dict(rtol=1e-4, atol=1e-5)
GRADIENT = dict(rtol=1e-3, atol=1e-5)


def objective(output: str, **fields):
    """The recorded model; the recorded pictures are already normalized."""
    block = dict(name="mae", outputs=(output,), encoder=dict(width=48, depth=3, heads=3), decoder=dict(width=32, depth=2, heads=4))
    return build_objective(dict(image_size=(32, 32), modalities=dict(rgb=dict(channels=3, patch=8)), objective={**block, **fields}))


NORMALIZED, RAW = objective("norm_rgb"), objective("rgb")


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "mae_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def state(fixtures):
    return open_checkpoint(fixtures / "mae_tiny_full.pth").state


@pytest.fixture(scope="module")
def batch(golden):
    return Batch({"rgb": jnp.asarray(golden["image"].transpose(0, 2, 3, 1))})


@pytest.fixture(scope="module")
def plan(golden):
    """The 4 tokens of least noise are shown."""
    order = np.argsort(golden["noise"], axis=1)
    visible, hidden = np.sort(order[:, :4], axis=1), np.sort(order[:, 4:], axis=1)
    np.testing.assert_array_equal(np.take_along_axis(golden["mask"], hidden, axis=1), 1)
    return jax.tree.map(jnp.asarray, MaskPlan(visible, visible >= 0, hidden, hidden >= 0, golden["mask"].astype(bool)))


def loss(objective, params, batch, plan):
    value, (_, metrics) = objective.loss(params, {}, batch, sample_keys(0, 0, 4), jnp.int32(0), plan)
    return value, metrics


@pytest.fixture(scope="module")
def params(state):
    return jax.tree.map(jnp.asarray, to_tree(state))


def test_the_model_has_the_files_parameters(params):
    ours = tree_paths(jax.eval_shape(lambda key: NORMALIZED.init(key)[0], jax.random.key(0)))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in tree_paths(params).items()}


def test_position_tables_are_the_files(params):
    fresh = fresh_params(NORMALIZED)
    tables = [name for name in tree_paths(params) if name.endswith("pos_embed")]
    assert len(tables) == 2
    for name in tables:
        np.testing.assert_allclose(tree_paths(fresh)[name], tree_paths(params)[name], atol=1e-6, err_msg=name)


def test_predictions(params, batch, plan, golden):
    def predict(params, batch, plan):
        prepared = NORMALIZED.prepare(batch)
        return NORMALIZED.reconstruct(params, NORMALIZED.model.embed(params, prepared.values), plan)["norm_rgb"]

    np.testing.assert_allclose(jax.jit(predict)(params, batch, plan).reshape(4, 16, 192), golden["pred"], **FORWARD)


def test_loss_and_gradients(params, batch, plan, golden):
    (value, metrics), gradients = jax.jit(jax.value_and_grad(lambda p: loss(NORMALIZED, p, batch, plan), has_aux=True))(params)
    np.testing.assert_allclose(value, golden["loss_norm_pix"], **FORWARD)
    loss_sum, count = metrics["loss/norm_rgb"]
    np.testing.assert_allclose(loss_sum / count, golden["loss_norm_pix"], **FORWARD)
    recorded = tree_paths(to_tree({key.removeprefix("grad/"): x for key, x in golden.items() if key.startswith("grad/")}))
    ours = tree_paths(gradients)
    assert set(ours) - set(recorded) == {"inputs/rgb/pos_embed", "outputs/norm_rgb/pos_embed"}
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, recorded.get(name, np.zeros_like(gradient)), **GRADIENT, err_msg=name)


def test_bfloat16_with_fused_attention(params, batch, plan, golden, monkeypatch):
    """What a GPU is given, by JAX's fused attention for all devices: the reference's float32 loss within 1 %, its predictions' direction.

    5 tokens in the encoder and 17 in the decoder are odd, so both are padded.
    """
    monkeypatch.setattr(attention, "fused_attend", functools.partial(attention.fused_attend, implementation="xla"))
    fused = objective("norm_rgb", compute_dtype="bfloat16", attention="cudnn")

    def predict(params):
        prepared = fused.prepare(batch)
        return fused.reconstruct(params, fused.model.embed(params, prepared.values), plan)["norm_rgb"], loss(fused, params, batch, plan)[0]

    predicted, value = jax.jit(predict)(params)
    np.testing.assert_allclose(value, golden["loss_norm_pix"], rtol=1e-2)
    ours, recorded = np.asarray(predicted, np.float64).ravel(), golden["pred"].astype(np.float64).ravel()
    assert 0.9995 < ours @ recorded / np.linalg.norm(ours) / np.linalg.norm(recorded) < 1 - 1e-9


def test_loss_of_plain_pixels(state, batch, plan, golden):
    params = jax.tree.map(jnp.asarray, to_tree(state, "rgb"))
    np.testing.assert_allclose(jax.jit(lambda p: loss(RAW, p, batch, plan))(params)[0], golden["loss_raw_pix"], **FORWARD)
