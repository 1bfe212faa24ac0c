"""MAE and CrossMAE: how many tokens are shown and rebuilt, sizes, arithmetic, independent queries, several modalities, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODALITIES, fresh_params, on_device, tiny_batch, tiny_objective

from configs import common
from maskvit.core import flops
from maskvit.core.keys import sample_keys
from maskvit.core.modalities import RGB
from maskvit.core.types import Queries, TokenBatch, tree_paths
from maskvit.heads.crossmae import crossmae_features
from maskvit.masking.plan import predicted_mask
from maskvit.nn.backbone import VARIANTS, count_parameters, frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim.transforms import decay_mask

SMALL_DECODER = dict(width=256, heads=8)
# (all values, trainable values): the references' tables. Theirs have a row of zeros for the class token in both position tables.
MAE_PINNED = {
    "B": (111_907_840, 111_655_680),
    "L": (329_541_888, 329_239_296),
    "H": (657_074_508, 656_613_964),
}
CROSSMAE_PINNED = {
    "S": (32_186_396, 32_060_316),
    "B": (127_286_428, 127_034_268),
    "L": (347_940_908, 347_638_316),
    "H": (678_493_912, 678_033_368),
}
# Multiply-accumulates of one image, in G: encoder, MAE's decoder, CrossMAE's (12 blocks, kept 0.25; 12, 0.75; 8, 0.25).
ARITHMETIC = {
    "S": (1.14, 1.44, 0.53, 1.35, 0.36),
    "B": (4.41, 5.37, 2.07, 5.25, 1.39),
    "L": (15.4, 5.38, 2.24, 5.42, 1.50),
    "H": (41.4, 7.13, 3.14, 7.31, 2.10),
}


def full_size(name, variant, decoder=None, **objective):
    """An objective at 224 pixels; patches of 14 for H, MAE's narrower decoder for S."""
    rgb = dict(RGB, patch=14 if variant == "H" else 16)
    decoder = {**(SMALL_DECODER if variant == "S" else {}), **(decoder or {})}
    return build_objective(
        dict(image_size=224, modalities=dict(rgb=rgb), objective=dict(name=name, encoder=variant, decoder=decoder, **objective))
    )


def tiny(name="crossmae", modalities=None, **objective):
    """16 tokens of rgb (4 shown), encoder of 3 blocks, decoder of 2."""
    block = dict(encoder=dict(width=48, depth=3, heads=3), decoder=dict(width=32, depth=2, heads=4))
    block["decoder"] = {**block["decoder"], **objective.pop("decoder", {})}
    return build_objective(
        dict(image_size=32, modalities=modalities or dict(rgb=MODALITIES["rgb"]), objective=dict(name=name, **block, **objective))
    )


