"""The train step and the state it starts from: what training, benchmarks and tests share. Pure; knows no data library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from maskvit.core.keys import sample_keys, step_key
from maskvit.core.types import Batch, Metrics, TrainState
from maskvit.objectives import Objective
from maskvit.optim.transforms import Optimizer, guarded
from maskvit.sharding import Exchange, on_each_device


def init_state(objective: Objective, optimizer: Optimizer, seed: int, num_records: int = 1) -> TrainState:
    """A fresh state at step 0; the same for the same seed whatever the devices. `num_records`: size of the training data."""
    params, objective_state = objective.init(jax.random.key(seed), num_records)
    return state_from_params(params, objective_state, optimizer)


def state_from_params(params: Any, objective_state: Any, optimizer: Optimizer) -> TrainState:
    """Step 0 with given parameters and fresh optimizer moments."""
    step, skipped = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)  # two arrays: a step gives each away
    return TrainState(step, params, optimizer.tx.init(params), objective_state, skipped)


def gradients(
    state: TrainState, batch: Batch, keys: Any, shared_key: Any, objective: Objective, micro_batches: int, mesh: Mesh | None = None,
    frozen: Any = None,
) -> tuple[Any, Any, Any, Metrics]:  # fmt: skip
    """(loss, gradients, what the objective observed per sample, metrics) of a batch processed in `micro_batches` equal parts.

    Parts take every `micro_batches`-th sample. What to hide is decided for all parts first: then the number of samples behind each
    loss is known, and the parts' gradients add up to the whole batch's exactly.

    `mesh`: the devices that the batch is spread over. Each works on its own samples as if alone, and what they find is added up
    twice in a step: the numbers of samples after the plan, and loss, gradients (in the parameters' float32) and metrics at the end.

    `frozen`: as in `Optimizer`; those parameters have None for a gradient, and nothing is computed or communicated for them.
    """
    # Whole pictures come with some samples only; they serve `after_update`.
    shared, samples = (state.objective_state, state.step, shared_key), (batch._replace(whole={}), keys)
    function = functools.partial(_gradients, objective=objective, micro_batches=micro_batches, frozen=frozen)
    without = functools.partial(_without, frozen=frozen)
    # One device is all devices; but for a kernel that wants to be told that it works by itself.
    if mesh is None or (mesh.size == 1 and objective.model.attention_kernel != "splash"):
        everywhere = function
    else:
        everywhere = on_each_device(function, mesh, without)
    grads, (loss, metrics), observed = everywhere(state.params, shared, samples)
    return loss, grads, observed, metrics


def _without(params: Any, frozen: Any) -> Any:
    """`params` with None in place of what is frozen: for JAX a tree with fewer leaves."""
    return params if frozen is None else jax.tree.map(lambda p, is_frozen: None if is_frozen else p, params, frozen)


def _filled(some: Any, others: Any) -> Any:
    """The tree `some`, with what `others` holds in place of its Nones."""
    return jax.tree.map(lambda x, other: other if x is None else x, some, others, is_leaf=lambda x: x is None)


def _gradients(
    params: Any, shared: Any, samples: Any, exchange: Exchange | None = None, *, objective: Objective, micro_batches: int,
    frozen: Any = None,
) -> Any:  # fmt: skip
    """(gradients, (loss, metrics), observed) of these samples; `exchange`: with other devices, None where there is one."""
    (state, step, shared_key), (batch, keys) = shared, samples
    trained = _without(params, frozen)
    whole = (lambda parts: parts) if exchange is None else exchange.gather
    value_and_grad = jax.value_and_grad(lambda trained, *rest: objective.loss(whole(_filled(trained, params)), *rest), has_aux=True)

    def added(grads: Any, sums: Any, observed: Any) -> Any:
        return (grads, sums, observed) if exchange is None else (exchange.total_gradients(grads), exchange.total(sums), observed)

    if micro_batches == 1:
        plan, counts = (None, None)
        if exchange is not None:
            plan, counts = objective.plan(whole(params), batch, keys, state, step)
            counts = exchange.total(counts)
        (loss, (observed, metrics)), grads = value_and_grad(trained, state, batch, keys, step, plan, counts, shared_key)
        return added(grads, (loss, metrics), observed)

    split = lambda x: jnp.moveaxis(x.reshape(-1, micro_batches, *x.shape[1:]), 1, 0)  # noqa: E731
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    parts = jax.tree.map(split, (batch, keys))
    shown = whole(params)
    plans, counts = jax.lax.map(lambda part: objective.plan(shown, part[0], part[1], state, step), parts)
    counts = jax.tree.map(lambda x: x.sum(axis=0), counts)
    counts = counts if exchange is None else exchange.total(counts)

    @jax.jit  # its shapes are asked for first, and the scan then takes the same trace
    def of_part(part: Any) -> Any:
        (micro_batch, micro_keys), plan = part
        result = value_and_grad(trained, state, micro_batch, micro_keys, step, plan, counts, shared_key)
        (loss, (observed, metrics)), grads = result
        return (grads, (loss, metrics)), observed

    def add(total: Any, part: Any) -> Any:
        sums, observed = of_part(part)
        return jax.tree.map(jnp.add, total, sums), observed

    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], (parts, plans)))[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (grads, sums), observed = jax.lax.scan(add, zeros, (parts, plans))
    return added(grads, sums, jax.tree.map(join, observed))


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    objective: Objective,
    optimizer: Optimizer,
    seed: int | Int[Array, ""],
    micro_batches: int = 1,
    loss_limit: Float[Array, ""] | None = None,
    void: Bool[Array, ""] | None = None,
    mesh: Mesh | None = None,
) -> tuple[TrainState, Metrics]:
    """One update. A non-finite loss or gradient leaves parameters, optimizer and objective state as they are.

    `batch`: a global batch. Step, data position and schedule advance on skipped steps too. `loss_limit`: a loss above it is
    skipped like one that is not finite. `void`: where it is True the state comes back unchanged, its step and count included.
    `mesh`: the devices that the batch is spread over, where there are several.
    """
    keys = sample_keys(seed, state.step, batch.size)
    index = batch.record.index
    if index is not None and void is not None:  # reading what is kept may be an exchange, and `void` comes before all others
        index = jnp.where(void, -1, index)
    shared, kept = objective.recall(state.objective_state, index)
    batch, seen = batch._replace(kept=kept), state._replace(objective_state=shared)
    loss, grads, observed, metrics = gradients(
        seen, batch, keys, step_key(seed, state.step), objective, micro_batches, mesh, optimizer.frozen
    )
    grad_norm = optax.tree.norm(grads)
    advance = jnp.ones((), jnp.int32) if void is None else 1 - void.astype(jnp.int32)
    conditions = [jnp.isfinite(loss), jnp.isfinite(grad_norm), advance > 0]
    if loss_limit is not None:
        conditions.append(loss <= loss_limit)
    # As a sum: the compiler would copy a chain of "and"s into the arithmetic of every tensor, a sixth of the whole program.
    accepted = jnp.stack(conditions).sum() == len(conditions)

    learning_rate = optimizer.schedule(state.step)
    if optimizer.frozen is not None:
        grads = _filled(grads, jax.tree.map(jnp.zeros_like, state.params))  # the optimizer leaves these out
    updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params, step=state.step)
    moved = jax.tree.map(lambda p, u: p + learning_rate * u, state.params, updates)
    moved = _filled(_without(moved, optimizer.frozen), state.params)
    params, opt_state = guarded(accepted, (moved, opt_state), (state.params, state.opt_state))
    objective_state = objective.after_update(state.objective_state, params, batch, keys, state.step, observed, metrics, accepted)

    one = jnp.ones(())
    metrics = objective.summarize(metrics, state.step)
    metrics = dict(metrics, loss=(loss, one), learning_rate=(learning_rate, one), grad_norm=(grad_norm, one))
    metrics["skipped"] = (1.0 - accepted, one)
    skipped = state.skipped + advance - accepted.astype(jnp.int32)
    return TrainState(state.step + advance, params, opt_state, objective_state, skipped), metrics
