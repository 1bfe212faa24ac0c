"""MultiMAE as an objective: missing modalities and pixels, what counts in a loss, features, pictures, and config mistakes."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GUIDED, MODALITIES, RANDOM, fresh_params, on_device, tiny_batch, tiny_config, tiny_objective

from maskvit.core.keys import sample_keys
from maskvit.core.types import TokenBatch
from maskvit.guidance.attention import self_attention
from maskvit.masking.plan import predicted_mask
from maskvit.objectives import build_objective
from maskvit.objectives.masked import MaskedAutoencoder

WITH_MISSING = {**MODALITIES, "depth": {**MODALITIES["depth"], "missing": 0.0}, "semseg": {**MODALITIES["semseg"], "missing": 255}}


@pytest.fixture(scope="module")
def params():
    return fresh_params(tiny_objective())


@functools.cache
def everything(objective: MaskedAutoencoder):
    """A function of (params, batch, keys): plan, predictions, loss sums (numerators and counts)."""

    @jax.jit
    def run(params, batch, keys):
        prepared = objective.prepare(batch)
        tokens = objective.model.embed(params, prepared.values_of(objective.model.inputs), prepared.present)
        plan = objective.plan(params, batch, keys)[0]
        predictions = objective.reconstruct(params, tokens, plan)
        return plan, predictions, objective.loss_sums(predictions, prepared, plan, tokens.layout)

    return run


@functools.cache
def loss_and_gradients(objective: MaskedAutoencoder):
    """A function of (params, batch, keys)."""

    @jax.jit
    def run(params, batch, keys):
        (loss, _), grads = jax.value_and_grad(objective.loss, has_aux=True)(params, (), batch, keys, jnp.int32(0))
        return loss, grads

    return run


# Modalities a sample does not have


@pytest.mark.parametrize("masking", [RANDOM, GUIDED], ids=["random", "guided"])
def test_a_batch_of_mixed_presence_is_its_samples_run_alone(params, masking):
    objective = tiny_objective(**masking)
    run, batch, keys = everything(objective), on_device(tiny_batch(8, present=True)), sample_keys(0, 0, 8)
    plan, predictions, sums = run(params, batch, keys)
    totals = {name: [0.0, 0.0] for name in sums}
    for i in range(8):
        one_plan, one_predictions, one_sums = run(params, jax.tree.map(lambda x: x[i : i + 1], batch), keys[i : i + 1])  # noqa: B023
        for ours, theirs in zip(jax.tree.leaves(plan), jax.tree.leaves(one_plan), strict=True):
            np.testing.assert_array_equal(ours[i], theirs[0])
        for name, prediction in one_predictions.items():
            np.testing.assert_allclose(predictions[name][i], prediction[0], rtol=1e-5, atol=1e-5)
            totals[name][0] += float(one_sums[name][0])
            totals[name][1] += float(one_sums[name][1])
            has_it = bool(batch.present[i, objective.model.inputs.index(name.removeprefix("norm_"))])
            assert (one_sums[name][1] == 1) == has_it
    for name, (loss_sum, count) in sums.items():
        np.testing.assert_allclose([loss_sum, count], totals[name], rtol=1e-5)


@pytest.mark.parametrize("junk", [0.0, 1e4, np.nan], ids=str)
def test_what_stands_in_for_an_absent_modality_does_not_matter(params, junk):
    objective = tiny_objective(**GUIDED)
    batch = tiny_batch(8, present=True)
    other = {name: value.copy() for name, value in batch.items()}
    other["depth"][~batch["present"][:, 1]] = junk
    other["semseg"][~batch["present"][:, 2]] = -1
    keys = sample_keys(0, 0, 8)
    one, grads = loss_and_gradients(objective)(params, on_device(batch), keys)
    two, other_grads = loss_and_gradients(objective)(params, on_device(other), keys)
    np.testing.assert_allclose(one, two, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("junk", [0.0, np.nan], ids=str)
def test_a_sample_with_fewer_tokens_than_are_shown(params, junk):
    objective = tiny_objective(num_visible=20)
    batch = tiny_batch(2)
    batch["present"] = np.array([[0, 0, 1], [1, 1, 1]], bool)
    batch["depth"][0] = junk
    plan, predictions, sums = everything(objective)(params, on_device(batch), sample_keys(0, 0, 2))
    np.testing.assert_array_equal(np.asarray(plan.visible_valid).sum(axis=1), [16, 20])
    assert all(np.isfinite(value).all() for value in predictions.values())
    assert {name: float(count) for name, (_, count) in sums.items()} == {"rgb": 1, "norm_rgb": 1, "depth": 1, "semseg": 1}
    _, grads = loss_and_gradients(objective)(params, on_device(batch), sample_keys(0, 0, 2))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_an_absent_modality_is_a_batch_without_it(params):
    # With semseg absent, rgb must be predicted as by a model call that never heard of semseg.
    objective = tiny_objective(outputs=("rgb",))
    batch = tiny_batch(2)
    batch["present"] = np.array([[1, 1, 0]] * 2, bool)
    plan, predictions, _ = everything(objective)(params, on_device(batch), sample_keys(0, 0, 2))

    def without(params, batch):
        prepared = objective.prepare(batch)
        tokens = objective.model.embed(params, prepared.values_of(("rgb", "depth")))
        hidden = jnp.argsort(~plan.masked[:, :32], axis=1, stable=True)[:, :20]
        shorter = plan._replace(masked=plan.masked[:, :32], predicted_ids=hidden, predicted_valid=jnp.ones((2, 20), bool))
        return objective.reconstruct(params, tokens, shorter)

    alone = jax.jit(without)(params, on_device({name: batch[name] for name in ("rgb", "depth")}))
    np.testing.assert_allclose(predictions["rgb"], alone["rgb"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", ["spatial", "mae", "crossmae"])
def test_an_output_that_is_not_in_the_batch_is_one_that_is_absent(decoder):
    # Depth rebuilt from rgb alone: its queries carry the depth embedding whether the batch lacks depth or each sample does.
    objective = tiny_objective(
        inputs=("rgb", "depth"), outputs=("depth", "rgb"), decoder=dict(name=decoder, width=16, depth=1, heads=4), num_visible=8
    )
    model, params = objective.model, fresh_params(objective)
    # Position and modality count for much in this test: fresh embeddings are small.
    for output in model.outputs:
        params["outputs"][output]["modality_embed"] = {name: x + 1 for name, x in params["outputs"][output]["modality_embed"].items()}
    batch = tiny_batch(2)
    batch["present"] = np.array([[1, 0]] * 2, bool)
    plan, predictions, _ = everything(objective)(params, on_device(batch), sample_keys(0, 0, 2))

    def without(params, batch):
        tokens = model.embed(params, objective.prepare(batch).values_of(("rgb",)))
        hidden = jnp.argsort(~plan.masked[:, :16], axis=1, stable=True)[:, :8]
        shorter = plan._replace(masked=plan.masked[:, :16], predicted_ids=hidden, predicted_valid=jnp.ones((2, 8), bool))
        return objective.reconstruct(params, tokens, shorter)

    alone = jax.jit(without)(params, on_device({"rgb": batch["rgb"]}))
    for name in ("rgb", "depth") if decoder != "mae" else ("depth",):  # MAE's decoder lets rgb attend to depth's mask tokens
        np.testing.assert_allclose(predictions[name], alone[name], rtol=1e-5, atol=1e-5, err_msg=name)


# Pixels without a value


def test_missing_depth_and_labels_count_nowhere(params):
    objective = tiny_objective(WITH_MISSING, **GUIDED)
    batch = tiny_batch(4)
    batch["depth"][0, :, :20] = np.nan  # whole tokens and parts of others
    batch["depth"][1] = np.nan
    batch["semseg"][2, :3] = -1
    keys = sample_keys(0, 0, 4)
    prepared = objective.prepare(on_device(batch))
    present = np.asarray(prepared.present)
    assert present[0, 16:32].sum() == 8 and not present[1, 16:32].any() and present[:, :16].all() and present[2, 32:].sum() == 12
    assert not np.asarray(prepared.values["depth"])[np.isnan(batch["depth"])].any()
    plan, predictions, sums = everything(objective)(params, on_device(batch), keys)
    assert not np.asarray(~plan.masked & ~present).any()
    assert sums["depth"][1] <= 3

    predicted = np.asarray(predicted_mask(plan))
    means = []
    for i in range(4):
        target = np.asarray(prepared.values["depth"])[i, :, :, 0].reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64)
        valid = ~np.isnan(batch["depth"][i, :, :, 0]).reshape(4, 8, 4, 8).transpose(0, 2, 1, 3).reshape(16, 64) & predicted[i, 16:32, None]
        if valid.any():
            means.append(np.abs(np.asarray(predictions["depth"])[i, :, :, 0] - target)[valid].mean())
    np.testing.assert_allclose(sums["depth"][0], sum(means), rtol=1e-5)
    assert sums["depth"][1] == len(means)

    _, grads = loss_and_gradients(objective)(params, on_device(batch), keys)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_losses_are_taken_on_hidden_tokens_alone(params):
    objective = tiny_objective(outputs=("rgb",))
    batch, keys = on_device(tiny_batch(3)), sample_keys(0, 0, 3)
    plan, predictions, sums = everything(objective)(params, batch, keys)
    error = np.square(np.asarray(predictions["rgb"]) - objective.target("rgb", objective.prepare(batch))).mean(axis=(2, 3))
    hidden = np.asarray(plan.masked)[:, :16]
    np.testing.assert_allclose(sums["rgb"][0], sum(error[i, hidden[i]].mean() for i in range(3)), rtol=1e-5)
    assert sums["rgb"][1] == 3


def test_an_output_that_is_not_an_input_is_predicted_everywhere():
    objective = tiny_objective(inputs=("rgb",), outputs=("depth",), num_visible=4)
    params = fresh_params(objective)
    batch = on_device(tiny_batch(3))
    _, predictions, sums = everything(objective)(params, batch, sample_keys(0, 0, 3))
    error = np.abs(np.asarray(predictions["depth"]) - objective.target("depth", objective.prepare(batch)))
    np.testing.assert_allclose(sums["depth"][0], error.mean(axis=(1, 2, 3)).sum(), rtol=1e-5)


# Plans through the objective


def test_guided_plans_hide_the_most_attended_and_share_the_random_budget(params):
    objective, plain = tiny_objective(**GUIDED), tiny_objective()
    batch, keys = on_device(tiny_batch(8)), sample_keys(0, 0, 8)
    plan, counts = jax.jit(objective.plan)(params, batch, keys)
    random_plan, _ = jax.jit(plain.plan)(params, batch, keys)
    tokens = objective.model.embed(params, objective.prepare(batch).values_of(objective.model.inputs))
    guidance = np.asarray(
        jax.jit(lambda p, t: self_attention(objective.model, p, TokenBatch(t, tokens.layout), "mean"))(params, tokens.tokens)
    )
    for span in tokens.layout.spans():
        masked = np.asarray(plan.masked[:, span])
        np.testing.assert_array_equal(masked.sum(axis=1), np.asarray(random_plan.masked[:, span]).sum(axis=1))
        for i in range(8):
            if masked[i].any() and not masked[i].all():
                assert guidance[i, span][masked[i]].min() >= guidance[i, span][~masked[i]].max() * (1 - 1e-5)
    assert {name: float(count) for name, count in counts.items()} == {name: 8.0 for name in objective.model.outputs}


def test_a_given_plan_is_the_loss_of_that_plan(params):
    objective = tiny_objective(**GUIDED)
    batch, keys = on_device(tiny_batch(4)), sample_keys(0, 0, 4)
    plan, counts = jax.jit(objective.plan)(params, batch, keys)
    own = jax.jit(lambda p: objective.loss(p, (), batch, keys, jnp.int32(0))[0])(params)
    given = jax.jit(lambda p: objective.loss(p, (), batch, keys, jnp.int32(0), plan, counts)[0])(params)
    np.testing.assert_allclose(given, own, rtol=1e-6)


# Features and pictures


def test_features_are_means_over_the_tokens_a_sample_has(params):
    objective = tiny_objective()
    batch = on_device(tiny_batch(4))
    features = jax.jit(lambda p, b: objective.predict(p, (), b))(params, batch)
    assert {name: value.shape for name, value in features.items()} == {"mean": (4, 48), "global": (4, 48)}
    tokens = objective.model.embed(params, objective.prepare(batch.only(("rgb",))).values_of(("rgb",)))
    encoded = np.asarray(objective.model.encode(params, tokens.tokens))
    np.testing.assert_allclose(features["mean"], encoded[:, :16].mean(axis=1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features["global"], encoded[:, 16], rtol=1e-4, atol=1e-5)
    by_name = objective.predict(params, (), dict(batch.values))  # arrays by name, as people have them
    np.testing.assert_allclose(by_name["mean"], features["mean"], rtol=1e-4, atol=1e-5)
    three = objective.predict(params, (), batch, inputs=("rgb", "depth", "semseg"))
    assert not np.allclose(three["mean"], features["mean"])


def test_pictures_are_in_stored_units(params):
    objective = tiny_objective(**GUIDED)
    batch = on_device(tiny_batch(2))
    seen = jax.jit(lambda p, b: objective.visualize(p, (), b, sample_keys(0, 0, 2)))(params, batch)
    assert {name: value.shape for name, value in seen["masked"].items()} == {name: (2, 4, 4) for name in ("rgb", "depth", "semseg")}
    np.testing.assert_array_equal(sum(np.asarray(~value).sum(axis=(1, 2)) for value in seen["masked"].values()), [12, 12])
    assert all(value.shape == (2, 4, 4) and (np.asarray(value) >= 0).all() for value in seen["guidance"].values())
    for name, value in seen["inputs"].items():
        np.testing.assert_array_equal(value, batch.values[name])
    shapes = {name: value.shape for name, value in seen["reconstructions"].items()}
    assert shapes == {"rgb": (2, 32, 32, 3), "norm_rgb": (2, 32, 32, 3), "depth": (2, 32, 32, 1), "semseg": (2, 8, 8)}
    # Normalized outputs borrow mean and deviation of their target: even an untrained one is in its range.
    for name in ("norm_rgb", "depth"):
        stored = np.asarray(batch.values[name.removeprefix("norm_")], float)
        assert abs(np.asarray(seen["reconstructions"][name]).mean() - stored.mean()) < 2 * stored.std(), name
    assert np.asarray(seen["reconstructions"]["semseg"]).max() < 7


# Config mistakes

MISTAKES = [
    (dict(name="beit"), "config.objective.name is 'beit'; known: multimae, mae"),
    (dict(num_visibel=3), "config.objective has unknown key 'num_visibel'"),
    (dict(inputs=("rgb", "thermal")), "inputs names 'thermal'; declared in config.modalities: rgb, depth, semseg"),
    (dict(outputs=("thermal",)), "outputs names 'thermal'; known: rgb, depth, semseg, or norm_"),
    (dict(outputs=("norm_semseg",)), "classes of 'semseg' cannot be normalized"),
    (dict(inputs=()), "must name at least one modality"),
    (dict(encoder="XL"), "config.objective.encoder is 'XL'"),
    (dict(encoder=dict(width=50, depth=2, heads=5)), "encoder.width 50 must divide by its 5 heads and by 4"),
    (dict(encoder=dict(width=48, depth=2, heads=3, dropout=0.1)), "encoder has unknown key 'dropout'"),
    (dict(decoder=dict(width=16, heads=3)), "decoder.width 16 must divide by its 3 heads"),
    (dict(num_visible=48), "num_visible is 48, but an image of .* has 48 tokens"),
    (dict(num_visible=0), "at least one must be visible"),
    (dict(scores=dict(name="attention_high")), "needs config.objective.guidance, one of: self_attention"),
    (dict(guidance=dict(name="self_attention")), "scores 'random' do not use it"),
    (dict(scores=dict(name="entropy")), "config.objective.scores.name is 'entropy'; known: random, "),
    (dict(scores=dict(name="random", noise=1)), "config.objective.scores has unknown key 'noise'"),
    (dict(budget=dict(name="dirichlet", alphas=(1.0, 1.0))), "alphas has 2 values for 3 modalities"),
    (dict(budget=dict(alphas=1.0)), "config.objective.budget lacks the key 'name'"),
    (dict(compute_dtype="float16"), "compute_dtype is 'float16'; known: float32, bfloat16"),
]


@pytest.mark.parametrize("change,message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_objective(**change)


def test_a_grid_that_does_not_divide_is_named():
    with pytest.raises(ValueError, match="image height 36 is not a multiple of modality 'rgb''s patch 8"):
        build_objective({**tiny_config(), "image_size": (36, 32)})


def test_objectives_are_hashable_and_equal_by_value():
    assert hash(tiny_objective(**GUIDED)) == hash(tiny_objective(**GUIDED)) and tiny_objective() == tiny_objective()
    lists = tiny_objective(budget=dict(name="dirichlet", alphas=[1.0, 2.0, 0.5]))
    assert hash(lists) and lists != tiny_objective()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {k: v for k, v in b.items() if k != "depth"}, "the batch lacks the modality 'depth', which the output 'depth'"),
        (lambda b: {**b, "rgb": b["rgb"].transpose(0, 3, 1, 2)}, r"\['rgb'\] has shape \(2, 3, 32, 32\); .* 3\): channels come last"),
        (lambda b: {**b, "rgb": b["rgb"][..., :2]}, r"\['rgb'\] has shape \(2, 32, 32, 2\); it must be \(batch, height, width, 3\)"),
        (lambda b: {**b, "depth": b["depth"][..., 0]}, r"\['depth'\] has shape \(2, 32, 32\); it must be \(batch, height, width, 1\)"),
        (lambda b: {**b, "rgb": b["rgb"][:, :30]}, r"\['rgb'\] is 30 x 32 pixels, which do not divide into tokens of 8 x 8"),
        (lambda b: {**b, "rgb": b["rgb"][:, :0]}, r"\['rgb'\] is 0 x 32 pixels"),
        (lambda b: {**b, "semseg": b["semseg"][:, :7]}, r"\['semseg'\] is 7 x 8 pixels, which do not divide into tokens of 2 x 2"),
        (lambda b: {**b, "semseg": b["semseg"].astype(np.float32)}, r"\['semseg'\] is float32 of shape .*; class ids are integers"),
        (lambda b: {**b, "semseg": b["semseg"][..., None]}, r"\['semseg'\] is int32 of shape \(2, 8, 8, 1\); class ids are integers"),
        (lambda b: {"normals": b["rgb"]}, "the batch has none of the modalities rgb, depth, semseg; it has normals"),
    ],
)  # fmt: skip
def test_batches_of_another_form_are_named(params, change, message):
    objective, keys = tiny_objective(), sample_keys(0, 0, 2)
    batch = on_device(change(tiny_batch(2)))
    for function in (
        lambda: objective.loss(params, (), batch, keys, jnp.int32(0)),
        lambda: objective.plan(params, batch, keys),
        lambda: objective.visualize(params, (), batch, keys),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(function)


def test_embedding_compiles(params):
    """What `jit` gives back holds the token layout, which is no array."""
    objective = tiny_objective()
    values = objective.prepare(on_device(tiny_batch(2))).values
    tokens = jax.jit(objective.model.embed)(params, values)
    assert tokens.layout == objective.model.layout and tokens.tokens.shape == (2, 48, 48)
    assert jax.jit(lambda t: t.tokens.sum())(tokens).shape == ()
