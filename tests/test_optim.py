"""Schedules at their published values, decay and frozen parameters, clipping, imported moments."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import tiny_objective

from maskvit.core.types import tree_paths
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim.groups import decay_mask
from maskvit.optim.schedules import Cosine, CosinePerEpoch, Polynomial
from maskvit.optim.transforms import adamw, clip_tensors, with_adam_moments
from maskvit.training.config import make_schedule
from tests.runs import get_config

EPOCH = 625  # steps of the 1600-epoch run
ORIGINAL = Cosine(peak=8e-4, total=1600 * EPOCH, warmup=40 * EPOCH)
PUBLISHED = {
    10: 2.00008e-4,
    40: 8.0e-4,
    400: 6.994e-4,
    800: 4.161e-4,
    1200: 1.229e-4,
    1400: 3.201e-5,
    1500: 8.084e-6,
    1550: 2.026e-6,
    1590: 8.11e-8,
}


def exact_rate(t: int, peak: float, total: int, warmup: int, floor: float = 0.0) -> float:
    """The schedule by its definition in float64."""
    if t < warmup:
        return peak * t / max(warmup - 1, 1)
    return floor + 0.5 * (peak - floor) * (1 + np.cos(np.pi * (t - warmup) / (total - warmup)))


@pytest.mark.parametrize("epoch,rate", PUBLISHED.items())
def test_the_1600_epoch_schedule(epoch, rate):
    np.testing.assert_allclose(ORIGINAL(epoch * EPOCH), rate, rtol=2e-4 if epoch < 1590 else 1e-3)


@pytest.mark.parametrize("epoch,rate", [(100, 7.464e-4), (200, 4.695e-4)])
def test_the_400_epoch_schedule(epoch, rate):
    np.testing.assert_allclose(Cosine(peak=8e-4, total=400 * EPOCH, warmup=40 * EPOCH)(epoch * EPOCH), rate, rtol=2e-4)


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_every_step_follows_the_definition(floor):
    schedule = Cosine(peak=8e-4, total=1_000_000, warmup=25_000, floor=floor)
    steps = np.unique(np.r_[0:10, np.linspace(0, 999_999, 500).astype(int), 24_990:25_010, 999_980:1_000_000])
    rates = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(rates, [exact_rate(t, 8e-4, 1_000_000, 25_000, floor) for t in steps], rtol=3e-6, atol=1e-16)


def test_the_first_step_has_rate_zero_and_the_peak_comes_twice():
    assert ORIGINAL(0) == 0
    np.testing.assert_allclose([ORIGINAL(24_999), ORIGINAL(25_000)], np.float32(8e-4), rtol=1e-7)
    assert ORIGINAL(24_998) < ORIGINAL(24_999) and ORIGINAL(25_500) < ORIGINAL(25_000)


def test_three_ways_to_continue():
    tail = Cosine(peak=8e-4, total=1600 * EPOCH, warmup=40 * EPOCH, start=1500 * EPOCH)
    for step in (0, 1, 777, 100 * EPOCH - 1):
        assert tail(step) == ORIGINAL(1500 * EPOCH + step)
    np.testing.assert_allclose(tail(0), 8.084e-6, rtol=1e-4)

    scaled = Cosine(peak=8e-3, total=1600 * EPOCH, warmup=40 * EPOCH, start=1500 * EPOCH)
    np.testing.assert_allclose(scaled(1000), 10 * tail(1000), rtol=1e-6)

    restart = Cosine(peak=8e-4, total=100 * EPOCH, warmup=20 * EPOCH)
    assert restart(0) == 0
    np.testing.assert_allclose(restart(20 * EPOCH), 8e-4, rtol=1e-6)
    np.testing.assert_allclose(restart(60 * EPOCH), 4e-4, rtol=1e-6)


def test_without_warm_up_the_peak_comes_first_and_after_the_end_the_floor_stays():
    schedule = Cosine(peak=1.0, total=10, floor=0.25)
    assert schedule(0) == 1 and schedule(10) == 0.25 and schedule(25) == 0.25
    assert Cosine(peak=1.0, total=10, warmup=1)(0) == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(total=10, warmup=10), "warm-up of 10 steps does not fit into 10 steps"),
        (dict(total=10, warmup=-1), "does not fit"),
        (dict(total=10, start=10), r"start_epochs \(10 steps\) must lie before total_epochs \(10 steps\)"),
        (dict(total=10, start=-1), "start_epochs"),
    ],
)
def test_schedules_that_cannot_be_are_errors(arguments, message):
    with pytest.raises(ValueError, match=f"config.schedule.*{message}"):
        Cosine(peak=1.0, **arguments)


def mmengine_rates(peak: float, total: int, warmup: int, power: float, floor: float, factor: float) -> list[float]:
    """LinearLR to `warmup`, then PolyLR, by the recursions they are computed with."""
    rates = [peak * factor]
    for t in range(1, warmup):
        rates.append(rates[-1] * (1 + (1 - factor) / ((warmup - 1) * factor + (t - 1) * (1 - factor))))
    rates.append(rates[-1])
    for t in range(1, total - warmup):
        rates.append((rates[-1] - floor) * (1 - 1 / (total - warmup - t)) ** power + floor)
    return rates


@pytest.mark.parametrize("power,floor", [(1.0, 0.0), (0.9, 1e-6)])
def test_polynomial_decay_is_mmengines(power, floor):
    schedule = Polynomial(peak=1e-4, total=1600, warmup=150, power=power, floor=floor, start_factor=1e-6)
    rates = jax.vmap(schedule)(jnp.arange(1600))
    np.testing.assert_allclose(rates, mmengine_rates(1e-4, 1600, 150, power, floor, 1e-6), rtol=1e-5, atol=1e-13)
    assert rates[-1] == np.float32(floor) and schedule(5000) == np.float32(floor)
    tail = Polynomial(peak=1e-4, total=1600, warmup=150, power=power, floor=floor, start=1000)
    assert tail(7) == rates[1007]


def test_a_rate_per_epoch_is_torchs():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.04)
    reference, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0), []
    for _ in range(100):
        rates += [optimizer.param_groups[0]["lr"]] * 7
        optimizer.step()
        reference.step()
    schedule = CosinePerEpoch(peak=0.04, total=700, steps_per_epoch=7)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.arange(700)), rates, rtol=1e-5)
    np.testing.assert_allclose(schedule(699), 2.4672e-4 * 0.04, rtol=1e-4)
    assert CosinePerEpoch(peak=0.04, total=700, steps_per_epoch=7, start=70)(6) == schedule(76) == schedule(70) != schedule(77)


def test_maes_rates_differ_in_the_warm_up_alone():
    """lr * epoch / 5 in the first five epochs of 1251 steps, and the peak once."""
    ours = make_schedule(5e-4, 1024, 1251, total_epochs=100, warmup_epochs=5, min_lr=1e-6 / 4)
    assert ours == Cosine(2e-3, 125_100, 6255, 0, 1e-6)
    steps = np.r_[0, 1, 100, 6253, 6254]
    mae = 2e-3 * (steps / 1251) / 5
    np.testing.assert_allclose(jax.vmap(ours)(jnp.asarray(steps)) * (6254 / 6255), mae, rtol=1e-6)
    steps = np.r_[6255, 10_000, 125_099]
    mae = 1e-6 + 0.5 * (2e-3 - 1e-6) * (1 + np.cos(np.pi * (steps / 1251 - 5) / 95))
    np.testing.assert_allclose(jax.vmap(ours)(jnp.asarray(steps)), mae, rtol=1e-5)


def test_schedules_by_their_names():
    blocks = dict(total_epochs=10.0, min_lr=1e-6)
    assert make_schedule(1e-3, 512, 5, name="cosine_per_epoch", **blocks) == CosinePerEpoch(2e-3, 50, 0, 0, 2e-6, steps_per_epoch=5)
    made = make_schedule(1e-3, 256, 5, name="polynomial", power=0.9, warmup_epochs=2.0, **blocks)
    assert made == Polynomial(1e-3, 50, 10, 0, 1e-6, power=0.9)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(name="step"), "config.schedule.name is 'step'; known: cosine, polynomial, cosine_per_epoch"),
        (dict(power=0.9), "config.schedule.power is 0.9, which schedule 'cosine' does not have"),
        (dict(name="cosine_per_epoch", start_factor=0.1), "config.schedule.start_factor is 0.1, which schedule 'cosine_per_epoch'"),
        (dict(name="cosine_per_epoch", warmup_epochs=1.0), "'cosine_per_epoch' has no warm-up, here 5 steps: remove warmup_epochs"),
    ],
)
def test_schedule_slips_are_errors(block, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(1e-3, 256, 5, total_epochs=10.0, **block)


# The optimizer

TREE = {
    "layer": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.full((2,), 0.3)},
    "norm": {"scale": jnp.ones((3,)), "bias": jnp.zeros((3,))},
    "class_embed": jnp.full((4, 2), 0.1),
    "pos_embed": jnp.full((2, 2, 4), 0.7),
}
FROZEN = frozen_mask(TREE)


def constant(step):
    return jnp.float32(0.1)


def updates_of(grads, steps: int = 1, **arguments):
    """Parameters after `steps` updates of learning rate 0.1 with the same gradients."""
    optimizer = adamw(TREE, FROZEN, constant, **arguments)
    state, params = optimizer.tx.init(TREE), TREE
    for _ in range(steps):
        updates, state = optimizer.tx.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + 0.1 * u, params, updates)
    return params, state


def test_adamw_by_its_definition():
    grads = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32), TREE)
    params, _ = updates_of(grads, steps=3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
    for name, start in tree_paths(TREE).items():
        p, g, m, v = np.asarray(start, float), np.asarray(tree_paths(grads)[name], float), 0.0, 0.0
        for t in (1, 2, 3):
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            p = p * (1 - 0.1 * 0.05) - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        expected = np.asarray(start) if name == "pos_embed" else p
        np.testing.assert_allclose(tree_paths(params)[name], expected, rtol=1e-5, atol=1e-6)


def test_decay_of_everything_or_all_but_patterns():
    zeros = jax.tree.map(jnp.zeros_like, TREE)
    trainable = set(tree_paths(TREE)) - {"pos_embed"}
    for no_decay, decaying in (((), trainable), ((".*bias", "layer/k.*"), {n for n in trainable if not re.match(r".*bias|layer/k", n)})):
        params, _ = updates_of(zeros, weight_decay=0.5, no_decay=no_decay)
        for name, start in tree_paths(TREE).items():
            np.testing.assert_allclose(tree_paths(params)[name], np.asarray(start) * (0.95 if name in decaying else 1), rtol=1e-6)


def test_what_decays_in_multimae():
    shapes = jax.eval_shape(lambda key: tiny_objective().init(key)[0], jax.random.key(0))
    everything = tree_paths(decay_mask(shapes, frozen_mask(shapes)))
    assert {name for name, decays in everything.items() if not decays} == {name for name in everything if name.endswith("pos_embed")}
    assert sum(not decays for decays in everything.values()) == 7


def test_frozen_tables_have_no_moments_and_do_not_move():
    grads = jax.tree.map(jnp.ones_like, TREE)
    params, state = updates_of(grads, steps=2)
    np.testing.assert_array_equal(params["pos_embed"], TREE["pos_embed"])
    paths = tree_paths(state)
    assert not [name for name in paths if "pos_embed" in name]
    assert len([name for name in paths if "/mu/" in name]) == len([name for name in paths if "/nu/" in name]) == 5


def test_clipping_bounds_the_norm_over_trainable_parameters():
    # The frozen table's gradient must not count. Adam hides a common factor, so look at its first moment.
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 2.0), TREE)
    grads["pos_embed"] = jnp.full(TREE["pos_embed"].shape, 1e6)
    _, state = updates_of(grads, clip_norm=1.0)
    moments = [leaf for name, leaf in tree_paths(state).items() if "/mu/" in name]
    np.testing.assert_allclose(optax.tree.norm(moments), 0.1, rtol=1e-5)
    small = jax.tree.map(lambda x: jnp.full(x.shape, 1e-3), TREE)
    for name, leaf in tree_paths(updates_of(small, clip_norm=1.0)[1]).items():
        if "/mu/" in name:
            np.testing.assert_allclose(leaf, 1e-4, rtol=1e-5)


def moments_of(state) -> dict:
    """{"count", "mu", "nu"} as an importer delivers them: numpy, frozen tensors left out."""
    [adam] = [
        x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState)) if isinstance(x, optax.ScaleByAdamState)
    ]
    keep = lambda tree: {k: keep(v) if isinstance(v, dict) else np.asarray(v) for k, v in tree.items() if k != "pos_embed"}  # noqa: E731
    return dict(count=int(adam.count), mu=keep(adam.mu), nu=keep(adam.nu))


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_imported_moments_continue_the_run(clip_norm):
    grads = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32), TREE)
    optimizer = adamw(TREE, FROZEN, constant, clip_norm=clip_norm)
    params, state = updates_of(grads, steps=4, clip_norm=clip_norm)
    imported = with_adam_moments(optimizer.tx.init(params), moments_of(state))
    assert jax.tree.structure(imported) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(imported), jax.tree.leaves(state), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_moments_that_do_not_fit_are_errors():
    optimizer = adamw(TREE, FROZEN, constant)
    fresh, given = optimizer.tx.init(TREE), moments_of(optimizer.tx.init(TREE))
    del given["mu"]["layer"]["bias"]
    with pytest.raises(ValueError, match="moments lack 'layer/bias'"):
        with_adam_moments(fresh, given)
    given["mu"]["layer"]["bias"] = np.zeros((5,), np.float32)
    with pytest.raises(ValueError, match=r"'layer/bias' of shape \(2,\)"):
        with_adam_moments(fresh, given)


# What self-distillation asks of the optimizer

DISTILLED = {
    "inputs": {"rgb": {"proj": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.full((2,), 0.3)}, "mask_embed": jnp.full((2,), 0.2)}},
    "norm": {"scale": jnp.ones((3,)), "bias": jnp.full((3,), 0.1)},
    "projection": {"prototypes": {"kernel": jnp.full((2, 4), 0.4), "scale": jnp.ones((4,))}},
}
NO_DECAY = (".*bias", r".*norm\d?/scale")
PROTOTYPES = "projection/(patch_)?prototypes/.*"


def distilled(steps: int, **arguments):
    """Parameters after so many updates at rate 0.1, each with its own gradients, and those gradients."""
    optimizer = adamw(DISTILLED, frozen_mask(DISTILLED), Cosine(peak=0.1, total=10), **arguments)
    state, params, all_grads = optimizer.tx.init(DISTILLED), DISTILLED, []
    for step in range(steps):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), DISTILLED)  # noqa: B023
        updates, state = optimizer.tx.update(grads, state, params, step=jnp.int32(step))
        params = jax.tree.map(lambda p, u: p + 0.1 * u, params, updates)
        all_grads.append(tree_paths(grads))
    return tree_paths(params), all_grads


@pytest.mark.parametrize("frozen_steps", [0, 2])
def test_a_run_of_distillation_by_its_definition(frozen_steps):
    freeze = dict(parameters=PROTOTYPES, until=frozen_steps) if frozen_steps else None
    params, grads = distilled(5, b1=0.9, b2=0.999, weight_decay=(0.04, 0.4), no_decay=NO_DECAY, clip_tensor_norm=1.5, freeze=freeze)
    for name, start in tree_paths(DISTILLED).items():
        first = frozen_steps if "prototypes" in name else 0
        p, m, v = np.asarray(start, float), 0.0, 0.0
        for step in range(first, 5):
            g = np.asarray(grads[step][name], float)
            g = g * min(1.0, 1.5 / (np.linalg.norm(g) + 1e-6))
            m, v, t = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g, step - first + 1
            decays = not (name.endswith("bias") or name == "norm/scale")
            weight = (0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * step / 10))) if decays else 0.0
            p = p * (1 - 0.1 * weight) - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        # 1 - 0.999 has four good digits in float32.
        np.testing.assert_allclose(params[name], p, rtol=1e-4, atol=1e-5, err_msg=name)


def test_clipping_of_each_tensor_is_torchs():
    torch = pytest.importorskip("torch")
    draw = np.random.default_rng(0).standard_normal
    grads = {name: (scale * draw((20, 4))).astype(np.float32) for name, scale in (("large", 3), ("small", 0.01))}
    ours = clip_tensors(3.0).update(jax.tree.map(jnp.asarray, grads), optax.EmptyState())[0]
    for name, grad in grads.items():
        parameter = torch.nn.Parameter(torch.zeros(20, 4))
        parameter.grad = torch.from_numpy(grad.copy())
        torch.nn.utils.clip_grad_norm_([parameter], 3.0)
        np.testing.assert_allclose(ours[name], parameter.grad.numpy(), rtol=1e-6)


def test_decay_groups_of_the_published_vit_s():
    """57 tensors decay and 102 do not; ours are one more, as the class token's position is a tensor of its own."""
    objective = build_objective(get_config("configs/pretrain/attmask_s_100e.py").to_dict())
    shapes = jax.eval_shape(lambda: objective.init(jax.random.key(0))[0])
    decays = tree_paths(decay_mask(shapes, frozen_mask(shapes, objective.model), NO_DECAY))
    assert (sum(decays.values()), len(decays) - sum(decays.values())) == (57 + 1, 102)
    for name in (
        "global_tokens",
        "global_pos_embed",
        "inputs/rgb/learned_pos_embed",
        "inputs/rgb/mask_embed",
        "projection/prototypes/scale",
    ):
        assert decays[name], name
    assert not decays["norm/scale"] and not decays["encoder/block_03/norm2/scale"] and not decays["projection/fc1/bias"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(no_decay=("blas",)), "config.optimizer.no_decay 'blas' matches no parameter"),
        (dict(freeze=dict(parameters="head/.*", until=3)), "config.optimizer.freeze.parameters 'head/.*' matches no parameter"),
        (dict(freeze=dict(parameters=PROTOTYPES, until=3), clip_norm=1.0), "use clip_tensor_norm"),
    ],
)
def test_optimizer_slips_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamw(DISTILLED, frozen_mask(DISTILLED), constant, **arguments)
