"""Random cells of the grid (objective x decoder x inputs x source x scores x budget x weight x schedule x what is predicted): two steps
of each, and self-distillation under random scores.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
from tiny import MODALITIES, assert_same_bits, counting, on_device, tiny_batch

from maskvit.core.keys import sample_keys
from maskvit.core.types import Batch
from maskvit.guidance import GUIDANCE
from maskvit.heads import DECODERS
from maskvit.masking.budgets import BUDGETS
from maskvit.masking.plan import present_counts
from maskvit.masking.scores import GUIDED_SCORES, SCORES
from maskvit.nn.backbone import frozen_mask
from maskvit.objectives import build_objective
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.training.step import init_state, train_step

BATCH, RECORDS = 8, 20
# What a row needs beside its name.
SOURCE_FIELDS: dict[str, dict[str, Any]] = {
    "stored": dict(path="maps"),
    "random_map": dict(of=dict(name="self_attention", heads="random", renormalise=True)),
    "teacher_attention": dict(query="mean", heads=(0, 2), block=0),
    "reused_attention": dict(every=4, view="whole", grid=6),
    "predicted_attention": dict(after=1, every=2, grid=6, solve_every=1),
}
SCORE_FIELDS: dict[str, dict[str, Any]] = {"attention_stochastic": dict(alpha=0.3), "color": dict(kind="red")}
BUDGET_FIELDS: dict[str, dict[int, dict[str, Any]]] = {"fixed": {1: dict(counts=(4,)), 2: dict(counts=(7, 3)), 3: dict(counts=(5, 4, 3))}}
INPUTS = (("rgb",), ("rgb", "depth"), ("rgb", "depth", "semseg"))
NUM_VISIBLE = {1: 4, 2: 10, 3: 12}
SIZES: dict[str, Any] = dict(encoder=dict(width=48, depth=2, heads=3))
# The objective, and what its decoders are called where that is free.
OBJECTIVES = (("multimae", "spatial"), ("mae", None), ("crossmae", None), ("multimae", "crossmae"), ("multimae", "mae"))


def draw_cells(seed: int) -> list[dict[str, Any]]:
    """As many cells as the longest table has rows, drawn so that every row of every table occurs."""
    rng = random.Random(seed)
    tables = (GUIDANCE, SCORES, BUDGETS)
    drawn = [_shuffled_forever(rng, sorted(table)) for table in tables]
    cells = []
    for i in range(max(map(len, tables))):
        inputs = INPUTS[i % 3]
        source, score, budget = (next(rows) for rows in drawn)
        name, decoder = OBJECTIVES[i % len(OBJECTIVES)]
        cell = dict(
            name=name,
            decoder=dict(width=16, depth=1, heads=4, **(dict(name=decoder) if decoder else {})),
            inputs=inputs,
            # One input: two outputs or three. More inputs: their own outputs alone, which compile faster.
            outputs=(*inputs, *(["norm_rgb"] if inputs == ("rgb",) else []), *(["depth"] if inputs == ("rgb",) and i % 2 else [])),
            **_how_many(name, len(inputs)),
            guidance=dict(name=source, **SOURCE_FIELDS.get(source, {})),
            scores=dict(name=score, **SCORE_FIELDS.get(score, {})),
            budget=dict(name=budget, **BUDGET_FIELDS.get(budget, {}).get(len(inputs), {})),
        )
        # Scores without guidance leave it to the loss weights.
        if score not in GUIDED_SCORES or rng.random() < 0.3:
            cell["loss_weight"] = rng.choice([dict(tau=0.75), dict(tau=(0.8, 0.7), over=2)])
        if rng.random() < 0.4:
            cell["guided_share"] = dict(share=(0.25, 1.0), start=1, ramp=4)
        if rng.random() < 0.4:
            which = rng.choice(["scores", "random"])
            cell |= dict(kept_mask_ratio=0.25, predict_by=which) if name == "crossmae" else dict(predicted=dict(share=0.5, by=which))
        cells.append(cell)
    return cells


def _how_many(name: str, inputs: int) -> dict[str, Any]:
    """The tokens shown, as each objective asks for them: 16 per input."""
    visible = NUM_VISIBLE[inputs]
    return dict(num_visible=visible) if name == "multimae" else dict(mask_ratio=1 - visible / (16 * inputs))


def _shuffled_forever(rng: random.Random, names: list[str]) -> Any:
    while True:
        rng.shuffle(names)
        yield from names


def cell_batch(objective: Any, seed: int, present: bool) -> Batch:
    """A batch with all that the objective's source asks for."""
    names = objective.model.inputs
    batch = tiny_batch(BATCH, seed, present=present and len(names) == 3)
    rng = np.random.default_rng(seed)
    batch["index"] = rng.permutation(RECORDS)[:BATCH].astype(np.int32)
    batch["box"] = np.tile(np.array([[0.1, 0.2, 0.7, 0.6]], np.float32), (BATCH, 1))
    batch["flip"] = rng.random(BATCH) < 0.5
    batch["guidance"] = rng.random((BATCH, 1, 4, 4)).astype(np.float32)
    needs = objective.needs
    whole = needs.whole_every
    wanted = {*names, *(spec.name for spec in objective.model.modalities), "present", *needs.record}
    wanted |= {"guidance"} if needs.maps or needs.blocks else set()
    kept = {name: value for name, value in batch.items() if name in wanted}
    if whole:
        kept |= {f"whole/{name}": tiny_batch(BATCH // whole, seed + 100)[name] for name in names}
    return on_device(kept)


CELLS = draw_cells(seed=0)


def test_every_row_of_every_table_occurs():
    drawn = {kind: {cell[kind]["name"] for cell in CELLS} for kind in ("guidance", "scores", "budget")}
    assert drawn == {"guidance": set(GUIDANCE), "scores": set(SCORES), "budget": set(BUDGETS)}
    assert {decoder or name for name, decoder in OBJECTIVES} == set(DECODERS)


IDS = ["-".join(cell[key] if key == "name" else cell[key]["name"] for key in ("name", "guidance", "scores", "budget")) for cell in CELLS]


@pytest.mark.parametrize("number", range(len(CELLS)), ids=IDS)
def test_two_steps_of_a_random_cell(number):
    objective = build_objective(dict(image_size=(32, 32), modalities=MODALITIES, objective={**SIZES, **CELLS[number]}))
    schedule = Cosine(1e-3, 10, 1, 0, 0.0)
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), schedule)
    state = init_state(objective, optimizer, 0, RECORDS)
    step, traces = counting(
        partial(train_step, objective=objective, optimizer=optimizer, seed=0, micro_batches=2 if number % 3 == 0 else 1)
    )

    def planned(state: Any, batch: Any, loss_limit: Any) -> Any:
        """The step, and its plan: made twice in one program, the compiler makes it once."""
        plan = objective.plan(state.params, batch, sample_keys(0, state.step, BATCH), state.objective_state, state.step)[0]
        return step(state, batch, loss_limit=loss_limit), plan

    jitted = jax.jit(planned)
    present = number % 2 == 0
    for i in range(2):
        batch = cell_batch(objective, i, present)
        (state, metrics), plan = jitted(state, batch, np.float32(np.inf))
        assert np.isfinite(metrics["loss"][0]), metrics
        assert metrics["skipped"][0] == 0
        check_counts(plan, objective, batch)
    (refused, metrics), _ = jitted(state, cell_batch(objective, 2, present), np.float32(-np.inf))
    assert metrics["skipped"][0] == 1
    assert_same_bits(refused, state)
    assert len(traces) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def check_counts(plan: Any, objective: Any, batch: Batch) -> None:
    """Exactly `num_visible` tokens are seen (all, where a sample has fewer), and as many predicted as asked for."""
    layout = objective.model.layout
    tokens = objective.prepare(batch).present
    there = np.asarray(present_counts(layout, tokens, BATCH))
    visible = np.minimum(objective.num_visible, there.sum(axis=1))
    masked = np.asarray(plan.masked)
    np.testing.assert_array_equal((~masked).sum(axis=1), visible)
    np.testing.assert_array_equal(np.asarray(plan.visible_valid).sum(axis=1), visible)
    hidden = np.stack([there[:, i] - (~masked[:, span]).sum(axis=1) for i, span in enumerate(layout.spans())], axis=1)
    share = objective.predicted.share if objective.predicted else 1.0
    predicted = np.maximum(np.round(share * hidden), np.minimum(hidden, 1)).sum(axis=1)
    np.testing.assert_array_equal(np.asarray(plan.predicted_valid).sum(axis=1), predicted)
    budget = objective.budget[0]
    if budget is BUDGETS["fixed"] and tokens is None:
        counts = dict(objective.budget[1])["counts"]
        np.testing.assert_array_equal(there - hidden, np.tile(counts, (BATCH, 1)))
    if plan.loss_weights is not None:
        assert np.asarray(plan.loss_weights).min() >= 1.0


