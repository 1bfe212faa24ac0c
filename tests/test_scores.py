"""Every score function: its published rule or statistics, on any grid, for any sample alone, in one compilation."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import counting

from maskvit.core.keys import sample_keys
from maskvit.core.types import TokenLayout
from maskvit.masking.plan import drop
from maskvit.masking.scores import COLORS, GUIDED_SCORES, SCORES, hint_reveals

ONE = TokenLayout(("rgb",), ((14, 14),))
ODD = TokenLayout(("rgb", "depth", "line", "point"), ((3, 5), (3, 5), (1, 4), (1, 1)))
OPTIONS: dict[str, dict[str, Any]] = {"attention_stochastic": dict(alpha=0.5), "attention_hint": dict(show_max=0.8, ratio=0.5)}
CASES = [(name, OPTIONS.get(name, {})) for name in SCORES]
CASES += [("color", dict(kind="blue")), ("gumbel", dict(hide="low", temperature=0.3))]
every_case = pytest.mark.parametrize("name,options", CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])


def guidance_of(layout: TokenLayout, samples: int, seed: int = 0) -> jax.Array:
    """Positive random importance of very different scales per modality."""
    rng = np.random.default_rng(seed)
    scale = np.repeat(10.0 ** -np.arange(len(layout.names)), layout.sizes)
    return jnp.asarray(rng.random((samples, layout.num_tokens)) * scale, jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def scores_of(name: str, keys: jax.Array, layout: TokenLayout, options: tuple, guidance=None, present=None) -> jax.Array:
    return SCORES[name](keys, layout, guidance, present, **dict(options))


def draw(name: str, guidance=None, present=None, layout: TokenLayout = ONE, **options: Any) -> np.ndarray:
    """Scores of as many samples as `guidance` has, or of 2000."""
    keys = sample_keys(0, 0, 2000 if guidance is None else len(guidance))
    return np.asarray(scores_of(name, keys, layout, tuple(sorted(options.items())), guidance, present))


reveals_of = jax.jit(hint_reveals, static_argnums=1, static_argnames=("show_max", "ratio", "ratio_var"))


def hidden(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` highest of each row."""
    return np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) < count


# All of them


@functools.cache
def compiled(name: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, list[int]]:
    """The scores of ODD as a function of keys, guidance and presence, and the list of its traces."""
    counted, traces = counting(lambda k, g, p: SCORES[name](k, ODD, g if name in GUIDED_SCORES else None, p, **dict(options)))
    return jax.jit(counted), traces


def some_present(samples: int, seed: int = 0, share: float = 0.7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((samples, ODD.num_tokens)) < share)


@every_case
def test_scores_are_finite_differ_between_samples_and_compile_once(name, options):
    run, traces = compiled(name, tuple(options.items()))
    rows = set()
    for step, share in enumerate((1.0, 0.7, 0.1)):
        scores = np.asarray(run(sample_keys(0, step, 16), guidance_of(ODD, 16, step), some_present(16, step, share)))
        assert scores.shape == (16, ODD.num_tokens) and scores.dtype == np.float32 and np.isfinite(scores).all()
        rows |= {row.tobytes() for row in scores}
    assert len(rows) == 48
    assert len(traces) == 1


@every_case
def test_a_sample_depends_on_its_key_guidance_and_presence_alone(name, options):
    run, _ = compiled(name, tuple(options.items()))
    keys, guidance, present = sample_keys(3, 1, 16), guidance_of(ODD, 16), some_present(16)
    whole = np.asarray(run(keys, guidance, present))
    order = np.random.default_rng(1).permutation(16)
    np.testing.assert_array_equal(run(keys[order], guidance[order], present[order]), whole[order])
    others = np.arange(16) % 3
    np.testing.assert_array_equal(run(keys[others], guidance[others], present[others]), whole[others])


@pytest.mark.parametrize("name", ["attention_hint", "attention_stochastic", "color"])
def test_a_sample_does_not_depend_on_the_size_of_the_batch(name):
    # Those that add up: a sum in another order would be another number.
    options = OPTIONS.get(name, {})
    run, _ = compiled(name, tuple(options.items()))
    arguments = sample_keys(3, 1, 16), guidance_of(ODD, 16), some_present(16)
    alone = jax.jit(lambda k, g, p: SCORES[name](k, ODD, g if name in GUIDED_SCORES else None, p, **options))
    np.testing.assert_array_equal(alone(*(x[5:6] for x in arguments))[0], run(*arguments)[5])


