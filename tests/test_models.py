"""The network: sizes of every variant, initial values, grids, attention that stops early, tokens that do not exist."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODALITIES, fresh_params, on_device, tiny_batch, tiny_config, tiny_objective

from maskvit.core.modalities import DEPTH, RGB, SEMSEG
from maskvit.core.patches import sincos_position_table
from maskvit.core.types import TokenBatch, tree_paths
from maskvit.masking.plan import show_all
from maskvit.nn.attention import attention_weights
from maskvit.nn.backbone import VARIANTS, count_parameters, encoder_sizes
from maskvit.nn.encoder import Encoder
from maskvit.objectives import build_objective

# (all values, trainable values) with rgb, depth and semseg at 224 and their four decoders. B and L are the reference's.
PINNED = {
    "Ti": (16_742_800, 16_429_200),
    "S": (33_401_488, 32_974_992),
    "B": (98_569_360, 97_917_072),
    "L": (316_762_256, 315_959_440),
    "H": (645_068_944, 644_115_600),
}


def full_size(encoder, **objective):
    """MultiMAE at 224 with the reference's modalities and decoders."""
    names = ("rgb", "depth", "semseg")
    block = dict(name="multimae", inputs=names, outputs=(*names, "norm_rgb"), encoder=encoder, **objective)
    return build_objective(dict(image_size=(224, 224), modalities=dict(rgb=RGB, depth=DEPTH, semseg=SEMSEG), objective=block))


def shapes_of(objective):
    return jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))


def by_hand(width: int, depth: int) -> tuple[int, int]:
    """The same two numbers from the architecture's description."""

    def block(d):
        return 2 * 2 * d + (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d)

    inputs = (768 * width + width) + (256 * width + width) + (133 * 64 + 4 * 4 * 64 * width + width)
    tables = 3 * 196 * width + 4 * 196 * 256
    d = 256
    decoder = d + 3 * d + (width * d + d) + 3 * 2 * d + (d * d + d) + (2 * d * d + 2 * d) + (d * d + d) + (8 * d * d + 5 * d) + 2 * block(d)
    heads = sum(d * k + k for k in (768, 256, 133 * 16, 768))
    trainable = inputs + width + depth * block(width) + 4 * decoder + heads
    return trainable + tables, trainable


def test_no_variant_is_unpinned():
    assert set(VARIANTS) == set(PINNED)


@pytest.mark.parametrize("variant", sorted(PINNED))
def test_parameter_counts(variant):
    assert count_parameters(shapes_of(full_size(variant))) == PINNED[variant]
    assert by_hand(VARIANTS[variant]["width"], VARIANTS[variant]["depth"]) == PINNED[variant]


@pytest.fixture(scope="module")
def fresh():
    """Initial values at B's widths with one encoder block."""
    objective = full_size(dict(width=768, depth=1, heads=12))
    params = jax.jit(lambda key: objective.init(key)[0])(jax.random.key(0))
    return {name: np.asarray(value) for name, value in tree_paths(params).items()}


UNIFORM = {
    "inputs/rgb/proj/kernel": 0.0625,
    "inputs/depth/proj/kernel": 0.07655,
    "inputs/semseg/proj/kernel": 0.05786,
    "inputs/rgb/proj/bias": 1 / 768**0.5,
    "inputs/depth/proj/bias": 1 / 16,
    "inputs/semseg/proj/bias": 1 / 32,
    "encoder/block_00/attn/qkv/kernel": 0.0625,
    "encoder/block_00/attn/proj/kernel": 0.0625,
    "encoder/block_00/mlp/fc1/kernel": (6 / (768 + 3072)) ** 0.5,
    "encoder/block_00/mlp/fc2/kernel": (6 / (768 + 3072)) ** 0.5,
    "outputs/rgb/context_proj/kernel": (6 / (768 + 256)) ** 0.5,
    "outputs/depth/cross_attn/q/kernel": 0.10825,
    "outputs/depth/cross_attn/kv/kernel": 0.10825,
    "outputs/semseg/cross_attn/proj/kernel": 0.10825,
    "outputs/norm_rgb/block_01/attn/qkv/kernel": 0.10825,
    "outputs/norm_rgb/mlp/fc1/kernel": (6 / (256 + 1024)) ** 0.5,
    "outputs/semseg/head/kernel": (6 / (256 + 2128)) ** 0.5,
}


@pytest.mark.parametrize("name,bound", UNIFORM.items())
def test_initial_ranges(fresh, name, bound):
    values = fresh[name]
    assert values.dtype == np.float32
    assert 0.985 * bound < np.abs(values).max() <= bound * 1.0002
    np.testing.assert_allclose(values.std(), bound / 3**0.5, rtol=0.06)
    assert abs(values.mean()) < bound / 3**0.5 * 5 / values.size**0.5


