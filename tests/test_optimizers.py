"""SGD and LARS against their references, learning rates by depth and by name, and parameters frozen for a run."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import RANDOM, on_device, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys, step_key
from maskvit.core.types import tree_paths
from maskvit.nn.backbone import frozen_mask
from maskvit.optim import OPTIMIZERS, build_optimizer
from maskvit.optim.groups import layer_scales, rate_scales
from maskvit.optim.schedules import Cosine
from maskvit.training.config import default_config, optimizer_reader
from maskvit.training.step import gradients, init_state, train_step
from tests.runs import get_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def constant(step):
    return jnp.float32(0.1)


def draw(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


TREE = {"layer": {"kernel": draw((4, 3), 0), "bias": draw((3,), 1)}, "norm": {"scale": draw((3,), 2)}, "pos_embed": draw((2, 4), 3)}
FIXED = frozen_mask(TREE)


def after(optimizer, params, all_grads, rate):
    """Parameters after one update per gradient, and the optimizer's state."""
    state = optimizer.tx.init(params)
    for step, grads in enumerate(all_grads):
        updates, state = optimizer.tx.update(grads, state, params, step=jnp.int32(step))
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params, state


# Against the references


def test_lars_by_recorded_steps():
    """Three steps of the reference: lr 0.5, momentum 0.9, trust 0.001."""
    golden = np.load(FIXTURES / "lars.npz")
    params = {"kernel": golden["w0"].T, "bias": golden["b0"]}  # torch has (out, in)
    optimizer = build_optimizer(params, frozen_mask(params), constant, name="lars")
    for steps in (1, 2, 3):
        grads = [{"kernel": golden[f"gw{i}"].T, "bias": golden[f"gb{i}"]} for i in range(steps)]
        ours, _ = after(optimizer, params, grads, 0.5)
        np.testing.assert_allclose(ours["kernel"].T, golden[f"w{steps}"], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(ours["bias"], golden[f"b{steps}"], rtol=1e-6, atol=1e-7)


def test_lars_with_decay_and_where_a_norm_is_zero():
    params = {"kernel": draw((3, 2), 0), "zeros": np.zeros((2, 2), np.float32), "bias": draw((2,), 1)}
    grads = {"kernel": draw((3, 2), 2), "zeros": draw((2, 2), 3), "bias": draw((2,), 4)}
    optimizer = build_optimizer(params, frozen_mask(params), constant, name="lars", trust=0.02, weight_decay=0.3)
    ours, _ = after(optimizer, params, [grads], 0.5)
    g = grads["kernel"].astype(float) + 0.3 * params["kernel"]
    expected = params["kernel"] - 0.5 * g * 0.02 * np.linalg.norm(params["kernel"]) / np.linalg.norm(g)
    np.testing.assert_allclose(ours["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(ours["zeros"], -0.5 * grads["zeros"], rtol=1e-6)
    np.testing.assert_allclose(ours["bias"], params["bias"] - 0.5 * grads["bias"], rtol=1e-5, atol=1e-6)
    still, _ = after(optimizer, params, [jax.tree.map(np.zeros_like, grads)], 0.5)
    assert np.isfinite(still["zeros"]).all() and not np.asarray(still["zeros"]).any()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dict(name="sgd"), ("SGD", dict(momentum=0.9))),
        (dict(name="sgd", momentum=0.5, weight_decay=0.2), ("SGD", dict(momentum=0.5, weight_decay=0.2))),
        (dict(name="adamw", b2=0.999, weight_decay=0.2), ("AdamW", dict(betas=(0.9, 0.999), weight_decay=0.2))),
    ],
)
def test_updates_are_torchs(ours, theirs):
    """Four steps with a rate per tensor: what a group's own lr is in torch."""
    torch = pytest.importorskip("torch")
    scales = (("layer/.*", 3.0), (".*/bias", 0.5))
    optimizer = build_optimizer(TREE, FIXED, constant, lr_scales=scales, **ours)
    all_grads = [jax.tree.map(lambda x, i=i: draw(x.shape, 10 * i + x.size), TREE) for i in range(4)]
    params = tree_paths(after(optimizer, TREE, all_grads, 0.05)[0])
    name, options = theirs
    for path, factor in (("layer/kernel", 3.0), ("layer/bias", 1.5), ("norm/scale", 1.0)):
        parameter = torch.nn.Parameter(torch.from_numpy(tree_paths(TREE)[path].copy()))
        reference = getattr(torch.optim, name)([parameter], lr=0.05 * factor, **options)
        for grads in all_grads:
            parameter.grad = torch.from_numpy(tree_paths(grads)[path].copy())
            reference.step()
        np.testing.assert_allclose(params[path], parameter.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=path)  # 1 - 0.999 in float32
    np.testing.assert_array_equal(params["pos_embed"], TREE["pos_embed"])