@every_case
def test_what_the_guidance_says_of_absent_tokens_changes_nothing(name, options):
    run, _ = compiled(name, tuple(options.items()))
    keys, guidance, present = sample_keys(0, 0, 16), guidance_of(ODD, 16), some_present(16)
    scores = [np.asarray(run(keys, jnp.where(present, guidance, other), present))[present] for other in (0.0, 1e6)]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("name", ["attention_hint", "attention_stochastic"])
def test_no_presence_is_the_presence_of_everything(name):
    guidance = guidance_of(ODD, 16)
    everything = jnp.ones(guidance.shape, bool)
    scores = [draw(name, guidance, present, ODD, **OPTIONS[name]) for present in (None, everything)]
    np.testing.assert_allclose(*scores, rtol=2e-6, atol=2e-6)


@every_case
def test_modalities_do_not_share_their_noise(name, options):
    guidance = np.array(guidance_of(ODD, 16))
    guidance[:, ODD.span("depth")] = guidance[:, ODD.span("rgb")]
    run, _ = compiled(name, tuple(options.items()))
    scores = np.asarray(run(sample_keys(0, 0, 16), jnp.asarray(guidance), some_present(16, share=1.0)))
    differ = (scores[:, ODD.span("rgb")] != scores[:, ODD.span("depth")]).any(axis=1)
    assert not differ.any() if name in ("attention_high", "attention_low") else differ.all()


@pytest.mark.parametrize("name", GUIDED_SCORES)
def test_guided_scores_without_guidance_are_an_error(name):
    with pytest.raises(ValueError, match=f"{name}.*config.objective.guidance"):
        SCORES[name](sample_keys(0, 0, 2), ODD, None, **OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("attention_stochastic", dict(alpha=1.5), "alpha is 1.5"),
        ("attention_stochastic", dict(alpha=-0.1), "alpha is -0.1"),
        ("attention_hint", dict(show_max=0.0), "show_max is 0.0"),
        ("attention_hint", dict(ratio=0.1, ratio_var=0.2), "ratio_var is 0.2"),
        ("attention_hint", dict(ratio=0.9), "ratio_var is 0.2"),
        ("gumbel", dict(temperature=0.0), "temperature is 0.0"),
        ("gumbel", dict(hide="all"), "hide is 'all'"),
        ("block", dict(max_area=0.0), "max_area is 0.0"),
        ("block", dict(min_aspect=2.0), "min_aspect is 2.0"),
        ("block", dict(rectangles=0), "rectangles is 0"),
        ("color", dict(kind="pink"), "kind is 'pink'.*red, green, blue, purple"),
        ("color", dict(sigmas=(2.0, 1.0)), r"sigmas is \(2.0, 1.0\)"),
        ("multi_block", dict(num_targets=0), "num_targets is 0"),
        ("multi_block", dict(context_area=(0.9, 1.1)), "context_area"),
        ("multi_block", dict(target_aspect=(2.0, 0.5)), "target_aspect"),
    ],
)
def test_bad_options_are_errors_that_name_the_key(name, options, message):
    with pytest.raises(ValueError, match=f"config.objective.scores.{message}"):
        SCORES[name](sample_keys(0, 0, 2), ONE, guidance_of(ONE, 2), **options)


# AttMask


