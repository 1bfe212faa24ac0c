"""The train step: accumulation, skipped updates, missing modalities, new modalities, compute types, one compilation."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GUIDED, RANDOM, counting, on_device, tiny_batch, tiny_objective

from maskvit.keys import sample_keys
from maskvit.models import frozen_mask
from maskvit.objectives.multimae import MultiMae
from maskvit.optim import Cosine, Optimizer, adamw
from maskvit.step import gradients, init_state, train_step
from maskvit.types import TrainState, tree_paths


def optimizer_for(objective: MultiMae, peak: float = 1e-3, **arguments: Any) -> Optimizer:
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    return adamw(shapes, frozen_mask(shapes), Cosine(peak=peak, total=1000), **arguments)


def fresh_state(objective: MultiMae, optimizer: Optimizer) -> TrainState:
    return jax.jit(lambda: init_state(objective, optimizer, 0))()


def jitted_step(objective: MultiMae, optimizer: Optimizer, micro_batches: int = 1):
    return jax.jit(lambda state, batch: train_step(state, batch, objective=objective, optimizer=optimizer, seed=0, micro_batches=micro_batches))


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
    objective = tiny_objective(**masking)
    state = fresh_state(objective, optimizer_for(objective))
    batch, keys = on_device(tiny_batch(8, present=True)), sample_keys(0, 0, 8)
    results = {n: jax.jit(lambda s, b, n=n: gradients(s, b, keys, objective, n))(state, batch) for n in (1, 2, 4)}
    whole_loss, whole, _, whole_metrics = results[1]
    assert {float(count) for name, (_, count) in whole_metrics.items()} == {6.0, 5.0}
    for n in (2, 4):
        loss, grads, objective_state, metrics = results[n]
        np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
        assert_trees_close(grads, whole, 1e-5)
        assert objective_state == ()
        for name, (loss_sum, count) in whole_metrics.items():
            np.testing.assert_allclose(metrics[name][0], loss_sum, rtol=1e-5)
            assert metrics[name][1] == count


def test_accumulated_training_follows_the_large_batch():
    objective = tiny_objective(**RANDOM)
    optimizer = optimizer_for(objective, peak=1e-4)
    losses = []
    for micro_batches in (1, 4):
        state, step = fresh_state(objective, optimizer), jitted_step(objective, optimizer, micro_batches)
        losses.append([])
        for i in range(4):
            state, metrics = step(state, on_device(tiny_batch(8, seed=i)))
            losses[-1].append(float(metrics["loss"][0]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


# Skipped updates


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_non_finite_batch_changes_nothing_but_the_step(micro_batches):
    objective = tiny_objective()
    optimizer = optimizer_for(objective)
    step = jitted_step(objective, optimizer, micro_batches)
    good = tiny_batch(4)
    good["rgb"] = good["rgb"].astype(np.float32)
    bad = copy.deepcopy(good)
    bad["rgb"][1, 3, 3, 0] = np.inf
    state, metrics = step(fresh_state(objective, optimizer), on_device(good))
    assert metrics["skipped"][0] == 0 and int(state.skipped) == 0 and int(state.step) == 1
    after, metrics = step(state, on_device(bad))
    assert metrics["skipped"][0] == 1 and int(after.skipped) == 1 and int(after.step) == 2
    for part in ("params", "opt_state", "objective_state"):
        for ours, theirs in zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    again, metrics = step(after, on_device(good))
    assert metrics["skipped"][0] == 0 and int(again.skipped) == 1 and int(again.step) == 3
    assert np.isfinite(metrics["loss"][0])
    assert not np.array_equal(again.params["global_tokens"], after.params["global_tokens"])
    np.testing.assert_allclose(metrics["learning_rate"][0], optimizer.schedule(2), rtol=1e-6)


# What a step reports and changes


def test_a_step_trains_everything_but_the_tables():
    objective = tiny_objective(**GUIDED)
    optimizer = optimizer_for(objective)
    state = fresh_state(objective, optimizer)
    after, metrics = jitted_step(objective, optimizer)(state, on_device(tiny_batch(8)))
    assert set(metrics) == {"loss", "learning_rate", "grad_norm", "skipped"} | {f"loss/{name}" for name in objective.model.outputs}
    total = sum(float(a / b) for name, (a, b) in metrics.items() if name.startswith("loss/"))
    np.testing.assert_allclose(metrics["loss"][0], total, rtol=1e-6)
    before = tree_paths(state.params)
    for name, value in tree_paths(after.params).items():
        assert np.array_equal(value, before[name]) == name.endswith("pos_embed"), name


def test_one_compilation_serves_all_steps_and_batches():
    objective = tiny_objective(**GUIDED)
    optimizer = optimizer_for(objective)
    counted, traces = counting(lambda state, batch: train_step(state, batch, objective=objective, optimizer=optimizer, seed=0))
    step, state = jax.jit(counted, donate_argnums=0), fresh_state(objective, optimizer)
    losses = []
    for i in range(3):
        batch = tiny_batch(8, seed=i, present=True)
        batch["present"] = np.roll(batch["present"], i, axis=0)
        state, metrics = step(state, on_device(batch))
        losses.append(float(metrics["loss"][0]))
    assert len(traces) == 1 and len(set(losses)) == 3 and int(state.step) == 3


def test_randomness_follows_seed_and_step():
    objective = tiny_objective()
    optimizer = optimizer_for(objective)
    state, batch = fresh_state(objective, optimizer), on_device(tiny_batch(8))

    @jax.jit
    def loss_at(step, seed):
        return gradients(state._replace(step=step), batch, sample_keys(seed, step, 8), objective, 1)[0]

    same, again = (float(loss_at(jnp.int32(0), 0)) for _ in range(2))
    assert same == again
    assert len({same, float(loss_at(jnp.int32(1), 0)), float(loss_at(jnp.int32(0), 1))}) == 3


# Compute types


def gradients_of(objective: MultiMae, state: TrainState) -> tuple[float, dict[str, np.ndarray]]:
    batch, keys = on_device(tiny_batch(8)), sample_keys(0, 0, 8)
    loss, grads, _, _ = jax.jit(lambda s: gradients(s, batch, keys, objective, 1))(state)
    return float(loss), {name: np.asarray(value) for name, value in tree_paths(grads).items()}


def test_rematerialisation_changes_no_number():
    plain = tiny_objective()
    state = fresh_state(plain, optimizer_for(plain))
    (loss, grads), (loss_remat, grads_remat) = gradients_of(plain, state), gradients_of(tiny_objective(remat=True), state)
    np.testing.assert_allclose(loss_remat, loss, rtol=1e-6)
    assert_trees_close(grads_remat, grads, 1e-5)


def test_bfloat16_computes_nearly_the_same():
    plain = tiny_objective()
    state = fresh_state(plain, optimizer_for(plain))
    (loss, grads), (loss_low, grads_low) = gradients_of(plain, state), gradients_of(tiny_objective(compute_dtype="bfloat16"), state)
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
    light = rng.standard_normal((10, 3)) if seed < 0 else np.random.default_rng(7).standard_normal((10, 3))
    bands = 1000 * np.einsum("kc,bchw->bhwk", light, normals)[:, ::2, ::2]
    bands[rng.random((size, 16, 16)) < 0.05] = np.nan
    return {"normals": np.round(127.5 * (1 + normals)).astype(np.uint8).transpose(0, 2, 3, 1), "bands": bands.astype(np.float32)}


@pytest.mark.parametrize("masking", [RANDOM, GUIDED], ids=["random", "guided"])
def test_new_modalities_are_config_alone(masking):
    objective = tiny_objective(NEW_MODALITIES, inputs=("normals", "bands"), outputs=("normals", "bands", "norm_bands"), **masking)
    assert objective.model.layout.sizes == (16, 64)
    optimizer = optimizer_for(objective, peak=3e-3)
    step, state = jitted_step(objective, optimizer), fresh_state(objective, optimizer)
    history: dict[str, list[float]] = {}
    for i in range(25):
        state, metrics = step(state, on_device(surfaces(16, seed=i)))
        for name, (total, count) in metrics.items():
            history.setdefault(name, []).append(float(total / count))
    assert int(state.skipped) == 0
    for name in ("loss", "loss/normals", "loss/bands", "loss/norm_bands"):
        first, last = np.mean(history[name][:3]), np.mean(history[name][-3:])
        assert last < (0.97 if name == "loss/norm_bands" else 0.8) * first, (name, first, last)
