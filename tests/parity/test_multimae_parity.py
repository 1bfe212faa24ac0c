"""MultiMAE against numbers recorded from the PyTorch reference, through our own reader and conversion (no torch here)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maskvit.convert import open_checkpoint, understand
from maskvit.convert.rules import key_shapes, to_ours
from maskvit.core.keys import sample_keys
from maskvit.core.patches import sincos_position_table
from maskvit.core.types import Batch, MaskPlan, TokenBatch, tree_paths
from maskvit.guidance.attention import self_attention
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw, with_adam_moments

NAMES = ("rgb", "depth", "semseg")
OUTPUTS = (*NAMES, "norm_rgb")
FORWARD = dict(rtol=1e-4, atol=1e-5)
GRADIENT = dict(rtol=1e-3, atol=1e-5)
# The recorded rgb is already normalized and the depth already divided.
MODALITIES = dict(
    rgb=dict(channels=3, patch=8, loss="mse"),
    depth=dict(channels=1, patch=8, loss="l1", standardize=True),
    semseg=dict(kind="categorical", num_classes=7, patch=8, stride=4, loss="cross_entropy", embed_dim=8),
)
OBJECTIVE = build_objective(
    dict(
        image_size=(32, 32),
        modalities=MODALITIES,
        objective=dict(
            name="multimae",
            inputs=NAMES,
            outputs=OUTPUTS,
            encoder=dict(width=48, depth=3, heads=3),
            decoder=dict(width=16, depth=2, heads=4),
            num_visible=8,
        ),
    )
)
MODEL = OBJECTIVE.model


@pytest.fixture(scope="module")
def golden(fixtures):
    with np.load(fixtures / "multimae_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def checkpoint(fixtures):
    return open_checkpoint(fixtures / "multimae_tiny_public.pth")


@pytest.fixture(scope="module")
def rules(checkpoint):
    return understand(checkpoint, num_heads=3, decoder_num_heads=4).rules


@pytest.fixture(scope="module")
def params(checkpoint, rules):
    return jax.tree.map(jnp.asarray, to_ours(rules, checkpoint.state, "public"))


@pytest.fixture(scope="module")
def batch(golden):
    images = {"rgb": golden["rgb"].transpose(0, 2, 3, 1), "depth": golden["depth_raw"].transpose(0, 2, 3, 1)}
    return Batch(jax.tree.map(jnp.asarray, dict(images, semseg=golden["semseg"].astype(np.int32))))


@pytest.fixture(scope="module")
def prepared(batch):
    return jax.jit(OBJECTIVE.prepare)(batch)


@pytest.fixture(scope="module")
def plan(golden):
    masked = np.concatenate([golden[f"mask_{name}"] for name in NAMES], axis=1).astype(bool)
    visible, hidden = np.sort(golden["ids_keep"], axis=1), np.stack([np.flatnonzero(row) for row in masked])
    everything = np.ones_like
    return jax.tree.map(jnp.asarray, MaskPlan(visible, everything(visible, bool), hidden, everything(hidden, bool), masked))


@pytest.fixture(scope="module")
def tokens(params, prepared):
    return MODEL.embed(params, prepared.values_of(NAMES))


@pytest.fixture(scope="module")
def gradients(params, batch, plan):
    """((loss, metrics), gradients) of the summed losses under the recorded masks."""

    def loss(params):
        value, (_, metrics) = OBJECTIVE.loss(params, (), batch, sample_keys(0, 0, 4), jnp.int32(0), plan)
        return value, metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def of_names(golden, prefix: str, rules, params):
    """Recorded tensors "<prefix><torch name>" as a tree like `params`; zeros for the frozen tables, which have none."""
    keep = {key: np.zeros(shape, np.float32) for key, shape in key_shapes(rules).items() if key.endswith("pos_emb")}
    return to_ours(rules, {**keep, **{key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}}, prefix)


def images(patches: np.ndarray, side: int) -> np.ndarray:
    """Our "b n p c" of a 4 x 4 grid to the reference's (b, c, h, w)."""
    b, _, _, channels = patches.shape
    cut = np.asarray(patches).reshape(b, 4, 4, side, side, channels)
    return cut.transpose(0, 5, 1, 3, 2, 4).reshape(b, channels, 4 * side, 4 * side)


def test_the_model_has_the_files_parameters(params):
    ours = tree_paths(jax.eval_shape(lambda key: OBJECTIVE.init(key)[0], jax.random.key(0)))
    assert {name: x.shape for name, x in ours.items()} == {name: x.shape for name, x in tree_paths(params).items()}


def test_position_tables_are_the_files(params):
    tables = {name: value for name, value in tree_paths(params).items() if name.endswith("pos_embed")}
    assert len(tables) == 7
    for name, table in tables.items():
        np.testing.assert_allclose(table, sincos_position_table((4, 4), table.shape[-1]), atol=7e-7, err_msg=name)


def test_depth_standardization(prepared, golden):
    np.testing.assert_allclose(np.asarray(prepared.values["depth"]).transpose(0, 3, 1, 2), golden["depth_standardized"], **FORWARD)