def params_of(objective):
    """Random parameters, without compiling the initial ones."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(0.2 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale"), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0)))


# Numbers of tokens, sizes, arithmetic


@pytest.mark.parametrize(
    ("ratios", "variant", "counts"),
    [
        ((0.75, 0.75), "B", (49, 147)),
        ((0.75, 0.5), "B", (49, 98)),
        ((0.75, 0.25), "B", (49, 49)),
        ((0.8, 0.2), "B", (39, 40)),  # 117 are neither shown nor rebuilt: truncated twice, it is not 39 / 118 / 39
        ((0.75, 0.25), "H", (64, 64)),
    ],
)
def test_tokens_shown_and_rebuilt(ratios, variant, counts):
    objective = full_size("crossmae", variant, mask_ratio=ratios[0], kept_mask_ratio=ratios[1])
    layout = objective.model.layout
    assert (objective.num_visible, objective.num_queries("norm_rgb", layout)) == counts
    tokens = jnp.zeros((3, layout.num_tokens, 1))

    def draw(keys):
        plan = objective.make_plan(TokenBatch(tokens, layout), None, keys)
        return plan, objective.queries(plan, layout)["norm_rgb"]

    plan, queries = jax.jit(draw)(sample_keys(0, 0, 3))
    assert (~plan.masked).sum(axis=1).tolist() == [counts[0]] * 3
    assert queries.ids.shape == (3, counts[1]) and queries.valid.all()
    for row in range(3):
        np.testing.assert_array_equal(queries.ids[row], np.flatnonzero(predicted_mask(plan)[row]))  # in raster order
        assert plan.masked[row, queries.ids[row]].all()
    assert not np.array_equal(queries.ids[0], queries.ids[1])


@pytest.mark.parametrize(
    ("name", "variant", "pinned"),
    [*(("mae", v, n) for v, n in MAE_PINNED.items()), *(("crossmae", v, n) for v, n in CROSSMAE_PINNED.items())],
)
def test_parameter_counts_are_the_references(name, variant, pinned):
    objective = full_size(name, variant)
    class_rows = objective.model.width + dict(objective.model.decoder)["width"]
    total, trainable = count_parameters(jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0)))
    assert (total + class_rows, trainable) == pinned


@pytest.mark.parametrize("variant", sorted(ARITHMETIC))
def test_arithmetic_of_encoder_and_decoders(variant):
    encoder, mae, *cross = ARITHMETIC[variant]
    model = full_size("mae", variant).model
    shown = full_size("mae", variant).num_visible
    assert (flops.embed_flops(model) + flops.encoder_flops(model, shown)) / 2e9 == pytest.approx(encoder, rel=0.02)
    assert flops.decoder_flops(model, "norm_rgb", shown) / 2e9 == pytest.approx(mae, rel=0.02)
    for (depth, kept), published in zip(((12, 0.25), (12, 0.75), (8, 0.25)), cross, strict=True):
        objective = full_size("crossmae", variant, dict(depth=depth), kept_mask_ratio=kept)
        queries = objective.num_queries("norm_rgb", objective.model.layout)
        assert flops.decoder_flops(objective.model, "norm_rgb", shown, queries) / 2e9 == pytest.approx(published, rel=0.02)
    saved = full_size("crossmae", variant).flops() - full_size("crossmae", variant, kept_mask_ratio=0.25).flops()
    assert saved == pytest.approx(3 * 2e9 * (cross[1] - cross[0]), rel=0.05)


def test_initial_values():
    sizes = dict(encoder=dict(width=384, depth=1, heads=6), decoder=dict(width=128, depth=3, heads=4))
    bound = lambda i, o: (6 / (i + o)) ** 0.5  # noqa: E731
    out = "outputs/norm_rgb"
    whole = {  # the fused kernel's own shape counts, unlike MultiMAE's
        "mae": {"encoder/block_00/attn/qkv": (384, 1152), f"{out}/block_02/attn/qkv": (128, 384), f"{out}/context_proj": (384, 128)},
        "crossmae": {"encoder/block_00/attn/qkv": (384, 1152), f"{out}/block_00/cross_attn/kv": (384, 256), f"{out}/head": (128, 192)},
    }
    for name, kernels in whole.items():
        objective = build_objective(dict(image_size=32, modalities=dict(rgb=MODALITIES["rgb"]), objective=dict(name=name, **sizes)))
        fresh = tree_paths(fresh_params(objective))
        for path, shape in kernels.items():
            values = np.asarray(fresh[f"{path}/kernel"])
            assert values.shape == shape and 0.98 * bound(*shape) < np.abs(values).max() <= bound(*shape), path
        np.testing.assert_allclose(np.asarray(fresh[f"{out}/mask_token"]).std(), 0.02, rtol=0.25)
        if name == "crossmae":
            weights = np.asarray(fresh[f"{out}/feature_weights"])
            assert weights.shape == (3, 2) and 0.3 < np.abs(weights).max() <= bound(3, 2)


# Queries


def decoded(objective, params, batch, plan, queries):
    """Predictions of one output for some queries, all tokens where None."""

    def run(params, queries):
        tokens = objective.model.embed(params, objective.prepare(batch).values)
        memory = objective.encode_visible(params, tokens, plan)
        return objective.model.decode(params, "norm_rgb", memory, plan, tokens.layout, False, queries)

    return np.asarray(jax.jit(run)(params, queries))


@pytest.mark.parametrize("self_attention", [False, True])
def test_a_query_depends_on_no_other_query(self_attention):
    objective = tiny(decoder=dict(self_attention=self_attention))
    params, batch = params_of(objective), on_device({"rgb": tiny_batch(2)["rgb"]})
    plan = jax.jit(lambda: objective.plan(params, batch, sample_keys(0, 0, 2))[0])()
    hidden = plan.predicted_ids
    alone = decoded(objective, params, batch, plan, Queries(hidden[:, 3:5], hidden[:, 3:5] >= 0))
    together = decoded(objective, params, batch, plan, Queries(hidden, hidden >= 0))
    whole = decoded(objective, params, batch, plan, None)
    same = np.allclose(alone, together[:, 3:5], rtol=1e-4, atol=1e-5)
    same_in_one_pass = np.allclose(together, np.take_along_axis(whole, np.asarray(hidden)[..., None], axis=1), rtol=1e-4, atol=1e-5)
    assert same == same_in_one_pass == (not self_attention)


def test_fillers_are_not_attended_to():
    objective = tiny(decoder=dict(self_attention=True))
    params, batch = params_of(objective), on_device({"rgb": tiny_batch(2)["rgb"]})
    plan = jax.jit(lambda: objective.plan(params, batch, sample_keys(0, 0, 2))[0])()
    few = plan.predicted_ids[:, :4]
    fillers = jnp.concatenate([few, plan.predicted_ids[:, 4:8]], axis=1)
    with_fillers = decoded(objective, params, batch, plan, Queries(fillers, jnp.arange(8)[None] < jnp.full((2, 1), 4)))
    np.testing.assert_allclose(with_fillers[:, :4], decoded(objective, params, batch, plan, Queries(few, few >= 0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [dict(weighted=False), dict(features=(0, -1), use_input=False), dict(features=(1,))])
def test_which_features_are_read(options):
    objective = tiny(decoder=options)
    shapes = tree_paths(jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0)))
    weights = shapes.get("outputs/norm_rgb/feature_weights")
    assert (None if weights is None else weights.shape) == (None if "weighted" in options else (2, 2))
    # The reference forgets this norm in its last-block variant, which cannot run there.
    assert {f"outputs/norm_rgb/context_norm_{i:02d}/scale" for i in range(2)} <= set(shapes)
    params, batch = params_of(objective), on_device({"rgb": tiny_batch(2)["rgb"]})
    gradients = jax.jit(jax.grad(lambda p: objective.loss(p, {}, batch, sample_keys(0, 0, 2), jnp.int32(0))[0]))(params)
    used = [bool(np.abs(x["attn"]["qkv"]["kernel"]).max() > 0) for _, x in sorted(gradients["encoder"].items())]
    assert used == ([True, True, False] if options.get("features") == (1,) else [True] * 3)


def test_features_by_number():
    assert crossmae_features(12, True) == tuple(range(13))
    assert crossmae_features(12, True, use_input=False) == tuple(range(1, 13))
    assert crossmae_features(12, True, (-1, 0, 5), False) == (1, 6, 12)
    assert crossmae_features(12, False) == (12,)


# Several modalities


@pytest.mark.parametrize("decoder", ["mae", "crossmae"])
def test_losses_of_a_multimae_with_these_decoders(decoder):
    """Decoding the predicted tokens alone leaves every sum and error as decoding all of them does; absent tokens count nowhere."""
    objective = tiny_objective(
        outputs=("rgb", "depth", "semseg", "norm_rgb"),
        decoder=dict(name=decoder, width=16, depth=1, heads=4),
        predicted=dict(share=0.4, by="random"),
        loss_weight=dict(tau=0.75),
        guidance=dict(name="self_attention"),
    )
    params, batch = params_of(objective), on_device(tiny_batch(8, present=True))

    def both(params):
        prepared = objective.prepare(batch)
        tokens = objective.model.embed(params, prepared.values_of(objective.model.inputs), prepared.present)
        plan, counts = objective.plan(params, batch, sample_keys(0, 0, 8))
        whole = objective.reconstruct(params, tokens, plan)
        queries = objective.queries(plan, tokens.layout)
        some = objective.decode(params, objective.encode_visible(params, tokens, plan), tokens, plan, queries)
        arguments = prepared, plan, tokens.layout
        sums = objective.loss_sums(whole, *arguments), objective.loss_sums(some, *arguments, queries)
        errors = objective.token_errors(whole, *arguments), objective.token_errors(some, *arguments, queries)
        return sums, errors, counts, {name: x.valid.sum(axis=1) for name, x in queries.items()}, predicted_mask(plan)

    sums, errors, counts, valid, predicted = jax.jit(both)(params)
    assert bool(valid) == (decoder == "crossmae")
    for name in objective.model.outputs:
        np.testing.assert_allclose(sums[1][name], sums[0][name], rtol=1e-5)
        assert sums[0][name][1] == counts[name]
        if valid:  # no predicted token is left out
            span = objective.model.layout.span(objective.model.modality(name).name)
            np.testing.assert_array_equal(valid[name], predicted[:, span].sum(axis=1))
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4, atol=1e-5)
    names = tree_paths(params)
    assert "outputs/depth/modality_embed/semseg" in names


@pytest.mark.parametrize("decoder", ["mae", "crossmae"])
def test_an_output_that_is_not_an_input_is_rebuilt_whole(decoder):
    objective = tiny_objective(
        inputs=("rgb",), outputs=("depth", "rgb"), num_visible=4, decoder=dict(name=decoder, width=16, depth=1, heads=4)
    )
    batch = on_device({name: x for name, x in tiny_batch(2).items() if name != "semseg"})
    params = params_of(objective)
    loss = jax.jit(lambda p: objective.loss(p, {}, batch, sample_keys(0, 0, 2), jnp.int32(0)))
    total, (_, metrics) = loss(params)
    assert np.isfinite(total) and metrics["loss/depth"][1] == 2
    pictures = jax.eval_shape(lambda p: objective.visualize(p, {}, batch, sample_keys(0, 0, 2)), params)
    assert pictures["reconstructions"]["depth"].shape == (2, 32, 32, 1)


def test_hard_patches_train_on_a_mae():
    """A teacher's copy holds the final norm too."""
    objective = tiny("mae", outputs=("rgb",), scores=dict(name="attention_high"), guidance=dict(name="predicted_error"))
    params, batch = params_of(objective), on_device({"rgb": tiny_batch(2)["rgb"]})
    state = jax.eval_shape(objective.init_state, params)
    assert "norm" in state["guidance"]
    value, _ = jax.eval_shape(lambda p, s: objective.loss(p, s, batch, sample_keys(0, 0, 2), jnp.int32(0)), params, state)
    assert value.shape == ()