def test_initial_constants_and_embeddings(fresh):
    for name, values in fresh.items():
        if name.endswith("/bias") and not (name.startswith("inputs/") and "/proj/" in name):
            assert not values.any(), name
        elif name.endswith("/scale"):
            assert (values == 1).all(), name
        elif name.endswith("/mask_token"):
            assert not values.any(), name
        elif "modality_embed/" in name or name.endswith("class_embed") or name == "global_tokens":
            np.testing.assert_allclose(values.std(), 0.02, rtol=0.16)  # 256 values: standard error 4.4 %
            assert abs(values.mean()) < 0.02 * 5 / values.size**0.5, name
        elif name.endswith("pos_embed"):
            np.testing.assert_array_equal(values, sincos_position_table((14, 14), values.shape[-1]), name)
        else:
            assert name.endswith("/kernel") or name.startswith("inputs/"), name
    assert not np.array_equal(fresh["outputs/rgb/mlp/fc1/kernel"], fresh["outputs/norm_rgb/mlp/fc1/kernel"])


def test_blocks_start_different_and_the_seed_decides():
    objective = tiny_objective()
    one, again, other = (tree_paths(fresh_params(objective, seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        np.testing.assert_array_equal(value, again[name])
    assert not np.array_equal(one["encoder/block_00/attn/qkv/kernel"], one["encoder/block_01/attn/qkv/kernel"])
    assert not np.array_equal(one["encoder/block_00/attn/qkv/kernel"], other["encoder/block_00/attn/qkv/kernel"])


# Attention


def encoder_and_params(depth: int = 3, width: int = 16):
    encoder = Encoder(width=width, depth=depth, heads=2)
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, width)), jnp.float32)
    return encoder, encoder.init(jax.random.key(0), tokens), tokens