def test_input_tokens(tokens, golden):
    np.testing.assert_allclose(tokens.tokens, golden["input_tokens"], **FORWARD)


def test_encoder_on_all_tokens(params, tokens, golden):
    np.testing.assert_allclose(jax.jit(MODEL.encode)(params, tokens.tokens), golden["encoder_tokens_unmasked"], **FORWARD)


def test_encoder_on_visible_tokens(params, tokens, plan, golden):
    visible = np.take_along_axis(np.asarray(tokens.tokens), np.asarray(plan.visible_ids)[..., None], axis=1)
    # The reference keeps visible tokens in a random order, we in ascending order; the global token is last in both.
    order = np.argsort(golden["ids_keep"], axis=1)
    recorded = np.concatenate(
        [np.take_along_axis(golden["encoder_tokens"][:, :-1], order[..., None], 1), golden["encoder_tokens"][:, -1:]], 1
    )
    np.testing.assert_allclose(jax.jit(MODEL.encode)(params, jnp.asarray(visible)), recorded, **FORWARD)


def test_predictions(params, tokens, plan, golden):
    predictions = jax.jit(lambda p, t, plan: OBJECTIVE.reconstruct(p, TokenBatch(t, tokens.layout), plan))(params, tokens.tokens, plan)
    for name in OUTPUTS:
        np.testing.assert_allclose(images(predictions[name], 2 if name == "semseg" else 8), golden[f"pred_{name}"], **FORWARD, err_msg=name)


def test_losses(gradients, golden):
    (total, metrics), _ = gradients
    for name in OUTPUTS:
        loss_sum, count = metrics[f"loss/{name}"]
        np.testing.assert_allclose(loss_sum / count, golden[f"loss_{name}"], **FORWARD, err_msg=name)
    np.testing.assert_allclose(total, golden["loss_total"], **FORWARD)


def test_gradients_of_every_parameter(gradients, golden, rules, params):
    recorded = tree_paths(of_names(golden, "grad/", rules, params))
    ours = tree_paths(gradients[1])
    assert set(ours) == set(recorded)
    for name, gradient in ours.items():
        if name.endswith("pos_embed"):
            assert not np.asarray(gradient).any(), name
        else:
            np.testing.assert_allclose(gradient, recorded[name], **GRADIENT, err_msg=name)


@pytest.fixture(scope="module")
def after_step(golden, rules, params):
    """(parameters, optimizer state) after the reference's first AdamW step, from its gradients."""
    optimizer = adamw(params, frozen_mask(params), Cosine(peak=1e-3, total=10), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    grads = jax.tree.map(jnp.asarray, of_names(golden, "grad/", rules, params))
    updates, state = jax.jit(optimizer.tx.update)(grads, optimizer.tx.init(params), params)
    return jax.tree.map(lambda p, u: p + optimizer.schedule(0) * u, params, updates), state


def test_one_adamw_step_from_the_recorded_gradients(after_step, golden, rules, params):
    recorded = tree_paths(of_names(golden, "after_adamw/", rules, params))
    for name, value in tree_paths(after_step[0]).items():
        expected = tree_paths(params)[name] if name.endswith("pos_embed") else recorded[name]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_converted_moments_are_those_after_that_step(after_step, fixtures, params):
    training = open_checkpoint(fixtures / "multimae_tiny_training.pth")
    trained = [rule for rule in understand(training, 3, 4).rules if not rule.keys[0].endswith("pos_emb")]
    moments = {kind: to_ours(trained, training.adam[kind], kind) for kind in ("mu", "nu")}
    optimizer = adamw(params, frozen_mask(params), Cosine(peak=1e-3, total=10))
    imported = with_adam_moments(optimizer.tx.init(params), dict(moments, count=training.adam["count"]))
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    ours, theirs = ([x for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)][0] for state in (after_step[1], imported))
    assert int(ours.count) == int(theirs.count) == 1
    for kind in ("mu", "nu"):
        for name, value in tree_paths(getattr(ours, kind)).items():
            np.testing.assert_allclose(value, tree_paths(getattr(theirs, kind))[name], rtol=1e-5, atol=1e-9, err_msg=f"{kind} of {name}")


def test_last_layer_attention(params, tokens, golden):
    weights = np.asarray(jax.jit(lambda p, t: MODEL.attention(p, TokenBatch(t, tokens.layout), slice(None)))(params, tokens.tokens))
    np.testing.assert_allclose(weights.mean(axis=1), golden["last_attention_head_mean"], **FORWARD)
    np.testing.assert_allclose(weights[:, :, -1, :48], golden["last_attention_global_query"], **FORWARD)


@pytest.mark.parametrize("query", ["global", "mean"])
def test_guidance_reads_the_recorded_attention(params, tokens, golden, query):
    guidance = jax.jit(lambda p, t: self_attention(MODEL, p, TokenBatch(t, tokens.layout), query))(params, tokens.tokens)
    recorded = golden["last_attention_head_mean"]
    expected = recorded[:, -1, :48] if query == "global" else recorded.mean(axis=1)[:, :48]
    np.testing.assert_allclose(guidance, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(golden["last_attention_global_query"].mean(axis=1), recorded[:, -1, :48], **FORWARD)
