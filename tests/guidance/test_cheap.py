"""Cheap guidance: each option at its exact limit, what it costs, what it learns, and clear errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fresh_params, on_device, tiny_batch, tiny_objective

from maskvit.core.flops import attention_flops
from maskvit.core.keys import sample_keys
from maskvit.guidance.agreement import overlap
from maskvit.guidance.cheap import (
    CoarseAttention,
    MergedAttention,
    SampledAttention,
    from_block,
    merge_tokens,
    resize_values,
    spread_scores,
)
from maskvit.guidance.predicted import (
    MAP_FEATURES,
    PredictedAttention,
    all_features,
    box_mean,
    linear_read_out,
    map_features,
    ridge_solution,
)

PLAIN = dict(scores=dict(name="attention_high"), guidance=dict(name="self_attention"))
PASSES = [
    CoarseAttention(resolution=1.0),
    SampledAttention(share=1.0),
    MergedAttention(share=1.0, after=1),
    MergedAttention(share=1.0, after=0),
]


@pytest.fixture(scope="module")
def objective():
    return tiny_objective(**PLAIN, encoder=dict(width=48, depth=3, heads=3))


@pytest.fixture(scope="module")
def params(objective):
    return fresh_params(objective)


@pytest.fixture(scope="module")
def request_of(objective, params):
    """A request with a given batch."""

    def make(batch, seed: int = 0):
        batch = on_device(batch) if isinstance(batch, dict) else batch
        return objective._request(params, {}, batch, sample_keys(seed, 0, batch.size))

    return make


def known(request, scores):
    """Scores of the tokens that exist; NaN for the others, which nothing reads."""
    present = request.tokens.present
    return np.asarray(scores) if present is None else np.where(np.asarray(present), np.asarray(scores), np.nan)


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize("reading", [{}, dict(query="mean"), dict(heads=(1,), renormalise=True), dict(block=1)], ids=str)
@pytest.mark.parametrize("source", PASSES, ids=lambda s: type(s).__name__ + str(getattr(s, "after", "")))
def test_with_nothing_left_out_it_is_the_exact_pass(source, reading, present, request_of):
    import dataclasses

    from maskvit.guidance.attention import SelfAttention

    request = request_of(tiny_batch(8, present=present))
    exact = SelfAttention(**reading)(request)
    found = jax.jit(lambda: dataclasses.replace(source, **reading)(request))()
    np.testing.assert_allclose(known(request, found), known(request, exact), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("present", [False, True])
@pytest.mark.parametrize(
    "source",
    [CoarseAttention(resolution=0.5), SampledAttention(share=0.5), MergedAttention(share=0.5), MergedAttention(share=0.2)],
    ids=str,
)
def test_with_a_part_left_out_every_token_has_a_score(source, present, request_of, objective):
    request = request_of(tiny_batch(8, present=present))
    found = known(request, jax.jit(lambda: source(request))())
    there = np.ones((8, 48), bool) if request.tokens.present is None else np.asarray(request.tokens.present)
    assert np.isfinite(found[there]).all() and (found[there] > 0).all()
    exact = known(request, objective.guidance(request))
    assert np.corrcoef(np.log(found[there]), np.log(exact[there]))[0, 1] > 0.3


def test_less_work_is_counted_as_less(objective):
    model = objective.model
    exact = objective.guidance.flops(model)
    for source in PASSES[1:]:
        assert exact <= source.flops(model) < 1.1 * exact
    assert CoarseAttention(resolution=0.5).flops(model) < 0.5 * exact
    assert SampledAttention(share=0.5).flops(model) == attention_flops(model, -1, True, 24)
    assert MergedAttention(share=0.5).flops(model) < exact
    assert PredictedAttention(every=64, solve_every=64).flops(model, 256) < PredictedAttention(every=8, solve_every=64).flops(model, 256)


# The parts


def test_values_are_resized_by_kind():
    numbers = jnp.broadcast_to(jnp.arange(8.0)[None, :, None, None], (2, 8, 8, 1))
    # Antialiased: the mean of more than the two nearest rows, symmetric about the middle.
    small = np.asarray(resize_values(numbers, (4, 4)))[0, :, 0, 0]
    np.testing.assert_allclose(small + small[::-1], 7.0, rtol=1e-6)
    ids = jnp.asarray(np.arange(64).reshape(1, 8, 8) % 7 - 1)
    found = np.asarray(resize_values(ids, (4, 2)))
    np.testing.assert_array_equal(found, np.asarray(ids)[:, 1::2][:, :, [2, 6]])


def test_scores_spread_to_the_neighbors():
    scores = np.arange(1.0, 26.0).astype(np.float32)
    ids = np.array([0, 6, 12, 18, 24])
    spread = np.asarray(spread_scores(jnp.asarray(scores[ids]), jnp.asarray(ids), jnp.ones(5, bool), (5, 5), 0.2))
    np.testing.assert_allclose(spread[ids], scores[ids], rtol=1e-5)
    assert spread.min() >= scores[ids].min() * 0.999 and spread.max() <= scores[ids].max() * 1.001
    assert spread[1] < spread[13] < spread[23]
    # What is not known of a sampled token is as if it had not been sampled.
    without = spread_scores(jnp.asarray(scores[ids]), jnp.asarray(ids), jnp.arange(5) != 2, (5, 5), 0.2)
    rest = spread_scores(jnp.asarray(scores[ids[[0, 1, 3, 4]]]), jnp.asarray(ids[[0, 1, 3, 4]]), jnp.ones(4, bool), (5, 5), 0.2)
    np.testing.assert_allclose(without, rest, rtol=1e-4)


@pytest.mark.parametrize("count", [10, 6, 3, 1])
def test_merging_keeps_sums_and_puts_equals_together(count):
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((3, 16)) * 4
    kind = np.tile([0, 1, 2, 0], 5)[rng.permutation(20)]
    tokens = (centers[kind] + 0.05 * rng.standard_normal((20, 16))).astype(np.float32)
    merged, held, owner = map(np.asarray, merge_tokens(jnp.asarray(tokens), jnp.ones(20), count))
    assert merged.shape == (count, 16) and held.sum() == 20 and (np.bincount(owner, minlength=count) == held).all()
    for i in range(count):
        np.testing.assert_allclose(merged[i], tokens[owner == i].mean(axis=0), rtol=1e-3, atol=1e-4)
        if count >= 10:
            assert len(set(kind[owner == i])) == 1


def test_absent_tokens_change_no_mean():
    rng = np.random.default_rng(1)
    tokens = rng.standard_normal((12, 8)).astype(np.float32)
    there = np.arange(12) % 3 > 0
    tokens[~there] = 1e3
    merged, held, owner = map(np.asarray, merge_tokens(jnp.asarray(tokens), jnp.asarray(there, jnp.float32), 7))
    assert held.sum() == there.sum()
    for i in np.flatnonzero(held):
        np.testing.assert_allclose(merged[i], tokens[(owner == i) & there].mean(axis=0), rtol=1e-4, atol=1e-4)


def test_the_later_blocks_are_a_model_of_their_own(objective, params, request_of):
    tokens = request_of(tiny_batch(2)).tokens
    x = objective.model.features(params, tokens.tokens, (2,))[0]
    rest, rest_params = from_block(objective.model, params, 2)
    found = rest.attention(rest_params, tokens._replace(tokens=x), slice(48, None))
    np.testing.assert_allclose(found, objective.model.attention(params, tokens, slice(48, None)), rtol=1e-4, atol=1e-7)


# The predictor


def test_the_solution_is_ridge_regression():
    rng = np.random.default_rng(0)
    features = (rng.standard_normal((500, 6)) * [1, 10, 0.1, 3, 1, 1]).astype(np.float32)
    features[:, 5] = 0.0  # never seen
    target = features @ np.array([1.0, -0.2, 5.0, 0.0, 0.5, 0.0], np.float32)
    gram, moment = features.T @ features / 500, features.T @ target / 500
    found = np.asarray(ridge_solution(jnp.asarray(gram), jnp.asarray(moment), 1e-6))
    np.testing.assert_allclose(found, [1.0, -0.2, 5.0, 0.0, 0.5, 0.0], atol=2e-3)
    strong = np.asarray(ridge_solution(jnp.asarray(gram), jnp.asarray(moment), 1.0))
    expected = np.linalg.solve(gram[:5, :5] + (1 + 1e-6) * np.diag(np.diag(gram)[:5]), moment[:5])
    np.testing.assert_allclose(strong[:5], expected, rtol=1e-3, atol=1e-5)
    assert (np.asarray(ridge_solution(jnp.zeros((4, 4)), jnp.zeros(4), 0.01)) == 0).all()


def test_features_of_a_map():
    known_map = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    known_map[0, 0, :2] = np.nan
    known_map[1] = np.nan
    features = np.asarray(map_features(jnp.asarray(known_map)))
    assert features.shape == (2, 4, 5, MAP_FEATURES) and np.isfinite(features).all()
    np.testing.assert_array_equal(features[..., -1], np.isnan(known_map))
    np.testing.assert_allclose(features[0, 0, :2, 0], np.nanmean(known_map[0]), rtol=1e-5)
    assert (features[1, ..., :-1] == 0).all()
    means = np.asarray(box_mean(jnp.arange(20.0).reshape(1, 4, 5, 1), 3))[0, ..., 0]
    assert means[0, 0] == pytest.approx((0 + 1 + 5 + 6) / 4) and means[2, 2] == pytest.approx(12.0)


@pytest.mark.parametrize("with_map", [False, True])
def test_the_short_way_to_the_read_out_is_the_long_way(with_map):
    rng = np.random.default_rng(0)
    normed, context = rng.standard_normal((2, 4, 5, 7)).astype(np.float32), rng.standard_normal((2, 2, 7)).astype(np.float32)
    maps = map_features(jnp.asarray(rng.standard_normal((2, 4, 5)), jnp.float32)) if with_map else None
    features = all_features(jnp.asarray(normed), jnp.asarray(context), maps)
    weights = jnp.asarray(rng.standard_normal(features.shape[-1]), jnp.float32)
    found = linear_read_out(weights, jnp.asarray(normed), jnp.asarray(context), maps)
    np.testing.assert_allclose(found, features @ weights, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grid", [0, 8])
def test_the_predictor_learns_the_exact_scores(grid, request_of, objective):
    source = PredictedAttention(after=1, every=2, momentum=0.9, solve_every=2, grid=grid)
    model = objective.model
    source.check(model)
    state = source.init(model, {}, 64)
    assert ("maps" in state) == bool(grid) and source.needs.record == (("index", "box", "flip") if grid else ())
    rng = np.random.default_rng(0)

    def batch_of(i):
        box = np.tile(np.array([[0, 0, 1, 1]], np.float32), (8, 1))
        return tiny_batch(8, i, present=True) | dict(index=rng.integers(0, 64, 8).astype(np.int32), box=box, flip=np.zeros(8, bool))

    held_out = batch_of(999)

    def agreed(state):
        request = source.remind(request_of(held_out), state)
        found, exact = (known(request, x) for x in (source(request), objective.guidance(request)))
        rows = [0, 4, 7]  # those that lack nothing
        assert np.isfinite(found[rows]).all()
        return np.mean([overlap(found[rows][:, s], exact[rows][:, s])["spearman"] for s in model.layout.spans()])

    before = agreed(state)
    update = jax.jit(lambda request_state, batch, step: source.update(source.remind(request_of(batch), request_state), step, None))
    for i in range(12):
        state = update(state, on_device(batch_of(i)), jnp.int32(i))
        assert all(np.isfinite(np.asarray(state[key])).all() for key in ("gram", "moment", "solution"))
        if i == 0:
            assert agreed(state) > 0.2  # useful from the first update
    assert abs(before) < 0.35 and agreed(state) > 0.5


MISTAKES = [
    (CoarseAttention(resolution=0.0), "resolution is 0.0; it must be above 0 and at most 1"),
    (CoarseAttention(resolution=1.5), "resolution is 1.5"),
    (SampledAttention(share=-0.5), "share is -0.5"),
    (MergedAttention(share=2), "share is 2"),
    (MergedAttention(after=3), r"after is 3; for scores of block 2 merge after 0 \.\.\. 2 blocks"),
    (PredictedAttention(after=-1), "after is -1"),
    (PredictedAttention(block=0, after=1), "after is 1; scores of block 0"),
    (PredictedAttention(every=0), "every is 0"),
    (PredictedAttention(solve_every=0), "solve_every is 0"),
    (PredictedAttention(ridge=0.0), "ridge is 0.0"),
    (PredictedAttention(grid=100), "grid is 100"),
    (PredictedAttention(momentum=1.0), "momentum is 1.0"),
    (CoarseAttention(query="cls"), "query is 'cls'"),
]


@pytest.mark.parametrize(("source", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_mistakes_are_named(source, message, objective):
    with pytest.raises(ValueError, match=message):
        source.check(objective.model)