def test_masked_keys_get_no_attention_and_the_rest_is_a_softmax():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((2, 3, n, 8)), jnp.float32) for n in (4, 6))
    mask = np.ones((2, 6), bool)
    mask[0, 2:4] = mask[1, 0] = False
    weights = np.asarray(attention_weights(q, k, jnp.asarray(mask)))
    assert not weights[0, :, :, 2:4].any() and not weights[1, :, :, 0].any()
    exact = np.exp(np.einsum("baqe,bane->baqn", np.asarray(q, float), np.asarray(k, float)) / 8**0.5) * mask[:, None, None, :]
    np.testing.assert_allclose(weights, exact / exact.sum(axis=-1, keepdims=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("block", [0, 1, -1])
def test_attention_of_a_block_is_that_of_the_whole_pass(block):
    encoder, params, tokens = encoder_and_params()
    maps = jax.jit(lambda p, x: encoder.apply(p, x, method=Encoder.attentions))(params, tokens)
    for queries in (slice(None), slice(8, None)):
        one = jax.jit(lambda p, x, s=queries: encoder.apply(p, x, s, block, method=Encoder.attention))(params, tokens)
        np.testing.assert_allclose(one, maps[block][:, :, queries], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.asarray(maps[block]).sum(axis=-1), 1, rtol=1e-5)


def test_features_are_what_leaves_each_block_and_branches_are_honored_in_all():
    encoder, params, tokens = encoder_and_params()
    run = jax.jit(lambda p, x, b: encoder.apply(p, x, (0, 1, 3), None, b, method=Encoder.features))
    branches = jnp.ones((3, 2, 2)).at[0, :, 0].set(0.0).at[2].set(0.0)  # of sample 0 block 1 alone has branches, of sample 1 blocks 0 and 1
    first, second, last = run(params, tokens, branches)
    np.testing.assert_array_equal(first, tokens)
    np.testing.assert_array_equal(second[0], tokens[0])
    whole = jax.jit(lambda p, x, b: encoder.apply(p, x, None, b))(params, tokens, branches)
    np.testing.assert_allclose(last, whole, rtol=1e-6, atol=1e-6)
    plain = jax.jit(lambda p, x: encoder.apply(p, x, (1, 2), method=Encoder.features))(params, tokens)
    np.testing.assert_allclose(second[1], plain[0][1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(last[1], plain[1][1], rtol=1e-5, atol=1e-6)


def matrix_products(function, *arguments) -> int:
    """Matrix products in a function's trace, those inside nested calls included."""

    def count(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            total += equation.primitive.name == "dot_general"
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    total += count(inner)
        return total

    return count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_nothing_of_the_last_block_beyond_its_attention_is_computed():
    encoder, params, tokens = encoder_and_params(depth=3)
    whole = matrix_products(lambda p, x: encoder.apply(p, x), params, tokens)
    stopped = matrix_products(lambda p, x: encoder.apply(p, x, slice(None), -1, method=Encoder.attention), params, tokens)
    # A block: qkv, logits, values, projection, two of the MLP. Its attention alone: queries, keys, logits.
    assert whole == 3 * 6 and stopped == 2 * 6 + 3


def test_absent_tokens_are_never_attended_to():
    encoder, params, tokens = encoder_and_params()
    mask = jnp.asarray([[True] * 6 + [False] * 3, [True] * 9])
    other = tokens.at[0, 6:].set(100.0)
    run = jax.jit(lambda x: encoder.apply(params, x, mask))
    np.testing.assert_array_equal(run(tokens)[0, :6], run(other)[0, :6])
    alone = jax.jit(lambda x: encoder.apply(params, x))(tokens[:1, :6])
    np.testing.assert_allclose(run(tokens)[:1, :6], alone, rtol=1e-5, atol=1e-5)


# Grids


def embedded(objective, batch):
    """(params, tokens) of a fresh model on a host batch."""
    params = fresh_params(objective)
    values = jax.jit(lambda b: objective.prepare(b).values_of(objective.model.inputs))(on_device(batch))
    tokens = jax.jit(lambda p, v: objective.model.embed(p, v).tokens)(params, values)
    return params, TokenBatch(tokens, objective.model.layout_of(values))


@pytest.mark.parametrize("image", [(32, 32), (48, 32), (16, 40)])
def test_other_grids_than_the_tables_run(image):
    objective = tiny_objective()
    params, tokens = embedded(objective, tiny_batch(2, image=image))
    rows, columns = image[0] // 8, image[1] // 8
    assert tokens.layout.grids == ((rows, columns),) * 3
    plan = show_all(tokens.layout, 2)
    predictions = jax.jit(lambda p: objective.reconstruct(p, tokens, plan))(params)
    assert {name: value.shape for name, value in predictions.items()} == {
        "rgb": (2, rows * columns, 64, 3),
        "norm_rgb": (2, rows * columns, 64, 3),
        "depth": (2, rows * columns, 64, 1),
        "semseg": (2, rows * columns, 4, 7),
    }
    assert all(np.isfinite(value).all() for value in predictions.values())


def test_a_non_square_model_has_non_square_tables():
    config = {**tiny_config(), "image_size": (32, 64)}
    objective = build_objective(config)
    shapes = tree_paths(shapes_of(objective))
    assert shapes["inputs/semseg/pos_embed"].shape == (4, 8, 48) and shapes["outputs/rgb/pos_embed"].shape == (4, 8, 16)
    params, tokens = embedded(objective, tiny_batch(1, image=(32, 64)))
    np.testing.assert_array_equal(params["inputs"]["rgb"]["pos_embed"], sincos_position_table((4, 8), 48))
    assert tokens.tokens.shape == (1, 96, 48)


def test_patches_may_differ_between_modalities():
    modalities = {**MODALITIES, "depth": {**MODALITIES["depth"], "patch": 16}}
    objective = tiny_objective(modalities, inputs=("rgb", "depth"), outputs=("rgb", "depth", "semseg"))
    batch = tiny_batch(2)
    params, tokens = embedded(objective, batch)
    assert tokens.layout.grids == ((4, 4), (2, 2))
    plan = show_all(tokens.layout, 2)
    predictions = jax.jit(lambda p: objective.reconstruct(p, tokens, plan))(params)
    # semseg is not an input: its grid follows the image.
    assert predictions["depth"].shape == (2, 4, 256, 1) and predictions["semseg"].shape == (2, 16, 4, 7)


def test_unknown_labels_embed_to_zero():
    objective = tiny_objective()
    batch = tiny_batch(2)
    batch["semseg"][:] = -1
    params, tokens = embedded(objective, batch)
    table, bias = params["inputs"]["semseg"]["pos_embed"], params["inputs"]["semseg"]["proj"]["bias"]
    np.testing.assert_allclose(tokens.tokens[0, 32:], table.reshape(16, 48) + bias, rtol=1e-6, atol=1e-6)


def test_several_global_tokens_come_last():
    objective = tiny_objective(num_global_tokens=3)
    params, tokens = embedded(objective, tiny_batch(2))
    assert jax.jit(objective.model.encode)(params, tokens.tokens).shape == (2, 51, 48)
    weights = jax.jit(lambda p: objective.model.attention(p, tokens, slice(48, None)))(params)
    assert weights.shape == (2, 3, 3, 51)


def test_encoder_sizes_by_name_or_block():
    assert encoder_sizes("B") == dict(width=768, depth=12, heads=12)
    assert encoder_sizes(dict(width=48, depth=2, heads=3)) == dict(width=48, depth=2, heads=3)
    with pytest.raises(ValueError, match="config.objective.encoder is 'G'; known: Ti, S, B, L, H"):
        encoder_sizes("G")
