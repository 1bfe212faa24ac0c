"""Scores, budgets, and plans: exact counts, the reference's statistics, static shapes, no dependence on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import counting

from maskvit.core.keys import sample_keys, stream_keys
from maskvit.core.types import MaskPlan, TokenLayout
from maskvit.masking.budgets import BUDGETS, dirichlet_budget
from maskvit.masking.plan import drop, gather_tokens, mix_with_random, predicted_mask, present_counts, show_all
from maskvit.masking.scores import SCORES, attention_high, attention_low, random_scores
from maskvit.sharding import batch_sharding, make_mesh

NAMES = ("rgb", "depth", "semseg")
OPTIONS = {"attention_stochastic": {"alpha": 0.5}}  # what a row needs beside guidance


def score(name: str, keys: jax.Array, layout: TokenLayout, guidance: jax.Array | None) -> jax.Array:
    """A row of `SCORES`."""
    return SCORES[name](keys, layout, guidance, **OPTIONS.get(name, {}))


SMALL = TokenLayout(NAMES, ((4, 4), (4, 4), (4, 4)))
UNEVEN = TokenLayout(NAMES, ((4, 6), (2, 3), (1, 5)))
FULL = TokenLayout(NAMES, ((14, 14),) * 3)


def token_presence(layout: TokenLayout, rows: Sequence[Sequence[int]]) -> jax.Array:
    """(b, m) zeros and ones to (b, n)."""
    return jnp.asarray(np.repeat(np.array(rows, bool), layout.sizes, axis=1))


def guidance_of(layout: TokenLayout, samples: int, seed: int = 0, levels: int = 0) -> jax.Array:
    """Random importance; with `levels` only that many values, so that there are ties."""
    rng = np.random.default_rng(seed)
    shape = (samples, layout.num_tokens)
    values = rng.integers(0, levels, shape) / 8 if levels else rng.random(shape)
    return jnp.asarray(values, jnp.float32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def plan_of(name: str, layout: TokenLayout, num_visible: int, keys: jax.Array, guidance: jax.Array, present=None) -> MaskPlan:
    """Scores, a Dirichlet budget, and a plan."""
    scores = score(name, stream_keys(keys, "scores"), layout, guidance)
    counts = dirichlet_budget(stream_keys(keys, "budget"), layout, num_visible, present)
    return drop(scores, counts, layout, num_visible, present)


def make_plan(name: str, layout: TokenLayout, num_visible: int, samples: int, present=None) -> MaskPlan:
    return plan_of(name, layout, num_visible, sample_keys(0, 0, samples), guidance_of(layout, samples), present)


def plans(keys: jax.Array, layout: TokenLayout, num_visible: int, guidance: jax.Array, present=None) -> dict[str, MaskPlan]:
    """What `plan_of` says for each row of `SCORES`: one program, for the budget takes longest to compile, and all share it.

    `drop` works sample by sample: it gets the scores of all rows as so many samples.
    """
    rows, samples = len(SCORES), len(guidance)
    counts = dirichlet_budget(stream_keys(keys, "budget"), layout, num_visible, present)
    keys = stream_keys(keys, "scores")
    scores = jnp.stack([score(name, keys, layout, guidance) for name in SCORES])
    of_all = lambda x: None if x is None else jnp.broadcast_to(x, (rows, *x.shape)).reshape(-1, x.shape[1])  # noqa: E731
    plan = drop(scores.reshape(-1, layout.num_tokens), of_all(counts), layout, num_visible, of_all(present))
    apart = jax.tree.map(lambda x: x.reshape(rows, samples, *x.shape[1:]), plan)
    return {name: jax.tree.map(lambda x, i=i: x[i], apart) for i, name in enumerate(SCORES)}


jitted_plans = jax.jit(plans, static_argnums=(1, 2))


@cache
def made_plans(layout: TokenLayout, num_visible: int, samples: int, rows: tuple[tuple[int, ...], ...] | None = None):
    present = None if rows is None else token_presence(layout, rows)
    return jitted_plans(sample_keys(0, 0, samples), layout, num_visible, guidance_of(layout, samples), present)


jitted_budget = jax.jit(dirichlet_budget, static_argnums=(1, 2), static_argnames="alphas")
jitted_drop = jax.jit(drop, static_argnums=(2, 3))
jitted_mix = jax.jit(mix_with_random, static_argnums=3)


def check_invariants(plan: MaskPlan, layout: TokenLayout, num_visible: int, present: np.ndarray | None = None) -> None:
    """What every plan promises."""
    plan = jax.tree.map(np.asarray, plan)
    samples, n = plan.masked.shape
    assert plan.visible_ids.shape == (samples, num_visible) and plan.predicted_ids.shape == (samples, n - num_visible)
    assert n == layout.num_tokens
    present = np.ones((samples, n), bool) if present is None else np.asarray(present)
    for i in range(samples):
        visible = plan.visible_ids[i][plan.visible_valid[i]]
        predicted = plan.predicted_ids[i][plan.predicted_valid[i]]
        assert (np.diff(visible) > 0).all() and (np.diff(predicted) > 0).all()
        assert len(visible) == min(num_visible, present[i].sum())
        np.testing.assert_array_equal(np.sort(np.concatenate([visible, predicted])), np.flatnonzero(present[i]))
        np.testing.assert_array_equal(np.flatnonzero(~plan.masked[i]), visible)
        assert plan.masked[i][plan.visible_ids[i][~plan.visible_valid[i]]].all(), "padding slots must point at hidden tokens"
        assert len(set(plan.visible_ids[i])) == num_visible, "ids must be unique: the gather promises it"


# Plans


@pytest.mark.parametrize("layout,num_visible", [(SMALL, 12), (UNEVEN, 1), (UNEVEN, 34)])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_exactly_k_tokens_are_visible(name, layout, num_visible):
    plan = made_plans(layout, num_visible, samples=64)[name]
    check_invariants(plan, layout, num_visible)
    assert plan.visible_valid.all() and plan.predicted_valid.all()
    np.testing.assert_array_equal((~plan.masked).sum(axis=1), num_visible)
    np.testing.assert_array_equal(predicted_mask(plan), plan.masked)


@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize("name", ["attention_high", "attention_low", "random"])
def test_hidden_are_the_highest_scored_of_each_modality_ties_by_lower_index(name, levels):
    samples, num_visible = 32, 14
    guidance = guidance_of(UNEVEN, samples, seed=3, levels=levels)
    keys = sample_keys(3, 0, samples)
    counts = jitted_budget(keys, UNEVEN, num_visible)
    plan = jax.tree.map(np.asarray, jitted_drop(score(name, keys, UNEVEN, guidance), counts, UNEVEN, num_visible))
    scores = {"attention_high": guidance, "attention_low": -guidance, "random": random_scores(keys, UNEVEN)}[name]
    scores, counts = np.asarray(scores), np.asarray(counts)
    for i in range(samples):
        for j, span in enumerate(UNEVEN.spans()):
            ranked = sorted(range(UNEVEN.sizes[j]), key=lambda t: (-scores[i, span][t], t))  # noqa: B023
            hidden = sorted(ranked[: UNEVEN.sizes[j] - counts[i, j]])
            np.testing.assert_array_equal(np.flatnonzero(plan.masked[i, span]), hidden)


def test_equal_scores_hide_the_lower_index_first():
    counts = jnp.array([[4, 16, 1]])
    plan = jitted_drop(jnp.zeros((1, 48)), counts, SMALL, 21)
    np.testing.assert_array_equal(plan.masked[0], np.r_[np.arange(16) < 12, np.zeros(16, bool), np.arange(16) < 15])


def test_high_and_low_are_opposites():
    guidance = guidance_of(SMALL, 4)
    np.testing.assert_array_equal(attention_high(sample_keys(0, 0, 4), SMALL, guidance), guidance)
    np.testing.assert_array_equal(attention_low(sample_keys(0, 0, 4), SMALL, guidance), -guidance)


@pytest.mark.parametrize("name", ["attention_high", "attention_low"])
def test_guided_scores_without_guidance_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name}.*config.objective.guidance"):
        score(name, sample_keys(0, 0, 2), SMALL, None)


PRESENCE = ((1, 1, 1), (1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 0, 1), (0, 0, 0))


@pytest.mark.parametrize("name", sorted(SCORES))
@pytest.mark.parametrize("num_visible", [5, 20])
def test_absent_tokens_are_never_visible_nor_predicted(name, num_visible):
    # With 20 visible tokens several samples have too few: all they have is shown, the other slots are invalid.
    present = token_presence(UNEVEN, PRESENCE)
    plan = made_plans(UNEVEN, num_visible, len(PRESENCE), PRESENCE)[name]
    check_invariants(plan, UNEVEN, num_visible, present)
    assert not np.asarray(~plan.masked & ~present).any()
    assert not np.asarray(predicted_mask(plan) & ~present).any()


def test_single_missing_tokens_are_respected():
    present = jnp.asarray(np.random.default_rng(0).random((40, 48)) < 0.5)
    plan = make_plan("attention_high", SMALL, 12, 40, present)
    check_invariants(plan, SMALL, 12, present)
    # Also when the guidance ranks absent tokens lowest, where a naive rule would show them.
    counts = jitted_budget(sample_keys(0, 0, 40), SMALL, 12, present)
    check_invariants(jitted_drop(jnp.where(present, 1.0, 0.0), counts, SMALL, 12, present), SMALL, 12, present)


def test_presence_of_everything_changes_nothing():
    everything = jnp.ones((64, 48), bool)
    for ours, theirs in zip(make_plan("random", SMALL, 12, 64), make_plan("random", SMALL, 12, 64, everything), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_show_all_hides_only_what_is_absent():
    plan = show_all(SMALL, 3)
    np.testing.assert_array_equal(plan.visible_ids, np.broadcast_to(np.arange(48), (3, 48)))
    assert plan.visible_valid.all() and not plan.masked.any() and plan.predicted_ids.shape == (3, 0)
    present = token_presence(SMALL, PRESENCE)
    np.testing.assert_array_equal(show_all(SMALL, len(PRESENCE), present).masked, ~present)


def test_gather_takes_rows_and_its_gradient_goes_back_there():
    tokens = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 3)), jnp.float32)
    ids = jnp.array([[0, 3], [4, 5]])
    np.testing.assert_array_equal(gather_tokens(tokens, ids), np.stack([np.asarray(tokens)[i, ids[i]] for i in range(2)]))
    gradient = jax.grad(lambda t: (gather_tokens(t, ids) * 2).sum())(tokens)
    np.testing.assert_array_equal(gradient[:, :, 0], [[2, 0, 0, 2, 0, 0], [0, 0, 0, 0, 2, 2]])


# The Dirichlet budget


def reference_counts(samples: int, num_visible: int, sizes: tuple[int, ...], alphas: float, seed: int = 0) -> np.ndarray:
    """The published algorithm, step by step in numpy: visible tokens per modality, "samples modalities"."""
    rng = np.random.default_rng(seed)
    targets = np.round(num_visible * rng.dirichlet([alphas] * len(sizes), samples))
    permutations = [np.argsort(rng.random((samples, size)), axis=1) for size in sizes]
    hidden = np.concatenate([place >= targets[:, i, None] for i, place in enumerate(permutations)], axis=1)
    keep = np.argsort(hidden + rng.random(hidden.shape), axis=1)[:, :num_visible]
    return np.stack([(np.repeat(np.arange(len(sizes)), sizes)[keep] == i).sum(axis=1) for i in range(len(sizes))], axis=1)


def drawn_counts(samples: int, num_visible: int, alphas: float | tuple[float, ...] = 1.0, layout: TokenLayout = FULL) -> np.ndarray:
    return np.asarray(jitted_budget(sample_keys(0, 0, samples), layout, num_visible, alphas=alphas))


def largest_cdf_gap(one: np.ndarray, other: np.ndarray, top: int) -> float:
    """The Kolmogorov-Smirnov statistic of two samples of counts 0 ... top."""
    cdf = [np.cumsum(np.bincount(x, minlength=top + 1)) / len(x) for x in (one, other)]
    return float(np.abs(cdf[0] - cdf[1]).max())


def test_dirichlet_counts_have_the_references_statistics():
    counts = drawn_counts(20_000, 98)
    assert (counts.sum(axis=1) == 98).all() and counts.min() == 0 and counts.max() >= 97
    np.testing.assert_allclose(counts.mean(axis=0), 98 / 3, atol=0.5)  # standard error 0.16
    np.testing.assert_allclose(counts.std(axis=0), 23.1, atol=0.4)
    reference = reference_counts(20_000, 98, FULL.sizes, 1.0)
    # 2,000,000 simulated draws: one modality is empty in 0.917 % of samples, any of them in 2.74 %.
    for drawn in (counts, reference):
        np.testing.assert_allclose((drawn == 0).mean(), 0.00917, atol=0.0012)
        np.testing.assert_allclose((drawn == 0).any(axis=1).mean(), 0.0274, atol=0.0036)
    for modality in range(3):
        # 0.1 % critical value of the two-sample test: 1.95 sqrt(2 / 20000).
        assert largest_cdf_gap(counts[:, modality], reference[:, modality], 98) < 0.0195


def test_rounding_is_half_to_even_and_repaired_uniformly():
    # Few tokens make roundings, repairs and clamps matter: compare the whole joint distribution with the simulation.
    draws = drawn_counts(40_000, 9, layout=UNEVEN), reference_counts(40_000, 9, UNEVEN.sizes, 1.0)
    frequencies = [np.bincount(np.ravel_multi_index(tuple(x.T), (10, 10, 10)), minlength=1000) / len(x) for x in draws]
    assert np.abs(frequencies[0] - frequencies[1]).max() < 0.004
    assert np.abs(frequencies[0] - frequencies[1]).sum() < 0.06
    assert set(np.flatnonzero(frequencies[0] > 2e-3)) <= set(np.flatnonzero(frequencies[1]))


def test_a_small_alpha_spreads_the_counts():
    counts = drawn_counts(20_000, 98, 0.1)
    assert (counts.sum(axis=1) == 98).all()
    np.testing.assert_allclose(counts.std(axis=0), 40.6, atol=0.4)
    reference = reference_counts(10_000, 98, FULL.sizes, 0.1)
    assert largest_cdf_gap(counts.reshape(-1), reference.reshape(-1), 98) < 0.02


def test_an_alpha_near_zero_gives_finite_counts():
    counts = drawn_counts(500, 98, 1e-5)
    assert (counts.sum(axis=1) == 98).all()
    assert ((counts == 98).sum(axis=1) == 1).mean() > 0.99


def test_a_budget_beyond_a_modalitys_tokens_is_repaired():
    counts = drawn_counts(5_000, 400)
    assert counts.max() == 196 and (counts.sum(axis=1) == 400).all()
    reference = reference_counts(3_000, 400, FULL.sizes, 1.0)
    assert largest_cdf_gap(counts.reshape(-1), reference.reshape(-1), 196) < 0.03


def test_alphas_may_be_an_integer_or_one_per_modality():
    np.testing.assert_array_equal(drawn_counts(100, 98, 1), drawn_counts(100, 98, 1.0))
    np.testing.assert_array_equal(drawn_counts(100, 98, (1.0, 1.0, 1.0)), drawn_counts(100, 98, 1.0))
    skewed = drawn_counts(4_000, 98, (4.0, 1.0, 0.5)).mean(axis=0)
    np.testing.assert_allclose(skewed, 98 * np.array([4, 1, 0.5]) / 5.5, atol=1.2)


@pytest.mark.parametrize(
    "alphas,message", [((1.0, 1.0), "2 values for 3 modalities"), ((1.0, 0.0, 1.0), "must be positive"), (-1, "must be positive")]
)
def test_bad_alphas_are_errors(alphas, message):
    with pytest.raises(ValueError, match=f"config.objective.budget.alphas.*{message}"):
        dirichlet_budget(sample_keys(0, 0, 2), SMALL, 12, alphas=alphas)


def test_absent_modalities_get_no_budget():
    present = token_presence(UNEVEN, PRESENCE * 50)
    counts = np.asarray(jitted_budget(sample_keys(0, 0, present.shape[0]), UNEVEN, 20, present))
    sizes = np.asarray(present_counts(UNEVEN, present, present.shape[0]))
    assert (counts <= sizes).all()
    np.testing.assert_array_equal(counts.sum(axis=1), np.minimum(20, sizes.sum(axis=1)))


# Compilation and devices


@pytest.fixture(scope="module")
def four_batches():
    """The plans of four batches that lack different things, with what is there, and how often the function was traced."""
    counted, traces = counting(lambda keys, guidance, present: plans(keys, SMALL, 12, guidance, present))
    compiled, batches = jax.jit(counted), []
    for step in range(4):
        present = token_presence(SMALL, [[1, step % 2, 1], [1, 1, 1]] * 4)
        batches.append((compiled(sample_keys(0, step, 8), guidance_of(SMALL, 8, step), present), present))
    return batches, len(traces)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_one_compilation_serves_all_batches(name, four_batches):
    batches, traces = four_batches
    for made, present in batches:
        check_invariants(made[name], SMALL, 12, present)
    assert traces == 1


@pytest.fixture(scope="module")
def on_one_and_four():
    """The plans of one batch on one device (a program that `made_plans` compiles too), and spread over four."""
    keys, guidance = sample_keys(5, 7, 64), guidance_of(SMALL, 64)
    spread = jax.device_put((keys, guidance), batch_sharding(make_mesh(jax.devices()[:4])))
    return [jitted_plans(k, SMALL, 12, g, None) for k, g in ((keys, guidance), spread)]


@pytest.mark.parametrize("name", sorted(SCORES))
def test_plans_do_not_depend_on_the_devices(name, on_one_and_four):
    on_one, on_four = (made[name] for made in on_one_and_four)
    assert len(on_four.masked.sharding.device_set) == 4
    for one, four in zip(on_one, on_four, strict=True):
        np.testing.assert_array_equal(one, four)


def test_a_samples_plan_depends_on_its_key_alone():
    keys = sample_keys(0, 3, 8)
    order = np.array([3, 1, 7, 0, 2, 6, 5, 4])
    guidance = guidance_of(SMALL, 8)
    both = [plan_of("random", SMALL, 12, k, guidance) for k in (keys, keys[order])]
    np.testing.assert_array_equal(both[0].masked[order], both[1].masked)
    one = plan_of("random", SMALL, 12, keys[2:3], guidance[:1])
    np.testing.assert_array_equal(one.masked[0], both[0].masked[2])
    assert len({row.tobytes() for row in np.asarray(both[0].masked)}) == 8, "samples must differ"


# The other budgets


@partial(jax.jit, static_argnums=(0, 1, 2), static_argnames=("options",))
def spend(name: str, layout: TokenLayout, num_visible: int, keys: jax.Array, present=None, scores=None, averages=None, options=()):
    """A row of `BUDGETS`."""
    return BUDGETS[name](keys, layout, num_visible, present, scores, averages, **dict(options))


BUDGET_OPTIONS = {"fixed": (("counts", (5, 4, 3)),)}


@pytest.mark.parametrize("name", sorted(BUDGETS))
def test_budgets_add_up(name):
    keys, scores = sample_keys(0, 0, 256), guidance_of(SMALL, 256)
    options = BUDGET_OPTIONS.get(name, ())
    counts = np.asarray(spend(name, SMALL, 12, keys, None, scores, options=options))
    assert (counts.sum(axis=1) == 12).all() and counts.min() >= 0 and counts.max() <= 16
    rows = np.random.default_rng(0).random((256, 3)) < 0.6
    rows[:, 1] |= ~rows.any(axis=1)
    present = token_presence(SMALL, rows.tolist())
    counts = np.asarray(spend(name, SMALL, 12, keys, present, scores, options=options))
    np.testing.assert_array_equal(counts.sum(axis=1), np.minimum(12, 16 * rows.sum(axis=1)))
    assert (counts[~rows] == 0).all()


def test_equal_and_fixed_budgets():
    keys = sample_keys(0, 0, 300)
    np.testing.assert_array_equal(spend("equal", SMALL, 12, keys), np.full((300, 3), 4))
    uneven = np.asarray(spend("equal", SMALL, 14, keys))
    assert set(np.unique(uneven)) <= {4, 5, 6} and (uneven.mean(axis=0) > 4.5).all()  # the two left over go anywhere
    np.testing.assert_array_equal(spend("fixed", SMALL, 12, keys, options=BUDGET_OPTIONS["fixed"]), np.tile([5, 4, 3], (300, 1)))
    for counts, message in (((5, 4, 4), "together config.objective.num_visible = 12"), ((17, -5, 0), "one number for each")):
        with pytest.raises(ValueError, match=message):
            spend("fixed", SMALL, 12, keys, options=(("counts", counts),))
    with pytest.raises(ValueError, match="shows more tokens of 'depth' than it has"):
        spend("fixed", UNEVEN, 12, keys, options=(("counts", (2, 8, 2)),))


def test_uniform_subsets_are_uniform():
    counts = np.asarray(spend("uniform_subsets", FULL, 98, sample_keys(0, 0, 7000)))
    shown = counts > 0
    patterns, times = np.unique(shown, axis=0, return_counts=True)
    assert len(patterns) == 7 and np.abs(times / 7000 - 1 / 7).max() < 0.02  # 0.0042 standard deviation
    equal_parts = {1: (98,), 2: (49, 49), 3: (32, 33)}
    for size, parts in equal_parts.items():
        here = counts[shown.sum(axis=1) == size]
        assert np.abs(np.sort(here, axis=1)[:, -1] - max(parts)).max() <= 2


def test_the_joint_budget_ranks_all_modalities_together():
    scores = guidance_of(UNEVEN, 50, levels=6)
    counts = spend("joint", UNEVEN, 9, sample_keys(0, 0, 50), None, scores)
    plan = drop(scores, counts, UNEVEN, 9)
    values, masked = np.asarray(scores), np.asarray(plan.masked)
    for row, hidden in zip(values, masked, strict=True):
        assert (~hidden).sum() == 9 and row[~hidden].max() <= row[hidden].min()
    with pytest.raises(ValueError, match="joint budget needs scores"):
        BUDGETS["joint"](sample_keys(0, 0, 2), UNEVEN, 9)


@pytest.mark.parametrize("strength,moves", [(1.0, "more"), (-1.0, "less"), (0.0, "not")])
def test_adaptive_alphas_move_the_shares(strength, moves):
    keys = sample_keys(0, 0, 4000)
    options = (("strength", strength), ("alphas", 2.0))
    averages = jnp.array([0.5, 1.0, 2.0])
    share = np.asarray(spend("adaptive_dirichlet", FULL, 98, keys, None, None, averages, options=options)).mean(axis=0) / 98
    expected = np.array(averages) ** strength / (np.array(averages) ** strength).sum()
    np.testing.assert_allclose(share, expected, atol=0.01)  # the mean of a Dirichlet draw is alpha over their sum
    assert {"more": share[2] > share[0] + 0.1, "less": share[2] < share[0] - 0.1, "not": abs(share[2] - share[0]) < 0.02}[moves]
    before = spend("adaptive_dirichlet", FULL, 98, keys, None, None, jnp.zeros(3), options=options)
    np.testing.assert_array_equal(before, spend("dirichlet", FULL, 98, keys, options=(("alphas", 2.0),)))


def test_asymmetric_alphas():
    counts = np.asarray(spend("dirichlet", FULL, 98, sample_keys(0, 0, 4000), options=(("alphas", (1.0, 2.0, 5.0)),)))
    np.testing.assert_allclose(counts.mean(axis=0) / 98, [0.125, 0.25, 0.625], atol=0.012)


# Easy to hard, and what is predicted


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_guided_share_of_the_hidden_tokens(share):
    keys, scores = sample_keys(0, 0, 400), guidance_of(SMALL, 400)
    counts = jitted_budget(stream_keys(keys, "budget"), SMALL, 12)
    mixed = jitted_mix(stream_keys(keys, "share"), scores, counts, SMALL, share)
    masked = np.asarray(jitted_drop(mixed, counts, SMALL, 12).masked)
    by_rank = []
    for i, span in enumerate(SMALL.spans()):
        hidden = 16 - np.asarray(counts[:, i])
        rank = np.argsort(np.argsort(-np.asarray(scores[:, span]), axis=1), axis=1)
        top = rank < np.round(share * hidden)[:, None]
        assert masked[:, span][top].all()
        np.testing.assert_array_equal(masked[:, span].sum(axis=1), hidden)
        free = (hidden - top.sum(axis=1)) / np.maximum(16 - top.sum(axis=1), 1)  # the rest is uniform
        by_rank.append(masked[:, span][~top].mean() - np.repeat(free, 16 - top.sum(axis=1)).mean() if share < 1 else 0.0)
    assert np.abs(by_rank).max() < 0.02


@pytest.mark.parametrize("by", ["scores", "random"])
def test_hidden_tokens_thrown_away_are_not_predicted(by):
    keys, scores = sample_keys(0, 0, 50), guidance_of(SMALL, 50)
    counts = jitted_budget(stream_keys(keys, "budget"), SMALL, 12)
    order = random_scores(keys, SMALL) if by == "random" else None
    plan = drop(scores, counts, SMALL, 12, None, 0.5, order)
    predicted, masked = np.asarray(predicted_mask(plan)), np.asarray(plan.masked)
    assert not (predicted & ~masked).any() and plan.predicted_ids.shape == (50, 36)
    for span in SMALL.spans():
        hidden = masked[:, span].sum(axis=1)
        np.testing.assert_array_equal(predicted[:, span].sum(axis=1), np.maximum(np.round(0.5 * hidden), np.minimum(hidden, 1)))
        if by == "scores":
            kept = np.where(predicted[:, span], scores[:, span], np.inf).min(axis=1)
            thrown = np.where(masked[:, span] & ~predicted[:, span], scores[:, span], -np.inf).max(axis=1)
            assert (kept >= thrown).all()