def test_decay_of_sgd_spares_patterns():
    zeros = jax.tree.map(np.zeros_like, TREE)
    optimizer = build_optimizer(TREE, FIXED, constant, name="sgd", momentum=0.0, weight_decay=0.5, no_decay=(".*/bias",))
    params = tree_paths(after(optimizer, TREE, [zeros], 0.1)[0])
    for path, start in tree_paths(TREE).items():
        np.testing.assert_allclose(params[path], start * (0.95 if path in ("layer/kernel", "norm/scale") else 1), rtol=1e-6)


# Learning rates by depth


@functools.cache
def vit_b():
    """The parameters of a ViT-B with the decoders of MultiMAE, as shapes."""
    objective = tiny_objective(encoder=dict(width=768, depth=12, heads=12))
    return jax.eval_shape(objective.init, jax.random.key(0))[0]


@pytest.mark.parametrize(
    ("decay", "first", "block_0", "block_11"), [(0.75, 0.0237573, 0.0316764, 0.75), (0.65, 0.00369721, 0.00568801, 0.65)]
)
def test_scales_by_depth_at_their_published_values(decay, first, block_0, block_11):
    params = dict(
        vit_b(), global_pos_embed=vit_b()["global_tokens"], norm={"scale": jnp.ones(768)}, outputs={"head": {"bias": jnp.ones(5)}}
    )
    scales = tree_paths(layer_scales(params, 12, decay))
    assert scales.keys() == tree_paths(params).keys()
    expected = {f"block_{i:02d}": decay ** (12 - i) for i in range(12)}
    np.testing.assert_allclose([expected["block_00"], expected["block_11"]], [block_0, block_11], rtol=1e-5)
    for name, scale in scales.items():
        if name.startswith("encoder/"):
            assert scale == pytest.approx(expected[name.split("/")[1]], rel=1e-12), name
        elif name.startswith("inputs/") or name in ("global_tokens", "global_pos_embed"):
            assert scale == pytest.approx(first, rel=1e-5), name
        else:
            assert scale == 1 and name in ("norm/scale", "outputs/head/bias"), name


def test_scales_of_depth_and_of_names_multiply_and_decoders_are_behind_the_blocks():
    scales = tree_paths(rate_scales(vit_b(), 0.75, (("outputs/.*", 10.0), (".*bias", 2.0))))
    assert scales["outputs/rgb/block_00/attn/qkv/kernel"] == 10 and scales["outputs/rgb/head/bias"] == 20
    assert scales["encoder/block_11/mlp/fc1/bias"] == 1.5 and scales["encoder/block_11/mlp/fc1/kernel"] == 0.75
    assert rate_scales(vit_b(), None, ()) is None


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_scales_multiply_the_whole_update(name):
    """The decay too, in the references as here."""
    grads = jax.tree.map(lambda x: draw(x.shape, x.size), TREE)
    plain, _ = after(build_optimizer(TREE, FIXED, constant, name=name, weight_decay=0.3), TREE, [grads], 0.1)
    scaled, _ = after(
        build_optimizer(TREE, FIXED, constant, name=name, weight_decay=0.3, lr_scales=(("layer/.*", 10.0),)), TREE, [grads], 0.1
    )
    for path, start in tree_paths(TREE).items():
        factor = 10 if path.startswith("layer/") else 1
        moved, expected = (np.asarray(tree_paths(tree)[path]) - start for tree in (scaled, plain))
        np.testing.assert_allclose(moved, factor * expected, rtol=1e-3, atol=1e-6)


# Frozen for a run

FROZEN = ("inputs/.*", "global_tokens", "encoder/.*")


@functools.cache
def frozen_run(name, micro_batches=1):
    """(objective, state before, state after two steps, the metrics of each) with a frozen encoder."""
    objective = tiny_objective(outputs=("rgb", "semseg"), encoder=dict(width=48, depth=1, heads=3), **RANDOM)
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = build_optimizer(shapes, frozen_mask(shapes), Cosine(1e-2, 100), name=name, weight_decay=0.5, frozen=FROZEN)
    state = before = init_state(objective, optimizer, 0)
    step = jax.jit(functools.partial(train_step, objective=objective, optimizer=optimizer, seed=0, micro_batches=micro_batches))
    metrics = []
    for seed in (0, 1):
        state, of_step = step(state, on_device(tiny_batch(8, seed=seed)))
        metrics.append(of_step)
    return objective, before, state, metrics


