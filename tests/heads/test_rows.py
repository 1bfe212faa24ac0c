"""The table of heads: sizes as published, what each reads, its options in a config, initial values."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_objective

from maskvit.core.types import tree_paths
from maskvit.heads import HEADS, head_options

NEW = {name: row for name, row in HEADS.items() if row.reads != "tokens"}
# Outputs and what else makes a small one.
SMALL = {
    "probe": dict(num_classes=5),
    "attentive": dict(num_classes=5, queries=8),
    "linear": dict(channels=5),
    "convnext": dict(channels=5, width=96, depth=1),
    "segmenter": dict(channels=5, width=32, depth=1, heads=2),
    "dpt": dict(channels=5, width=16, layer_dims=(4, 8, 12, 16)),
    "upernet": dict(channels=5, width=16, auxiliary_width=8),
}


def shapes(name, width, options, grid=(2, 2)):
    row = HEADS[name]
    return jax.eval_shape(lambda key: row.module(**options).init(key, *row.example(width, grid, 1)), jax.random.key(0))


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_every_row_is_tested():
    assert set(NEW) == set(SMALL)


@pytest.mark.parametrize(
    "name,width,options,size",
    [
        ("convnext", 768, dict(channels=150), 9_588_630),
        ("convnext", 768, dict(channels=40), 9_546_280),
        ("convnext", 2 * 768, dict(channels=40), 14_264_872),  # two main tasks
        ("convnext", 768, dict(channels=1, preds_per_patch=64), 5_041_633),  # of the depth script
        ("segmenter", 768, dict(channels=150), 30_238_764),
        # The reference's, less the residual unit that nothing reaches: two 3 x 3 convolutions of 256 channels.
        ("dpt", 768, dict(channels=1), 20_065_921 - 1_180_160),
        ("dpt", 768, dict(channels=150, form="segmentation"), 20_362_326 - 1_180_160),
        ("probe", 768, dict(num_classes=1000), 769_000),
        ("attentive", 768, dict(num_classes=1000), 1_383_400),
        ("attentive", 1024, dict(num_classes=1000), 2_106_344),
        ("attentive", 768, dict(num_classes=1000, pooling="capi"), 1_950_952),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, int)) else "-".join(map(str, value.values())),
)
def test_published_sizes(name, width, options, size):
    assert count(shapes(name, width, options)["params"]) == size


def test_size_of_upernet():
    """From its layers' description: convolutions without bias with a norm's two vectors each."""

    def layer(channels, features, side):
        return channels * features * side**2 + 2 * features

    d, up = 768, 4 * 768**2 + 768
    neck = 3 * up + 2 * d
    pooling = 4 * layer(d, d, 1) + layer(5 * d, d, 3)
    pyramid = 3 * layer(d, d, 1) + 3 * layer(d, d, 3) + layer(4 * d, d, 3)
    heads = d * 150 + 150 + layer(d, 256, 3) + 256 * 150 + 150
    found = shapes("upernet", d, dict(channels=150))
    assert count(found["params"]) == neck + pooling + pyramid + heads
    assert count(found["statistics"]) == 2 * (13 * d + 256)


@pytest.mark.parametrize("name", sorted(NEW))
def test_outputs_are_float32(name):
    """Whatever the compute type, in training and not; parameters and statistics too, which keep their shapes."""
    row, module = HEADS[name], HEADS[name].module(dtype=jnp.bfloat16, **SMALL[name])
    *tokens, last = row.example(32, (3, 5), 1)
    size = (48, 70) if row.reads == "maps" else None
    inputs = (*tokens, size) if size else (*tokens, last)
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape[1:])).astype(jnp.bfloat16) if hasattr(x, "shape") else x, inputs)

    def run(key, *arrays):
        arguments = (arrays, size) if size else arrays
        variables = module.init(key, *arguments)
        options = dict(train=True, mutable=["statistics"], rngs={"dropout": key})
        trained, changed = module.apply(variables, *arguments, **options)
        return variables, module.apply(variables, *arguments), trained, changed

    arrays = batch[0] if size else batch
    variables, evaluated, trained, changed = jax.eval_shape(run, jax.random.key(0), *arrays)
    shape = (2, 48, 70, 5) if size else (2, 5)
    results = [evaluated, *(trained if name == "upernet" else [trained])]
    assert len(results) == (3 if name == "upernet" else 2)
    assert all((x.shape, x.dtype) == (shape, jnp.float32) for x in results)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    kept = variables.get("statistics", {})
    assert jax.tree.structure(kept) == jax.tree.structure(changed.get("statistics", {}))
    assert bool(kept) == row.statistics


def test_which_blocks_are_read():
    """Those of the references at 12 and 24 blocks; at every depth ascending and ending with the last."""
    assert HEADS["dpt"].layers(12) == (3, 6, 9, 12) and HEADS["dpt"].layers(24) == (6, 12, 18, 24)
    assert HEADS["upernet"].layers(12) == (4, 6, 8, 12) and HEADS["upernet"].layers(24) == (8, 12, 16, 24)
    for name, row in NEW.items():
        for depth in range(4, 65):
            layers = row.layers(depth)
            assert layers[0] >= 1 and layers[-1] == depth and sorted(set(layers)) == list(layers), (name, depth)
    with pytest.raises(ValueError, match="reads 4 blocks, but the encoder has 3"):
        HEADS["dpt"].layers(3)


@pytest.mark.parametrize(
    "block,message",
    [
        ({}, "config.head lacks the key 'name'"),
        (dict(name="head"), "config.head.name is 'head'; known: probe, attentive, linear"),
        (dict(name="convnext", channels=3), "config.head has unknown key 'channels'; known: width, preds_per_patch, depth$"),
        (dict(name="convnext", preds_per_patch=8), "config.head.preds_per_patch is 8; it must be a square"),
        (dict(name="convnext", width=100), "config.head.width 100 must be at least 1 and divide by preds_per_patch 16"),
        (dict(name="convnext", depth=-1), "config.head.depth is -1"),
        (dict(name="segmenter", heads=5), "config.head.width 768 must divide by its 5 heads"),
        (dict(name="dpt", form="depth"), "config.head.form is 'depth'; it must be 'regression' or 'segmentation'"),
        (dict(name="dpt", layer_dims=(1, 2, 3)), "config.head.layer_dims is"),
        (dict(name="dpt", width=25), "config.head.width is 25; it must be even"),
        (dict(name="upernet", dropout=1.0), "config.head.dropout is 1.0"),
        (dict(name="upernet", pools=()), r"config.head.pools is \(\)"),
        (dict(name="upernet", auxiliary_width=0), "config.head.auxiliary_width is 0"),
        (dict(name="linear", norm="layer"), "config.head.norm is 'layer'; it must be 'none' or 'batch' or 'batch_affine'"),
        (dict(name="probe"), "config.head.source is 'global', but the model has no global token: set it to 'mean'"),
        (dict(name="attentive", queries=7), "config.head: the tokens' width 48 must divide by queries 7 times d_out 1"),
        (dict(name="attentive", queries=0), "config.head.queries is 0; it must be at least 1"),
        (dict(name="attentive", pooling="capi", queries=4), "config.head.queries is 4, but the pooling 'capi' has none: leave it out"),
        (dict(name="attentive", pooling="capi"), "config.head: the tokens' width 48 must divide by 64"),
        (dict(name="attentive", queries=4, all_tokens=True), "config.head.all_tokens is True, but the model has no global token"),
    ],
    ids=lambda value: value.get("name", "none") if isinstance(value, dict) else "",
)
def test_options_that_cannot_be(block, message):
    with pytest.raises(ValueError, match=message):
        head_options("config.head", block, 48, 0)


@pytest.mark.parametrize("name", sorted(NEW))
def test_options(name):
    """The defaults are not repeated, lists become tuples, and what is given makes the module."""
    options = {key: value for key, value in SMALL[name].items() if key not in ("channels", "num_classes")}
    block = {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()}
    assert head_options("config.head", dict(name=name, **block), 32, 1) == (name, tuple(sorted(options.items())))


def test_networks_initialize_them():
    """Beside the rows that were there before, under their own names."""
    model = tiny_objective().model
    depth, width = dict(model.encoder)["depth"], model.width
    assert depth >= 1
    heads = tuple((name, tuple(SMALL[name].items())) for name in sorted(NEW))
    params = jax.eval_shape(dataclasses.replace(model, heads=(("head", (("num_classes", 3),)), *heads)).init, jax.random.key(0))
    assert params["head"]["kernel"].shape == (width, 3)
    for name in NEW:
        alone = shapes(name, width, SMALL[name])["params"]
        assert {k: x.shape for k, x in tree_paths(params[name]).items()} == {k: x.shape for k, x in tree_paths(alone).items()}


def test_initial_values():
    """Linear layers Xavier, convolutions as PyTorch's, embeddings and classifiers normal; a few of each kind."""

    def values(name, width, options):
        row = HEADS[name]
        # Compiled, so that nothing but the values is computed.
        init = jax.jit(lambda key: row.module(**options).init(key, *row.example(width, (2, 2), 1))["params"])
        return tree_paths(init(jax.random.key(0)))

    def uniform(value, bound):
        assert 0.8 * bound < abs(value).max() <= bound

    convnext = values("convnext", 32, SMALL["convnext"])
    uniform(convnext["proj/kernel"], math.sqrt(6 / (32 + 96)))
    uniform(convnext["block_00/pwconv1/kernel"], math.sqrt(6 / (6 + 24)))
    uniform(convnext["block_00/dwconv/kernel"], 1 / 7)
    uniform(convnext["head/kernel"], 1 / math.sqrt(6))
    assert not convnext["proj/bias"].any() and convnext["head/bias"].any()
    segmenter = values("segmenter", 32, dict(channels=50, width=32, depth=1, heads=2))
    uniform(segmenter["block_00/attn/qkv/kernel"], math.sqrt(6 / (32 + 32)))  # as three layers
    np.testing.assert_allclose(segmenter["class_tokens"].std(), 0.02, rtol=0.1)
    upernet = values("upernet", 32, dict(channels=50, width=32))
    np.testing.assert_allclose(upernet["pyramid_1/conv/kernel"].std(), math.sqrt(2 / (32 * 9)), rtol=0.1)
    for name, params, path, deviation in (
        ("upernet", upernet, "head/conv/kernel", 0.01),
        ("linear", values("linear", 64, dict(channels=50)), "head/kernel", 0.01),
        ("probe", values("probe", 64, dict(num_classes=50)), "head/kernel", 0.01),
        ("capi", values("attentive", 64, dict(num_classes=50, pooling="capi")), "head/kernel", 0.02),
        ("capi", values("attentive", 64, dict(num_classes=50, pooling="capi")), "pooling/kv/kernel", 0.02),
    ):
        np.testing.assert_allclose(params[path].std(), deviation, rtol=0.1, err_msg=name)
        assert not params[path.replace("kernel", "bias")].any(), name
    attentive = values("attentive", 64, dict(num_classes=50))
    np.testing.assert_allclose(attentive["pooling/queries"].std(), 0.02, rtol=0.1)
    for path in ("pooling/v/kernel", "head/kernel", "head/bias"):
        uniform(attentive[path], 1 / 8)
