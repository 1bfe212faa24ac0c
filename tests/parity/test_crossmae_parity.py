"""CrossMAE against numbers recorded from the PyTorch reference (no torch here)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_names import to_tree

from maskvit.convert import open_checkpoint
from maskvit.core.keys import sample_keys
from maskvit.core.types import Batch, MaskPlan, tree_paths
from maskvit.objectives import build_objective

FORWARD = dict(rtol=1e-4, atol=1e-5)
GRADIENT = dict(rtol=1e-3, atol=1e-5)


def objective(kept: float):
    """The recorded model; the recorded pictures are already normalized."""
    sizes = dict(encoder=dict(width=48, depth=3, heads=3), decoder=dict(width=32, depth=2, heads=4))
    block = dict(name="crossmae", kept_mask_ratio=kept, **sizes)
    return build_objective(dict(image_size=(32, 32), modalities=dict(rgb=dict(channels=3, patch=8)), objective=block))


OBJECTIVES = {"full": objective(0.75), "partial": objective(0.25)}
MODEL = OBJECTIVES["full"].model


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "crossmae_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(fixtures):
    return jax.tree.map(jnp.asarray, to_tree(open_checkpoint(fixtures / "crossmae_tiny.pth").state))


@pytest.fixture(scope="module")
def batch(golden):
    return Batch({"rgb": jnp.asarray(golden["image"].transpose(0, 2, 3, 1))})


@pytest.fixture(scope="module")
def plans(golden):
    """In the order of the noise: 4 tokens are shown, then in the partial form 8 are skipped, and the rest is predicted."""
    order, plans = np.argsort(golden["noise"], axis=1), {}
    for form, skipped in (("full", 0), ("partial", 8)):
        visible, predicted = np.sort(order[:, :4], axis=1), np.sort(order[:, 4 + skipped :], axis=1)
        masked = np.ones(order.shape, bool)
        np.put_along_axis(masked, visible, False, axis=1)
        plans[form] = jax.tree.map(jnp.asarray, MaskPlan(visible, visible >= 0, predicted, predicted >= 0, masked))
    return plans


@pytest.fixture(scope="module")
def outcomes(params, batch, plans):
    """Per form: (loss, predictions of the queries, gradients)."""

    def run(form):
        objective = OBJECTIVES[form]

        def loss(params):
            return objective.loss(params, {}, batch, sample_keys(0, 0, 4), jnp.int32(0), plans[form])[0]

        tokens = MODEL.embed(params, objective.prepare(batch).values)
        queries = objective.queries(plans[form], tokens.layout)
        predictions = objective.decode(params, objective.encode_visible(params, tokens, plans[form]), tokens, plans[form], queries)
        return *jax.value_and_grad(loss)(params), predictions["norm_rgb"]

    return {form: jax.jit(run, static_argnums=0)(form) for form in plans}


def test_the_model_has_the_files_parameters(params):
    ours = tree_paths(jax.eval_shape(lambda key: OBJECTIVES["full"].init(key)[0], jax.random.key(0)))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in tree_paths(params).items()}


@pytest.mark.parametrize("form", ["full", "partial"])
def test_loss_and_predictions_of_the_queries_alone(outcomes, golden, form):
    loss, _, prediction = outcomes[form]
    np.testing.assert_allclose(loss, golden[f"loss_{form}"], **FORWARD)
    assert prediction.shape[1] == {"full": 12, "partial": 4}[form]
    np.testing.assert_allclose(prediction.reshape(4, -1, 192), golden[f"pred_{form}"], **FORWARD)


def test_gradients_of_every_parameter(outcomes, golden):
    recorded = tree_paths(to_tree({key.removeprefix("grad/"): x for key, x in golden.items() if key.startswith("grad/")}))
    ours = tree_paths(outcomes["partial"][1])
    assert set(ours) - set(recorded) == {"inputs/rgb/pos_embed", "outputs/norm_rgb/pos_embed"}
    for name, gradient in ours.items():
        np.testing.assert_allclose(gradient, recorded.get(name, np.zeros_like(gradient)), **GRADIENT, err_msg=name)


def test_one_pass_over_all_tokens_gives_the_recorded_values(params, batch, plans, golden):
    """Of a plan with 4 predicted tokens: the other hidden ones are decoded with them, and nothing changes."""

    def reconstruct(params):
        tokens = MODEL.embed(params, OBJECTIVES["partial"].prepare(batch).values)
        return OBJECTIVES["partial"].reconstruct(params, tokens, plans["partial"])["norm_rgb"].reshape(4, 16, 192)

    hidden = np.asarray(plans["full"].predicted_ids)
    found = np.take_along_axis(np.asarray(jax.jit(reconstruct)(params)), hidden[..., None], axis=1)
    np.testing.assert_allclose(found, golden["pred_full"], **FORWARD)