def is_frozen(path):
    return path.startswith(("inputs/", "global_tokens", "encoder/"))


@pytest.mark.parametrize(("name", "micro_batches"), [("adamw", 2), ("sgd", 1), ("lars", 1)])
def test_frozen_parameters_keep_every_bit_and_have_no_state(name, micro_batches):
    _, before, after, metrics = frozen_run(name, micro_batches)
    assert [float(of_step["skipped"][0]) for of_step in metrics] == [0, 0]
    for path, start in tree_paths(before.params).items():
        same = np.asarray(tree_paths(after.params)[path]).tobytes() == np.asarray(start).tobytes()
        assert same == (is_frozen(path) or path.endswith("pos_embed")), path
    kept = [path for path in tree_paths(after.opt_state) if "outputs/" in path]
    trained = [path for path in tree_paths(before.params) if not is_frozen(path) and not path.endswith("pos_embed")]
    assert len(kept) == len(trained) * (2 if name == "adamw" else 1)
    assert not [path for path in tree_paths(after.opt_state) if any(f"/{part}" in path for part in ("encoder", "inputs", "global_tokens"))]


def test_the_gradient_norm_leaves_frozen_parameters_out():
    objective, before, _, metrics = frozen_run("adamw", 2)
    everything = jax.jit(lambda state, batch: gradients(state, batch, sample_keys(0, 0, 8), step_key(0, 0), objective, 1)[1])
    grads = tree_paths(everything(before, on_device(tiny_batch(8, seed=0))))
    trained = {path: grad for path, grad in grads.items() if not is_frozen(path)}
    np.testing.assert_allclose(metrics[0]["grad_norm"][0], optax.tree.norm(trained), rtol=1e-5)
    assert optax.tree.norm(trained) < 0.99 * optax.tree.norm(grads)


def test_a_frozen_encoder_costs_no_backward_pass():
    batch, keys = on_device(tiny_batch(8)), sample_keys(0, 0, 8)
    wide = tiny_objective(outputs=("rgb",), encoder=dict(width=96, depth=4, heads=3), **RANDOM)
    shapes, _ = jax.eval_shape(wide.init, jax.random.key(0))
    fixed = frozen_mask(shapes)

    def flops(**arguments):
        optimizer = build_optimizer(shapes, fixed, constant, **arguments)
        state = jax.eval_shape(lambda: init_state(wide, optimizer, 0))
        step = lambda s, b: gradients(s, b, keys, step_key(0, 0), wide, 1, frozen=optimizer.frozen)  # noqa: E731
        return jax.jit(step).lower(state, batch).cost_analysis()["flops"]

    # The forward pass of the encoder is a third of its work.
    assert flops(frozen=FROZEN) < 0.5 * flops()


# Slips, and what a config may hold


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="adam"), "config.optimizer.name is 'adam'; known: adamw, sgd, lars"),
        (dict(lr_scales=(("head/.*", 10.0),)), "config.optimizer.lr_scales 'head/.*' matches no parameter"),
        (dict(lr_scales=(("layer/.*", 0.0),)), "config.optimizer.lr_scales 'layer/.*': 0.0 must be above 0; to train nothing use frozen"),
        (dict(frozen=("encoder/.*",)), "config.optimizer.frozen 'encoder/.*' matches no parameter"),
        (dict(frozen=("layer/(.*",)), r"config.optimizer.frozen 'layer/\(.*' is no regular expression"),
        (dict(frozen=(".*",)), r"config.optimizer.frozen \('.\*',\) leaves no parameter to train"),
        (dict(layer_decay=0.75), "config.optimizer.layer_decay is 0.75, but no parameter is called encoder/block_00"),
        (dict(name="sgd", no_decay=("blas",)), "config.optimizer.no_decay 'blas' matches no parameter"),
    ],
)
def test_optimizer_slips_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(TREE, FIXED, constant, **arguments)


def test_a_config_holds_what_its_optimizer_takes():
    import inspect

    keys = {name: set(inspect.signature(optimizer_reader({"name": name})).parameters) for name in OPTIMIZERS}
    shared = {"base_lr", "name", "weight_decay", "layer_decay", "lr_scales", "frozen"}
    assert keys["sgd"] == shared | {"momentum", "no_decay"} and keys["lars"] == shared | {"momentum", "trust"}
    assert keys["adamw"] == shared | {"b1", "b2", "eps", "no_decay", "clip_norm", "clip_tensor_norm", "freeze"}
    config = get_config("configs/pretrain/multimae_b_random_tail.py").to_dict()
    assert default_config(config)["optimizer.name"] == "adamw" and default_config(config)["optimizer.b2"] == 0.95