@pytest.mark.parametrize("mode", ["high", "low"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
def test_masks_are_those_of_attmask_bit_for_bit(fixtures, mode, ratio):
    recorded = np.load(fixtures / "attmask_selection.npz")
    attention = jnp.asarray(recorded["attention"])
    count = 196 - int(196 * ratio)
    scores = SCORES[f"attention_{mode}"](sample_keys(0, 0, len(attention)), ONE, attention)
    plan = drop(scores, jnp.full((len(attention), 1), count), ONE, count)
    np.testing.assert_array_equal(plan.masked, recorded[f"attmask_{mode}_{ratio}"])


@pytest.fixture(scope="module")
def hints() -> tuple[np.ndarray, np.ndarray]:
    """Rank of every token (0 = most important) and whether it is revealed, for 6000 images of 14 x 14 tokens."""
    guidance = guidance_of(ONE, 6000)
    reveals = reveals_of(sample_keys(0, 0, 6000), ONE, guidance)
    return np.argsort(np.argsort(-np.asarray(guidance), axis=1), axis=1), np.asarray(reveals)


def test_hints_are_one_to_nine_of_the_top_nineteen(hints):
    ranks, reveals = hints
    assert ranks[reveals].max() == 18, "all 19 highest of 196 tokens, and no other"
    counts = np.bincount(reveals.sum(axis=1), minlength=20)
    assert counts[1:10].min() > 0 and counts[0] == 0 and counts[10:].sum() == 0
    # k = floor(196 * 0.1 * r), r uniform in (0.1, 0.5): k = 1 and 9 get the cut-off ends of the range 1.96 ... 9.8.
    edges = np.clip(np.arange(1, 11), 1.96, 9.8)
    expected = 6000 * np.diff(edges) / (9.8 - 1.96)
    chi_square = ((counts[1:10] - expected) ** 2 / expected).sum()
    assert chi_square < 26.1, chi_square  # 0.1 % of 8 degrees of freedom


def test_hints_are_uniform_over_the_top_ranks_and_drawn_apart_from_their_number(hints):
    ranks, reveals = hints
    hits = np.bincount(ranks[reveals], minlength=19)
    # Draws without replacement vary less than independent ones, so that the usual bound is a safe one.
    assert ((hits - hits.mean()) ** 2 / hits.mean()).sum() < 42.3  # 0.1 % of 18 degrees of freedom
    many = reveals.sum(axis=1) >= 6
    shares = [np.bincount(ranks[rows][reveals[rows]], minlength=19) / reveals[rows].sum() for rows in (many, ~many)]
    assert np.abs(shares[0] - shares[1]).max() < 0.02


def test_hints_are_shown_and_all_else_ranks_by_guidance(hints):
    guidance = guidance_of(ONE, 6000)
    scores, reveals = draw("attention_hint", guidance), hints[1]
    plan_hidden = hidden(scores, 147)
    assert not plan_hidden[reveals].any()
    # Without the hints the order is that of attention_high: 147 hidden are the highest 147 + k less the k hints.
    expected = hidden(np.where(reveals, -np.inf, np.asarray(guidance)), 147)
    np.testing.assert_array_equal(plan_hidden, expected)
    assert (hidden(np.asarray(guidance), 147) & ~plan_hidden).sum() == reveals.sum()


@pytest.mark.parametrize("factor", [1e-30, -1e-6, 0.0, 1e30])
def test_hints_come_before_all_others_at_any_scale_of_guidance(factor):
    guidance = guidance_of(ONE, 16) * factor
    scores, reveals = draw("attention_hint", guidance), np.asarray(reveals_of(sample_keys(0, 0, 16), ONE, guidance))
    assert all(row[shown].max() < row[~shown].min() for row, shown in zip(scores, reveals, strict=True))


def test_hints_follow_what_is_present_and_may_be_none():
    present = np.arange(196)[None, :] < np.array([196, 100, 30, 5])[:, None]
    guidance = jnp.where(present, guidance_of(ONE, 4), 9.0)
    for seed in range(20):
        reveals = np.asarray(reveals_of(sample_keys(seed, 0, 4), ONE, guidance, jnp.asarray(present)))
        assert not reveals[~present].any() and not reveals[3].any()
        assert 1 <= reveals[0].sum() <= 9 and 1 <= reveals[1].sum() <= 4 and reveals[2].sum() <= 1
        ranks = np.argsort(np.argsort(-np.where(present, guidance, -1), axis=1), axis=1)
        assert all(ranks[i][reveals[i]].max(initial=0) < int(n * 0.1) for i, n in enumerate((196, 100, 30)))


@pytest.mark.parametrize("show_max,ratio,count", [(0.25, 0.5, 12), (0.1, 0.3, 3), (1.0, 1.0, 100), (0.05, 0.1, 0)])
def test_hints_with_a_fixed_ratio_have_a_fixed_number(show_max, ratio, count):
    # 100 * 0.1 * 0.3 is an integer that float32 might miss.
    layout = TokenLayout(("rgb",), ((10, 10),))
    reveals = reveals_of(sample_keys(0, 0, 20), layout, guidance_of(layout, 20), show_max=show_max, ratio=ratio, ratio_var=0.0)
    np.testing.assert_array_equal(reveals.sum(axis=1), count)


# Stochastic


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over rows of the rank correlation."""
    ranks = [np.argsort(np.argsort(x, axis=1), axis=1) - (x.shape[1] - 1) / 2 for x in (one, other)]
    return float((ranks[0] * ranks[1]).sum() / np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))


def test_stochastic_is_top_k_at_zero_and_independent_of_the_guidance_at_one():
    guidance = guidance_of(ONE, 1000)
    np.testing.assert_array_equal(draw("attention_stochastic", guidance, alpha=0.0), draw("attention_high", guidance))
    agreement = [spearman(draw("attention_stochastic", guidance, alpha=a), np.asarray(guidance)) for a in (0.2, 0.5, 0.8, 1.0)]
    assert agreement[0] > agreement[1] + 0.05 > agreement[2] + 0.1 > 0.2
    assert abs(agreement[3]) < 0.01  # standard error 0.0023
    # Whatever the guidance ranks highest is hidden as often as anything else.
    top = np.asarray(guidance).argmax(axis=1)
    share = hidden(draw("attention_stochastic", guidance, alpha=1.0), 98)[np.arange(1000), top].mean()
    assert abs(share - 0.5) < 0.06


def test_stochastic_noise_has_mean_and_deviation_of_the_tokens_present_of_each_modality():
    present = np.random.default_rng(1).random((1, ODD.num_tokens)) < 0.8
    guidance = np.array(guidance_of(ODD, 1))
    spread = np.where(present, guidance, 1e9)
    scores = draw("attention_stochastic", *(jnp.tile(x, (20_000, 1)) for x in (spread, present)), ODD, alpha=0.25)
    for span in ODD.spans()[:2]:
        here = present[0, span]
        values = guidance[0, span][here]
        np.testing.assert_allclose(scores[:, span][:, here].mean(axis=0), 0.25 * values.mean() + 0.75 * values, rtol=0.02)
        np.testing.assert_allclose(scores[:, span][:, here].std(axis=0), 0.25 * values.std(), rtol=0.03)


# Gumbel


def drawn_in_order(weights: np.ndarray, count: int, samples: int) -> np.ndarray:
    """How often each token is among the first `count` drawn without replacement, simulated draw by draw."""
    rng, hits = np.random.default_rng(5), np.zeros(len(weights))
    for _ in range(samples):
        hits[rng.choice(len(weights), count, replace=False, p=weights / weights.sum())] += 1
    return hits / samples


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_gumbel_draws_without_replacement_in_proportion_to_the_guidance(temperature):
    small = TokenLayout(("rgb",), ((2, 4),))
    weights = np.array([0.4, 0.2, 0.1, 0.1, 0.08, 0.06, 0.05, 0.01])
    expected = drawn_in_order(weights ** (1 / temperature), 3, 10_000)
    guidance = jnp.tile(jnp.asarray(weights * 1e-3, jnp.float32), (20_000, 1))
    high = hidden(draw("gumbel", guidance, None, small, temperature=temperature), 3).mean(axis=0)
    np.testing.assert_allclose(high, expected, atol=0.02)  # standard error of the difference 0.006
    low = hidden(draw("gumbel", guidance, None, small, temperature=temperature, hide="low"), 5).mean(axis=0)
    np.testing.assert_allclose(1 - low, expected, atol=0.02)


def test_gumbel_tends_to_top_k_and_to_random():
    guidance = guidance_of(ONE, 400)
    for temperature in (1e-7, 1e-30):
        cold = hidden(draw("gumbel", guidance, temperature=temperature), 98)
        agreement = (cold == hidden(np.asarray(guidance), 98)).mean()
        assert agreement > 0.9999  # equal logarithms of neighboring float32 values are drawn at random
    for temperature in (1e7, float("inf")):
        scores = draw("gumbel", guidance, temperature=temperature)
        assert np.isfinite(scores).all() and abs(spearman(scores, np.asarray(guidance))) < 0.015


def test_gumbel_draws_zeros_last_and_among_themselves_at_random():
    guidance = jnp.where(jnp.arange(196) < 60, guidance_of(ONE, 500), 0.0)
    scores = draw("gumbel", guidance)
    assert (hidden(scores, 60) == (np.arange(196) < 60)).all()
    share = hidden(scores, 128)[:, 60:].mean(axis=0)
    assert abs(share.mean() - 0.5) < 1e-6 and np.abs(share - 0.5).max() < 0.12  # standard error 0.022
    np.testing.assert_array_equal(draw("gumbel", -guidance), draw("gumbel", 0 * guidance))


# Rectangles


def agreeing_neighbors(masks: np.ndarray) -> float:
    """Share of pairs of neighboring cells that are both hidden or both shown."""
    return float(((masks[:, 1:] == masks[:, :-1]).mean() + (masks[:, :, 1:] == masks[:, :, :-1]).mean()) / 2)


def components(mask: np.ndarray) -> int:
    """Number of connected parts of the hidden cells."""
    left, count = set(zip(*np.nonzero(mask), strict=True)), 0
    while left:
        count, edge = count + 1, [left.pop()]
        while edge:
            row, column = edge.pop()
            near = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= near
            edge.extend(near)
    return count


def is_rectangle(mask: np.ndarray) -> bool:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return bool(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())


@pytest.mark.parametrize("share", [0.4, 0.83])
def test_blocks_are_connected_where_random_masks_are_not(share):
    masks = {name: hidden(draw(name)[:200], int(196 * share)).reshape(-1, 14, 14) for name in ("block", "random")}
    assert agreeing_neighbors(masks["block"]) > 0.85 > 0.75 > agreeing_neighbors(masks["random"])
    parts = {name: np.mean([components(mask) for mask in masks[name][:60]]) for name in masks}
    # Blocks: a rectangle or two, and the scattered cells of the last one.
    assert parts["block"] < {0.4: 6, 0.83: 3}[share]
    if share == 0.4:
        assert parts["random"] > 15


def test_the_first_block_is_a_rectangle_of_the_published_sizes():
    scores = draw("block")
    first = np.floor((1 - scores) * 33).reshape(-1, 14, 14) == 0  # 32 rectangles and the rest
    assert all(is_rectangle(mask) for mask in first)
    height, width = first.any(axis=2).sum(axis=1), first.any(axis=1).sum(axis=1)
    assert height.max() == width.max() == 13 and min(height.min(), width.min()) <= 3
    area, log_aspect = height * width, np.log(height / width)
    assert 14 <= area.min() and area.max() <= 86  # uniform in 16 ... 78.4, sides rounded
    np.testing.assert_allclose([area.mean(), area.std()], [46.5, 17.9], atol=1.5)
    np.testing.assert_allclose([log_aspect.mean(), log_aspect.std()], [0, 2 * np.log(1 / 0.3) / np.sqrt(12)], atol=0.05)
    # Any place: the two halves of the grid are covered alike.
    cover = first.mean(axis=0)
    np.testing.assert_allclose(cover, cover[::-1], atol=0.06)
    np.testing.assert_allclose(cover, cover.T, atol=0.06)


def test_blocks_rank_by_first_cover_and_leave_little_uncovered():
    order = np.floor((1 - draw("block")) * 33)
    assert (np.sort(order, axis=1)[:, 0] == 0).all() and order.max() == 32
    assert (order == 32).mean() < 0.06
    few = draw("block", rectangles=2)
    assert ((np.floor((1 - few) * 3) == 2).mean(axis=1) > 0.1).all(), "what no rectangle covers comes last"


def test_multi_block_hides_targets_then_the_surroundings_then_the_context():
    classes = np.floor(draw("multi_block") * 3).reshape(-1, 14, 14)  # 2 targets, 1 outside the context, 0 context
    single = np.floor(draw("multi_block", num_targets=1) * 3).reshape(-1, 14, 14) == 2
    assert all(is_rectangle(mask) for mask in single)
    height, width = single.any(axis=2).sum(axis=1), single.any(axis=1).sum(axis=1)
    assert 0.12 < (height * width).min() / 196 and (height * width).max() / 196 < 0.23
    np.testing.assert_allclose((height * width).mean() / 196, 0.175, atol=0.01)
    assert 0.6 < (height / width).min() < 0.9 and 1.3 < (height / width).max() < 1.9
    targets = (classes == 2).mean(axis=(1, 2))
    assert targets.min() >= 0.12 and targets.max() <= 4 * 0.23 and 0.4 < targets.mean() < 0.6  # four that may overlap
    context = classes == 0
    assert 0.25 < context.mean() < 0.55
    # With targets put back the context block is one rectangle: no cell outside it lies between context cells.
    assert not (classes[:, 1:13, 1:13] == 1).any()
    first = hidden(draw("multi_block"), 98)
    assert (first[(classes == 2).reshape(2000, -1)].mean()) > 0.85


# Colors


def test_colors_have_the_bands_of_their_filters():
    rows, columns = np.mgrid[:14, :14]
    patterns = {"slow": np.ones((14, 14)), "middle": np.cos(2 * np.pi * rows * 4 / 14), "fast": (-1.0) ** (rows + columns)}
    power = {}
    for kind in COLORS:
        noise = draw("color", kind=kind).reshape(-1, 14, 14)
        np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
        for name, pattern in patterns.items():  # white noise: 1
            power[kind, name] = np.square((noise * pattern).sum(axis=(1, 2))).mean() / np.square(pattern).sum()
    assert power["red", "slow"] > 10 and power["red", "middle"] < 0.5 and power["red", "fast"] < 0.01
    assert power["green", "middle"] > 1.4 and power["green", "slow"] < 0.5 and power["green", "fast"] < 0.5
    assert power["blue", "fast"] > 1.8 and power["blue", "middle"] < 0.5 and power["blue", "slow"] < 0.05
    assert power["purple", "slow"] > 1.05 and power["purple", "fast"] > 1.2 and power["purple", "middle"] < 0.5


@pytest.mark.parametrize("kind,signs", [("red", (1, 1, 1)), ("green", (1, -1, -1)), ("blue", (-1, 1, 0)), ("purple", (-1, 1, 1))])
def test_colors_correlate_neighbors_as_their_filters_do(kind, signs):
    noise = draw("color", kind=kind).reshape(-1, 14, 14)
    offsets = np.arange(-8, 9)
    blur = {s: np.exp(-(offsets**2) / (2 * s**2)) / np.exp(-(offsets**2) / (2 * s**2)).sum() for s in (0.5, 2.0)}
    fine, coarse, white = np.outer(blur[0.5], blur[0.5]), np.outer(blur[2.0], blur[2.0]), np.outer(offsets == 0, offsets == 0) * 1.0
    kernel = {"red": coarse, "green": fine - coarse, "blue": white - fine, "purple": white - fine + coarse}[kind]
    for lag, sign in zip((1, 2, 3), signs, strict=True):
        expected = (kernel[:, lag:] * kernel[:, :-lag]).sum() / np.square(kernel).sum()
        for axis in (1, 2):
            moved, still = np.take(noise, range(lag, 14), axis), np.take(noise, range(14 - lag), axis)
            assert abs((moved * still).mean() - expected) < 0.03
        assert sign == 0 or np.sign(expected) == sign


def test_colors_do_not_know_the_border():
    deviation = draw("color", kind="red").std(axis=0)
    np.testing.assert_allclose(deviation, 1, atol=0.06)  # standard error 0.016


@pytest.mark.parametrize("name", ["random", "block", "color", "multi_block"])
def test_scores_without_guidance_have_one_range_on_every_grid(name):
    # A budget over all modalities at once compares them: none may be hidden first for the size of its grid.
    layout = TokenLayout(("large", "small"), ((14, 14), (7, 7)))
    masked = hidden(draw(name, layout=layout), 122)
    large, small = masked[:, :196].mean(), masked[:, 196:].mean()
    assert abs(large - small) < 0.12, (large, small)
