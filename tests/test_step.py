"""The train step: accumulation, skipped updates, missing modalities, new modalities, compute types, one compilation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from tiny import GUIDED, RANDOM, counting, on_device, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys, step_key
from maskvit.core.types import TrainState, tree_paths
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives.masked import MaskedAutoencoder
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import Optimizer, adamw
from maskvit.training.step import gradients, init_state, train_step

# Two outputs compile faster than four, and differ in kind; one block of the encoder compiles faster than two.
OUTPUTS = ("rgb", "semseg")
ONE_BLOCK = dict(width=48, depth=1, heads=3)


def small_objective(**objective: Any) -> MaskedAutoencoder:
    return tiny_objective(outputs=OUTPUTS, encoder=ONE_BLOCK, **objective)


def optimizer_for(objective: MaskedAutoencoder, peak: float = 1e-3, **arguments: Any) -> Optimizer:
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    return adamw(shapes, frozen_mask(shapes), Cosine(peak=peak, total=1000), **arguments)


def fresh_state(objective: MaskedAutoencoder, optimizer: Optimizer) -> TrainState:
    return init_state(objective, optimizer, 0)


def assert_trees_close(ours: Any, theirs: Any, scale_tolerance: float) -> None:
    """Every leaf within `scale_tolerance` of its own largest value."""
    for name, value in tree_paths(theirs).items():
        value = np.asarray(value)
        atol = scale_tolerance * np.abs(value).max() if value.size else 0
        np.testing.assert_allclose(tree_paths(ours)[name], value, rtol=scale_tolerance, atol=max(atol, 1e-8), err_msg=name)


# Accumulation


@pytest.mark.parametrize("masking", [RANDOM, GUIDED], ids=["random", "guided"])
def test_accumulated_gradients_are_the_large_batchs(masking):
    # Half the samples lack something, so that parts differ in how many samples stand behind each loss.
    objective = small_objective(**masking)
    state = fresh_state(objective, optimizer_for(objective))
    batch, keys = on_device(tiny_batch(8, present=True)), sample_keys(0, 0, 8)
    results = {n: jax.jit(lambda s, b, n=n: gradients(s, b, keys, step_key(0, 0), objective, n))(state, batch) for n in (1, 2, 4)}
    whole_loss, whole, _, whole_metrics = results[1]
    assert {float(count) for name, (_, count) in whole_metrics.items()} == {6.0, 5.0}
    for n in (2, 4):
        loss, grads, observed, metrics = results[n]
        np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
        assert_trees_close(grads, whole, 1e-5)
        assert observed is None
        for name, (loss_sum, count) in whole_metrics.items():
            np.testing.assert_allclose(metrics[name][0], loss_sum, rtol=1e-5)
            assert metrics[name][1] == count


# Skipped updates


class Guided:
    """One compiled guided step for the tests below."""

    def __init__(self) -> None:
        self.objective = small_objective(**GUIDED)
        self.optimizer = optimizer_for(self.objective)
        self.state = fresh_state(self.objective, self.optimizer)
        step, self.traces = counting(
            lambda state, batch, **limits: train_step(
                state, batch, objective=self.objective, optimizer=self.optimizer, seed=0, micro_batches=2, **limits
            )
        )
        jitted = jax.jit(step)
        self.step = lambda state, batch, limit=np.inf, void=False: jitted(state, batch, loss_limit=np.float32(limit), void=np.bool_(void))

    @staticmethod
    def batch(seed: int) -> dict[str, np.ndarray]:
        batch = tiny_batch(8, seed=seed, present=True)
        return dict(batch, rgb=batch["rgb"].astype(np.float32), present=np.roll(batch["present"], seed, axis=0))


@pytest.fixture(scope="module")
def guided() -> Guided:
    return Guided()


def test_a_non_finite_batch_changes_nothing_but_the_step(guided):
    good, bad = guided.batch(0), guided.batch(0)
    bad["rgb"][0, 3, 3, 0] = np.inf  # in one micro-batch alone
    state, metrics = guided.step(guided.state, on_device(good))
    assert metrics["skipped"][0] == 0 and int(state.skipped) == 0 and int(state.step) == 1
    after, metrics = guided.step(state, on_device(bad))
    assert metrics["skipped"][0] == 1 and int(after.skipped) == 1 and int(after.step) == 2
    for part in ("params", "opt_state", "objective_state"):
        for ours, theirs in zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    again, metrics = guided.step(after, on_device(good))
    assert metrics["skipped"][0] == 0 and int(again.skipped) == 1 and int(again.step) == 3
    assert np.isfinite(metrics["loss"][0])
    assert not np.array_equal(again.params["global_tokens"], after.params["global_tokens"])
    np.testing.assert_allclose(metrics["learning_rate"][0], guided.optimizer.schedule(2), rtol=1e-6)


def test_a_loss_above_the_limit_is_skipped_and_a_void_step_never_was(guided):
    batch = on_device(guided.batch(0))
    limited, metrics = guided.step(guided.state, batch, limit=1e-6)
    assert metrics["skipped"][0] == 1 and int(limited.step) == 1 and int(limited.skipped) == 1
    for ours, theirs in zip(jax.tree.leaves(limited.params), jax.tree.leaves(guided.state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    void, _ = guided.step(guided.state, batch, void=True)
    for ours, theirs in zip(jax.tree.leaves(void), jax.tree.leaves(guided.state), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# What a step reports and changes


def test_a_step_trains_everything_but_the_tables(guided):
    after, metrics = guided.step(guided.state, on_device(guided.batch(0)))
    assert set(metrics) == {"loss", "learning_rate", "grad_norm", "skipped"} | {f"loss/{name}" for name in OUTPUTS}
    total = sum(float(a / b) for name, (a, b) in metrics.items() if name.startswith("loss/"))
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-5)
    before = tree_paths(guided.state.params)
    for name, value in tree_paths(after.params).items():
        assert np.array_equal(value, before[name]) == name.endswith("pos_embed"), name


def test_one_compilation_serves_all_steps_and_batches(guided):
    state, losses = guided.state, []
    for i in range(3):
        state, metrics = guided.step(state, on_device(guided.batch(i)))
        losses.append(float(metrics["loss"][0]))
    assert len(guided.traces) == 1 and len(set(losses)) == 3 and int(state.step) == 3


def test_randomness_follows_seed_and_step():
    objective = small_objective()
    state, batch = fresh_state(objective, optimizer_for(objective)), on_device(tiny_batch(8))

    plan = jax.jit(lambda keys: objective.plan(state.params, batch, keys)[0].masked)
    same, again, next_step, other_seed = (np.asarray(plan(sample_keys(*x, 8))) for x in ((0, 0), (0, 0), (0, 1), (1, 0)))
    np.testing.assert_array_equal(same, again)
    for other in (next_step, other_seed):
        assert (same != other).any(axis=1).all()


# Compute types


def gradients_of(objective: MaskedAutoencoder, state: TrainState) -> tuple[float, dict[str, np.ndarray]]:
    compiled = jax.jit(lambda state, batch: gradients(state, batch, sample_keys(0, 0, 8), step_key(0, 0), objective, 1))
    loss, grads, _, _ = compiled(state, on_device(tiny_batch(8)))
    return float(loss), {name: np.asarray(value) for name, value in tree_paths(grads).items()}


@pytest.fixture(scope="module")
def plain() -> tuple[TrainState, float, dict[str, np.ndarray]]:
    """A state, and its loss and gradients in float32."""
    objective = small_objective()
    state = fresh_state(objective, optimizer_for(objective))
    return state, *gradients_of(objective, state)


@pytest.mark.parametrize("remat", [True, "dots"])
def test_rematerialization_changes_no_number(plain, remat):
    state, loss, grads = plain
    loss_remat, grads_remat = gradients_of(small_objective(remat=remat), state)
    np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
    assert_trees_close(grads_remat, grads, 1e-5)


def test_bfloat16_computes_nearly_the_same(plain):
    state, loss, grads = plain
    loss_low, grads_low = gradients_of(small_objective(compute_dtype="bfloat16"), state)
    np.testing.assert_allclose(loss_low, loss, rtol=5e-3)
    assert loss_low != loss
    assert {value.dtype for value in grads_low.values()} == {np.dtype(np.float32)}
    flat, flat_low = (np.concatenate([g[name].ravel() for name in sorted(g)]) for g in (grads, grads_low))
    assert flat @ flat_low / np.linalg.norm(flat) / np.linalg.norm(flat_low) > 0.999


# Modalities of one's own


NEW_MODALITIES = {
    "normals": dict(channels=3, patch=8, loss="l1", scale=1 / 127.5, mean=(1.0,)),
    "bands": dict(channels=10, patch=4, stride=2, loss="mse", scale=1e-3, missing=0.0),
}


def surfaces(size: int, seed: int) -> dict[str, np.ndarray]:
    """Surface normals (uint8) of random planes and bumps, and ten bands of reflectance that follow from them, with gaps."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:32, 0:32] / 32
    slope = rng.uniform(-1, 1, (size, 2, 1, 1)) + 0.5 * np.sin(6 * np.stack([x, y]) + rng.uniform(0, 6, (size, 2, 1, 1)))
    normals = np.concatenate([slope, np.ones((size, 1, 32, 32))], axis=1)
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    light = np.random.default_rng(7).standard_normal((10, 3))  # the same ten lamps for all
    bands = 1000 * np.einsum("kc,bchw->bhwk", light, normals)[:, ::2, ::2]
    bands[rng.random((size, 16, 16)) < 0.05] = np.nan
    return {"normals": np.round(127.5 * (1 + normals)).astype(np.uint8).transpose(0, 2, 3, 1), "bands": bands.astype(np.float32)}


def test_new_modalities_are_config_alone():
    objective = tiny_objective(
        NEW_MODALITIES, inputs=("normals", "bands"), outputs=("normals", "bands", "norm_bands"), encoder=ONE_BLOCK, **GUIDED
    )
    assert objective.model.layout.sizes == (16, 64)
    optimizer = optimizer_for(objective, peak=3e-3)
    step = jax.jit(lambda state, batch: train_step(state, batch, objective=objective, optimizer=optimizer, seed=0))
    state = fresh_state(objective, optimizer)
    history: dict[str, list[float]] = {}
    for i in range(25):
        state, metrics = step(state, on_device(surfaces(16, seed=i)))
        for name, (total, count) in metrics.items():
            history.setdefault(name, []).append(float(total / count))
    assert int(state.skipped) == 0
    for name in ("loss", "loss/normals", "loss/bands", "loss/norm_bands"):
        first, last = np.mean(history[name][:3]), np.mean(history[name][-3:])
        assert last < (0.97 if name == "loss/norm_bands" else 0.8) * first, (name, first, last)
