"""What needs a GPU; skipped where there is none (`JAX_PLATFORMS=cuda pytest tests/test_gpu.py`)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GUIDED, tiny_batch, tiny_objective

from maskvit.nn.backbone import frozen_mask
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.sharding import make_mesh, place_batch
from maskvit.training.microbatches import DETERMINISTIC, compile_step
from maskvit.training.step import init_state, train_step


def test_the_option_for_equal_runs_is_one_that_xla_has():
    compiled = jax.jit(lambda x: x.at[jnp.zeros(4, int)].add(1.0)).lower(jnp.ones(3)).compile(compiler_options=DETERMINISTIC)
    np.testing.assert_array_equal(compiled(jnp.ones(3)), [5, 1, 1])


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_two_runs_on_a_gpu_are_bit_equal():
    objective = tiny_objective(**GUIDED, compute_dtype="bfloat16")
    shapes, _ = jax.eval_shape(objective.init, jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), Cosine(peak=1e-3, total=100))
    batch = place_batch(tiny_batch(32), make_mesh())
    fresh = jax.jit(lambda: init_state(objective, optimizer, 0))
    step = functools.partial(train_step, objective=objective, optimizer=optimizer)
    compiled, *_ = compile_step(
        lambda state, batch, seed, micro_batches: step(state, batch, seed=seed, micro_batches=micro_batches), (fresh(), batch, np.int32(0)),
        global_batch=32, micro_batch=0, before=0, devices=jax.device_count(), model=objective.model, deterministic=True,
    )  # fmt: skip
    ends = []
    for _ in range(2):
        state = fresh()
        for _ in range(20):
            state, _ = compiled(state, batch, np.int32(0))
        ends.append(jax.device_get(state))
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_array_equal(one, two)
