"""Guidance sources beside attention: what they say, what they remember, and clear errors for what they cannot read."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fresh_params, on_device, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys
from maskvit.core.types import TokenLayout
from maskvit.guidance.attention import random_heads, read_attention, self_attention
from maskvit.guidance.bipartition import relevance
from maskvit.guidance.errors import fill_with_mean
from maskvit.guidance.stored import maps_to_tokens, shuffle
from maskvit.guidance.tokencut import second_eigenvector
from maskvit.losses.ranking import ranking_loss
from maskvit.losses.weights import cosine_between, guidance_weights, normalize_guidance
from maskvit.nn.backbone import frozen_mask
from maskvit.optim.schedules import Cosine
from maskvit.optim.transforms import adamw
from maskvit.training.step import init_state, train_step

LAYOUT = TokenLayout(("rgb", "depth"), ((4, 4), (2, 4)))
ONE_BLOCK = dict(width=48, depth=1, heads=3)


# Reading the attention


def test_random_head_subsets_cover_all_heads_and_sizes():
    chosen = np.asarray(random_heads(sample_keys(0, 0, 6000), 3))
    sizes = chosen.sum(axis=1)
    np.testing.assert_allclose([(sizes == k).mean() for k in (1, 2, 3)], 1 / 3, atol=0.025)
    np.testing.assert_allclose(chosen.mean(axis=0), 2 / 3, atol=0.025)
    assert len(np.unique(chosen, axis=0)) == 7


def test_heads_blocks_and_renormalization():
    objective = tiny_objective()
    params = fresh_params(objective)
    values = objective.prepare(on_device(tiny_batch(4))).values_of(objective.model.inputs)
    tokens = objective.model.embed(params, values)
    maps = [np.asarray(x) for x in objective.model.attentions(params, tokens)]
    n = tokens.layout.num_tokens
    read = partial(self_attention, objective.model, params, tokens)
    for block, all_heads in ((0, maps[0]), (1, maps[1]), (-1, maps[1]), (-2, maps[0])):
        np.testing.assert_allclose(read(block=block), all_heads[:, :, n, :n].mean(axis=1), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(read(heads=(2,)), maps[1][:, 2, n, :n], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(read(heads=(0, 2), query="mean"), maps[1][:, [0, 2]].mean(axis=(1, 2))[:, :n], rtol=1e-4, atol=1e-7)
    shares = np.asarray(read(renormalise=True))
    for span in tokens.layout.spans():
        np.testing.assert_allclose(shares[:, span].sum(axis=1), 1.0, rtol=1e-5)
    # A random subset is the mean over its members.
    keys = sample_keys(3, 0, 4)
    chosen = np.asarray(random_heads(keys, 3))
    expected = (maps[1][:, :, n, :n] * chosen[:, :, None]).sum(axis=1) / chosen.sum(axis=1)[:, None]
    np.testing.assert_allclose(read(heads="random", keys=keys), expected, rtol=1e-4, atol=1e-7)


def test_absent_tokens_do_not_count_when_shares_are_made():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.random((3, 2, 1, 25)), jnp.float32)
    present = jnp.asarray(rng.random((3, 24)) < 0.6)
    shares = np.asarray(read_attention(weights, LAYOUT, present, renormalise=True))
    assert (shares[~np.asarray(present)] == 0).all()
    for span in LAYOUT.spans():
        np.testing.assert_allclose(shares[:, span].sum(axis=1), 1.0, rtol=1e-5)


# Sources with memory


def run_steps(steps: int = 3, **objective):
    """A few steps of a tiny objective with one block: (objective, states)."""
    built = tiny_objective(**{"outputs": ("rgb", "depth", "semseg"), "encoder": ONE_BLOCK, **objective})
    shapes = jax.eval_shape(lambda key: built.init(key)[0], jax.random.key(0))
    optimizer = adamw(shapes, frozen_mask(shapes), Cosine(1e-2, 10, 0, 0, 0.0))
    states = [init_state(built, optimizer, 0, 16)]
    step = jax.jit(partial(train_step, objective=built, optimizer=optimizer, seed=0))
    for i in range(steps):
        states.append(step(states[-1], on_device(tiny_batch(8, i)))[0])
    return built, states


def test_the_teacher_is_a_moving_average_of_the_parameters():
    guided = dict(scores=dict(name="attention_high"), guidance=dict(name="teacher_attention", momentum=0.75))
    objective, states = run_steps(outputs=("rgb",), **guided)
    kernel = lambda tree: np.asarray(tree["encoder"]["block_00"]["attn"]["qkv"]["kernel"])  # noqa: E731
    expected = kernel(states[0].params)
    for state in states[1:]:
        expected = 0.75 * expected + 0.25 * kernel(state.params)
        np.testing.assert_allclose(kernel(state.objective_state["guidance"]), expected, rtol=1e-5, atol=1e-7)
    assert "outputs" not in states[0].objective_state["guidance"]
    # The plan follows the teacher, not the student.
    batch, keys = on_device(tiny_batch(8, 9)), sample_keys(0, 0, 8)
    state = states[-1].objective_state
    teacher = {**states[-1].params, **state["guidance"]}
    plan = jax.jit(lambda p, s: objective.plan(p, batch, keys, s)[0].masked)
    own = tiny_objective(outputs=("rgb",), encoder=ONE_BLOCK, scores=dict(name="attention_high"), guidance=dict(name="self_attention"))
    np.testing.assert_array_equal(plan(states[-1].params, state), jax.jit(lambda p: own.plan(p, batch, keys)[0].masked)(teacher))


def test_the_adaptive_budget_follows_the_losses():
    objective, states = run_steps(budget=dict(name="adaptive_dirichlet", momentum=0.5))
    averages = [state.objective_state["averages"] for state in states]
    assert not np.asarray(averages[0]["loss"]).any() and (np.asarray(averages[1]["loss"]) > 0).all()
    np.testing.assert_allclose([a["weight"] for a in averages], [0.0, 0.5, 0.75, 0.875])


def test_a_predicted_error_is_learned_by_ranking():
    objective, states = run_steps(2, scores=dict(name="attention_high"), guidance=dict(name="predicted_error", momentum=0.9))
    heads = states[-1].params["outputs"]
    assert {"error_rgb", "error_depth", "error_semseg"} <= set(heads)
    before, after = (np.asarray(s.params["outputs"]["error_rgb"]["head"]["kernel"]) for s in (states[0], states[-1]))
    assert before.shape == (16, 1) and not np.array_equal(before, after)


def test_the_ranking_loss_orders_pairs():
    errors = jnp.array([[3.0, 1.0, 2.0, jnp.nan]])
    counted = ~jnp.isnan(errors)
    right, wrong = jnp.array([[5.0, -5.0, 0.0, 9.0]]), jnp.array([[-5.0, 5.0, 0.0, 9.0]])
    total, count = ranking_loss(right, jnp.nan_to_num(errors), counted)
    assert count == 1 and total < 0.01 < ranking_loss(wrong, jnp.nan_to_num(errors), counted)[0]
    by_hand = np.mean([np.log1p(np.exp(-d)) for d in (10.0, 5.0, 5.0)])
    np.testing.assert_allclose(total, by_hand, rtol=1e-4)
    assert ranking_loss(right, jnp.nan_to_num(errors), jnp.zeros((1, 4), bool)) == (0.0, 0.0)


def test_reconstruction_errors_are_those_of_a_random_pass():
    guided = dict(scores=dict(name="attention_high"), guidance=dict(name="reconstruction_error", passes=2))
    objective = tiny_objective(outputs=("rgb", "depth", "semseg"), **guided)
    params = fresh_params(objective)
    batch, keys = on_device(tiny_batch(4)), sample_keys(0, 0, 4)

    @jax.jit
    def errors_and_guidance(params):
        request = objective._request(params, {}, batch, keys)
        return request.random_errors(keys), objective.guide(request)

    one, guidance = map(np.asarray, errors_and_guidance(params))
    assert (np.isnan(one).sum(axis=1) == 12).all()  # the visible ones
    assert np.isfinite(guidance).all() and (guidance > 0).all()


def test_tokens_without_an_error_count_as_average():
    errors = jnp.array([[1.0, jnp.nan, 3.0] + [jnp.nan] * 13 + [jnp.nan] * 8])
    filled = np.asarray(fill_with_mean(errors, LAYOUT))
    np.testing.assert_array_equal(filled[0, :4], [1, 2, 3, 2])
    assert (filled[0, 16:] == 0).all()


# Maps that come from elsewhere


def test_stored_maps_go_to_every_modality_on_its_grid():
    maps = jnp.arange(16.0).reshape(1, 1, 4, 4)
    tokens = np.asarray(maps_to_tokens(maps, LAYOUT))
    np.testing.assert_array_equal(tokens[0, :16], np.arange(16))
    np.testing.assert_allclose(tokens[0, 16:].reshape(2, 4), np.arange(16).reshape(2, 2, 4).mean(axis=1), rtol=0.3, atol=0.7)
    two = maps_to_tokens(jnp.concatenate([maps, 2 * maps], axis=1), LAYOUT)
    np.testing.assert_allclose(two[0, 16:], 2 * tokens[0, 16:])
    with pytest.raises(ValueError, match="maps are for 3 modalities, the model has the inputs rgb, depth"):
        maps_to_tokens(jnp.zeros((1, 3, 4, 4)), LAYOUT)


def test_a_random_map_has_the_same_values_elsewhere():
    rng = np.random.default_rng(0)
    values, noise = jnp.asarray(rng.random((200, 24))), jnp.asarray(rng.random((200, 24)))
    present = np.ones((200, 24), bool)
    present[:100, 3:9] = False
    shuffled = np.asarray(shuffle(values, noise, LAYOUT, jnp.asarray(present)))
    for rows in (slice(0, 100), slice(100, 200)):
        for span in LAYOUT.spans():
            there = present[rows][0, span]
            np.testing.assert_array_equal(np.sort(shuffled[rows, span][:, there]), np.sort(np.asarray(values[rows, span])[:, there]))
    assert abs(np.corrcoef(shuffled[100:, :16].ravel(), np.asarray(values[100:, :16]).ravel())[0, 1]) < 0.06


# Groups of tokens


def test_the_normalized_cut_is_the_second_eigenvector():
    rng = np.random.default_rng(0)
    group = np.arange(30) < 11
    affinity = np.where(group[:, None] == group[None, :], 1.0, 0.05) * rng.uniform(0.8, 1.2, (30, 30))
    affinity = (affinity + affinity.T) / 2
    degree = affinity.sum(axis=1)
    walk = affinity / np.sqrt(degree[:, None] * degree[None, :])
    expected = np.linalg.eigh(np.eye(30) - walk)[1][:, 1] / np.sqrt(degree)
    found = np.asarray(second_eigenvector(jnp.asarray(affinity, jnp.float32)[None], jnp.ones((1, 30), bool)))[0]
    assert abs(found @ expected) / np.linalg.norm(found) / np.linalg.norm(expected) > 0.9999


def test_relevance_is_high_on_one_group_of_tokens():
    rng = np.random.default_rng(1)
    inside = np.arange(40) < 8
    centers = rng.standard_normal((2, 32))
    tokens = centers[inside.astype(int)] + 0.3 * rng.standard_normal((40, 32)) + 50.0  # a large common part must not matter
    there = np.ones(40, bool)
    there[[3, 20]] = False
    scores = np.asarray(relevance(jnp.asarray(tokens, jnp.float32), jnp.asarray(there)))
    one, other = scores[inside & there], scores[~inside & there]
    assert one.min() > other.max() or one.max() < other.min()
    assert (scores[~there] == 0).all()


# Guidance as loss weight


@pytest.mark.parametrize("tau,top", [(0.7, 4.1727), (0.75, 3.7937), (0.8, 3.4903)])
def test_weights_reach_from_background_to_the_published_top(tau, top):
    guidance = jnp.asarray(np.random.default_rng(0).random((5, 24)), jnp.float32).at[:, 0].set(0.0).at[:, 16].set(-3.0)
    weights = np.asarray(guidance_weights(guidance, LAYOUT, tau))
    for span in LAYOUT.spans():
        assert (weights[:, span].min(axis=1) == 1.0).all()
        np.testing.assert_allclose(weights[:, span].max(axis=1), top, atol=5e-5)
    np.testing.assert_allclose(guidance_weights(guidance, LAYOUT, tau, gamma=0.5), 0.5 * weights, rtol=1e-6)


def test_a_map_without_contrast_is_background():
    present = jnp.asarray(np.arange(24) % 3 > 0)[None]
    flat = jnp.where(present, 0.25, 9.0)
    assert (np.asarray(normalize_guidance(flat, LAYOUT, present)) == 0).all()
    assert (np.asarray(guidance_weights(jnp.full((1, 24), 0.25), LAYOUT, 0.7)) == 1).all()


def test_the_temperature_goes_on_half_a_cosine():
    np.testing.assert_allclose([cosine_between(0.8, 0.7, jnp.float32(p)) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)], [0.8, 0.8, 0.75, 0.7, 0.7])


def test_loss_weights_multiply_the_losses_of_their_tokens():
    fields = dict(scores=dict(name="random"), guidance=dict(name="self_attention"), loss_weight=dict(tau=0.75))
    weighted, plain = tiny_objective(**fields), tiny_objective()
    params = fresh_params(plain)
    batch, keys = on_device(tiny_batch(4)), sample_keys(0, 0, 4)
    plan = jax.jit(lambda p: weighted.plan(p, batch, keys)[0])(params)
    prepared = plain.prepare(batch)
    tokens = plain.model.embed(params, prepared.values_of(plain.model.inputs))
    predictions = plain.reconstruct(params, tokens, plan)
    losses = plain.pixel_losses(predictions, prepared, plan, tokens.layout)
    sums = weighted.loss_sums(predictions, prepared, plan, tokens.layout)
    for name, (pixel_loss, counted) in losses.items():
        weights = np.asarray(plan.loss_weights)[:, tokens.layout.span(name.removeprefix("norm_")), None]
        by_hand = (np.asarray(pixel_loss) * weights * counted).sum(axis=(1, 2)) / np.asarray(counted).sum(axis=(1, 2))
        np.testing.assert_allclose(sums[name][0], np.nansum(by_hand), rtol=1e-5)


# Mistakes

HIGH = dict(name="attention_high")
MISTAKES = [
    (dict(scores=HIGH, guidance=dict(name="self_attention", block=2)), r"block is 2; the encoder has blocks 0 \.\.\. 1"),
    (dict(scores=HIGH, guidance=dict(name="self_attention", heads=(0, 3))), r"heads is \(0, 3\); the encoder has heads 0 \.\.\. 2"),
    (dict(scores=HIGH, guidance=dict(name="self_attention", heads="some")), "heads is 'some'; give None"),
    (dict(scores=HIGH, guidance=dict(name="self_attention", query="cls")), "query is 'cls'; known: global, mean"),
    (dict(scores=HIGH, guidance=dict(name="self_attention"), num_global_tokens=0), "the model has no global token"),
    (dict(scores=HIGH, guidance=dict(name="teacher_attention", momentum=1.0)), "momentum is 1.0"),
    (dict(scores=HIGH, guidance=dict(name="stored")), "path is empty"),
    (dict(scores=HIGH, guidance=dict(name="grad_cam")), "guidance.name is 'grad_cam'; known: self_attention"),
    (dict(scores=HIGH, guidance=dict(name="self_attention", row=1)), "config.objective.guidance has unknown key 'row'; known: query"),
    (dict(scores=HIGH, guidance=dict(name="random_map", of=dict(name="stored"))), "path is empty"),
    (dict(scores=HIGH, guidance=dict(name="predicted_error"), outputs=("rgb",)), "needs an error of every input, but 'depth'"),
    (dict(scores=HIGH, guidance=dict(name="bipartition", block=-3)), "block is -3"),
    (dict(scores=dict(name="attention_stochastic", alpha=1.5), guidance=dict(name="self_attention")), "alpha is 1.5"),
    (dict(guidance=dict(name="self_attention"), loss_weight=dict(tau=0.0)), "tau is 0.0"),
    (dict(guidance=dict(name="self_attention"), loss_weight=dict(temperature=1.0)), "unknown key 'temperature'"),
    (dict(loss_weight=dict(tau=0.7)), "config.objective.loss_weight needs config.objective.guidance"),
    (dict(guided_share=dict(share=(0.0, 1.2))), "guided_share.share is"),
    (dict(predicted=dict(share=0.0)), "predicted.share is 0.0"),
    (dict(predicted=dict(share=0.5, by="loss")), "predicted.by is 'loss'; known: scores, random"),
    (dict(budget=dict(name="adaptive_dirichlet"), outputs=("rgb",)), "follows losses, but the input 'depth'"),
    (dict(budget=dict(name="fixed", counts=(1, 2, 3))), "together config.objective.num_visible = 12"),
]


@pytest.mark.parametrize("change,message", MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_objective(**change)
