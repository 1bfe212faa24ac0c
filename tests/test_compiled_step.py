"""What the compiled train step does on four devices: what is communicated, how often, and what is never copied."""

from __future__ import annotations

import functools
import re

import jax
import numpy as np
import pytest
from tiny import GUIDED, tiny_batch, tiny_objective

from maskvit.nn.backbone import frozen_mask
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.sharding import make_mesh, parameter_shardings, place_batch, record_rows, replicated
from maskvit.training.step import init_state, train_step

RECORDS, BATCH = 37, 16
REMEMBERING = dict(
    predicted_attention=dict(name="predicted_attention", query="mean", every=2, grid=8),
    average_error=dict(name="average_error", grid=8),
)
OUTPUTS = dict(outputs=("rgb", "depth", "semseg"))  # of each kind of loss one: the fewer decoders, the sooner it is compiled
MASKING = dict(guided=GUIDED) | {name: dict(scores=dict(name="attention_high"), guidance=block) for name, block in REMEMBERING.items()}
EXCHANGE = re.compile(r"= (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\(")


class Step:
    """The train step of a small objective on so many devices, compiled with two micro-batches."""

    def __init__(self, name: str, devices: int = 4, micro_batches: int = 2):
        self.objective = tiny_objective(budget=dict(name="dirichlet", alphas=1.0), **OUTPUTS, **MASKING[name])
        self.mesh = make_mesh(jax.devices()[:devices])
        rows = record_rows(RECORDS, self.mesh)
        shapes, _ = jax.eval_shape(self.objective.init, jax.random.key(0))
        optimizer = adamw(shapes, frozen_mask(shapes), Cosine(peak=1e-3, total=1000))
        start = functools.partial(init_state, self.objective, optimizer, 0, rows)
        shardings = parameter_shardings(jax.eval_shape(start), self.mesh)
        self.state = jax.device_put(start(), shardings)  # a compiled start would take as long as a third of the step
        self.rng = np.random.default_rng(0)
        step = functools.partial(
            train_step, objective=self.objective, optimizer=optimizer, seed=0, micro_batches=micro_batches, mesh=self.mesh
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(self.mesh)))
        self.compiled = jitted.lower(self.state, self.batch()).compile()

    def batch(self):
        """Other pictures of other records at every call."""
        arrays = tiny_batch(BATCH, seed=int(self.rng.integers(1000)))
        length = self.rng.uniform(0.5, 1.0, (BATCH, 2))
        arrays |= dict(
            index=self.rng.permutation(RECORDS)[:BATCH].astype(np.int32),
            box=np.concatenate([self.rng.uniform(0, 1 - length), length], axis=1).astype(np.float32),
            flip=self.rng.random(BATCH) < 0.5,
        )
        return place_batch(arrays, self.mesh)

    def losses(self, steps: int) -> list[float]:
        """The losses of the next steps."""
        found = []
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, self.batch())
            found.append(float(metrics["loss"][0]))
        return found


compiled = functools.cache(Step)


def computations(program: str) -> dict[str, list[str]]:
    """The lines of every computation of a compiled program, by name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in program.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header and not line.startswith(" "):
            lines = found.setdefault(header.group(1), [])
        elif line.startswith(" "):
            lines.append(line)
    return found


def inside_loops(program: str) -> list[str]:
    """The lines of all bodies and conditions of loops, and of what they call."""
    parts = computations(program)
    called = {
        name: {other for line in lines for other in re.findall(r"%([\w.\-]+)", line) if other in parts} for name, lines in parts.items()
    }
    waiting = [name for lines in parts.values() for line in lines for name in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)]
    assert waiting, "the program has no loop: its text was not understood"
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += called[name]
    return [line for name in sorted(seen) for line in parts[name]]


def exchanges(lines: list[str]) -> list[tuple[str, str]]:
    """(kind, type of the result) of everything that devices exchange."""
    return [(found.group(2), found.group(1)) for found in map(EXCHANGE.search, lines) if found]


@pytest.mark.parametrize("name", MASKING)
def test_nothing_is_exchanged_inside_a_loop_or_a_mask(name):
    program = compiled(name).compiled.as_text()
    assert not exchanges(inside_loops(program))
    found = exchanges(program.splitlines())
    assert found
    # Masks, orders and counts of tokens are bools and integers "b n" and "b m"; the numbers of records that rows are of are "b 1".
    masks = [kind for _, kind in found if re.search(r"\b(pred|s32|u32|s64|u8)\[\d+,(?!1\])\d+", kind)]
    assert not masks, masks


@pytest.mark.parametrize("name", MASKING)
def test_gradients_are_added_up_once_and_in_float32(name):
    step = compiled(name)
    found = [kind for what, kind in exchanges(step.compiled.as_text().splitlines()) if what == "all-reduce"]
    elements = lambda kind: [(t, int(np.prod([int(n) for n in s.split(",") if n]))) for t, s in re.findall(r"(\w+)\[([\d,]*)\]", kind)]  # noqa: E731
    reduced = [part for kind in found for part in elements(kind)]
    trained = sum(
        x.size for x, frozen in zip(*map(jax.tree.leaves, (step.state.params, frozen_mask(step.state.params))), strict=True) if not frozen
    )
    total = sum(size for kind, size in reduced if kind == "f32")
    rows = BATCH * 3 * 8 * 8
    assert (
        trained <= total <= trained + 3 * sum(x.size for x in jax.tree.leaves(step.state.objective_state) if x.dtype == np.float32) + 1000
    )
    assert all(size <= rows for kind, size in reduced if kind != "f32")


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_is_kept_per_record_lies_spread_and_is_never_copied(name):
    step = compiled(name)
    table = step.state.objective_state["guidance"]
    table = table["maps"] if isinstance(table, dict) else table
    assert table.shape == (40, 3 * 8 * 8) and table.addressable_shards[0].data.shape == (10, 3 * 8 * 8)
    lines = step.compiled.as_text().splitlines()
    made = [line for line in lines if re.match(r"\s+(?:ROOT )?%[\w.\-]+ = f16\[(?:10|40|37),192\]", line)]
    kinds = {re.search(r"\} ([\w\-]+)\(", line).group(1) for line in made}
    assert "parameter" in kinds
    assert not kinds & {"copy", "select", "all-gather", "all-reduce", "concatenate", "pad", "convert"}, kinds


def test_four_devices_remember_what_one_does():
    # Sums over devices round differently, and maps are float16. The losses of other guidance: test_sharding.py.
    one, four = Step("predicted_attention", devices=1), compiled("predicted_attention")
    np.testing.assert_allclose(four.losses(6), one.losses(6), rtol=1e-5)
    ours, theirs = (jax.tree.map(np.asarray, step.state.objective_state["guidance"]) for step in (one, four))
    for mine, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(other[: len(mine)], mine, rtol=0, atol=5e-3)
    assert np.isfinite(theirs["maps"][:RECORDS]).any() and np.isnan(theirs["maps"][RECORDS:]).all()