# Bad input


@pytest.mark.parametrize(
    ("name", "objective", "message"),
    [
        ("multimae", dict(decoder=dict(name="cross")), "config.objective.decoder.name is 'cross'; known: spatial, mae, crossmae"),
        ("multimae", dict(decoder=dict(weighted=True)), "config.objective.decoder has unknown key 'weighted'; known: width"),
        ("multimae", dict(positions="diagonal"), "config.objective.positions is 'diagonal'; known: rows_first, columns_first"),
        ("multimae", dict(decoder=dict(name="crossmae"), final_norm=True), "config.objective.final_norm is True, but the crossmae decoder"),
        ("mae", dict(mask_ratio=0.99), "config.objective.mask_ratio is 0.99: of 16 tokens it shows 0"),
        ("mae", dict(mask_ratio=0.0), "config.objective.mask_ratio is 0.0: of 16 tokens it shows 16"),
        ("mae", dict(num_visible=4), "config.objective has unknown key 'num_visible'; known: inputs, outputs, mask_ratio"),
        ("mae", dict(inputs=("depth",)), "config.objective.inputs names 'depth'; declared in config.modalities: rgb"),
        ("mae", dict(decoder=dict(depth=0)), "config.objective.decoder.depth is 0; it must be at least 1"),
        ("crossmae", dict(kept_mask_ratio=0.8), "config.objective.kept_mask_ratio is 0.8: it is a share of all tokens"),
        ("crossmae", dict(decoder=dict(features=(3,))), "features names block 3, but the encoder has blocks 0 to 2"),
        ("crossmae", dict(decoder=dict(features="last")), "config.objective.decoder.features is 'last'; give 'all' or a list"),
        ("crossmae", dict(decoder=dict(features=(0, -3))), "name at least one encoder block, each once"),
        ("crossmae", dict(decoder=dict(weighted=False, use_input=True)), "config.objective.decoder.weighted is False"),
        ("crossmae", dict(predict_by="luck"), "config.objective.predicted.by is 'luck'; known: scores, random"),
    ],
)  # fmt: skip
def test_bad_input_is_named(name, objective, message):
    objective = dict(objective)
    if name == "multimae":
        objective = dict(inputs=("rgb",), outputs=("rgb",), num_visible=4, **objective)
    with pytest.raises(ValueError) as error:
        tiny(name, **objective)
    assert message in str(error.value)


def test_every_variant_has_published_sizes():
    assert set(VARIANTS) - {"Ti"} == set(CROSSMAE_PINNED)


# The optimizer


def test_weights_and_tokens_decay_as_in_the_references():
    config = common.crossmae("B", 0.25)
    assert config.optimizer.base_lr == pytest.approx(5e-5)  # 1.5e-4 x 0.25 / 0.75
    objective = build_objective(config.to_dict())
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    frozen = frozen_mask(shapes)
    decays = tree_paths(decay_mask(shapes, frozen, config.optimizer.no_decay))
    others = {name for name, decay in decays.items() if decay and not name.endswith("/kernel")}
    assert others == {"global_tokens", "outputs/norm_rgb/mask_token", "outputs/norm_rgb/feature_weights"}
    assert all(decay for name, decay in decays.items() if name.endswith("/kernel"))