# Self-distillation

SCORES_OF_IBOT = random.Random(0).sample(sorted(SCORES), 3)


@pytest.mark.parametrize("name, scores", [("dino", None), *(("ibot", score) for score in SCORES_OF_IBOT)])
def test_two_steps_of_self_distillation(name, scores):
    block: dict[str, Any] = dict(name=name, projection=dict(hidden=32, bottleneck=16, num_prototypes=24), **SIZES)
    if scores:
        block |= dict(scores=dict(name=scores, **SCORE_FIELDS.get(scores, {})), masking=dict(ratio=0.4, ratio_var=0.0, probability=1.0))
    objective = build_objective(dict(image_size=(32, 32), modalities=MODALITIES, objective=block)).resolve(lambda duration: 10)
    shapes = jax.eval_shape(lambda key: objective.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes, objective.model), Cosine(1e-3, 10, 1, 0, 0.0))
    state = init_state(objective, optimizer, 0, RECORDS)
    step, traces = counting(partial(train_step, objective=objective, optimizer=optimizer, seed=0))
    jitted = jax.jit(step)
    rng = np.random.default_rng(0)
    for _ in range(2):
        batch = {f"{kind}/rgb": rng.integers(0, 256, (4, 2, side, side, 3), np.uint8) for kind, side in (("global", 32), ("local", 16))}
        state, metrics = jitted(state, on_device(batch))
        assert np.isfinite(metrics["loss"][0]) and metrics["skipped"][0] == 0, metrics
        if scores:
            total, count = metrics["masked_share"]
            # 6 of 16 tokens; hints show at most the one that is a tenth of them.
            assert abs(total / count - 6 / 16) < 1e-6 or scores == "attention_hint"
    assert len(traces) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
