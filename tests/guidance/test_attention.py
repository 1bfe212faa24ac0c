"""Self-attention guidance: which rows are read, what is dropped, and that no gradient flows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import GUIDED, fresh_params, on_device, tiny_batch, tiny_objective

from maskvit.core.types import TokenBatch
from maskvit.guidance import GUIDANCE, build_source
from maskvit.guidance.attention import QUERIES, self_attention

OBJECTIVE = tiny_objective(**GUIDED)
MODEL = OBJECTIVE.model
LAYOUT = MODEL.layout


@partial(jax.jit, static_argnums=2)
def guide(params, tokens, query, present):
    return self_attention(MODEL, params, TokenBatch(tokens, LAYOUT, present), query)


@pytest.fixture(scope="module")
def params():
    fresh = fresh_params(OBJECTIVE)
    # Initial attention is nearly uniform: sharpen it.
    return jax.tree.map(lambda x: x * 1.5, fresh)


@pytest.fixture(scope="module")
def tokens(params):
    prepared = OBJECTIVE.prepare(on_device(tiny_batch(4)))
    return MODEL.embed(params, prepared.values_of(MODEL.inputs)).tokens


def last_maps(params, tokens, present=None) -> np.ndarray:
    maps = jax.jit(lambda p, t, x: MODEL.attentions(p, TokenBatch(t, LAYOUT, x)))(params, tokens, present)
    return np.asarray(maps[-1], float)


def test_global_reads_the_global_tokens_row(params, tokens):
    maps = last_maps(params, tokens)
    np.testing.assert_allclose(guide(params, tokens, "global", None), maps[:, :, -1, :48].mean(axis=1), rtol=1e-4, atol=1e-7)


def test_mean_averages_over_all_queries_the_global_one_too(params, tokens):
    maps = last_maps(params, tokens)
    result = guide(params, tokens, "mean", None)
    np.testing.assert_allclose(result, maps.mean(axis=(1, 2))[:, :48], rtol=1e-4, atol=1e-7)
    # The global column is dropped and the rest is not renormalized.
    np.testing.assert_allclose(np.asarray(result).sum(axis=1), 1 - maps.mean(axis=(1, 2))[:, 48], rtol=1e-5)
    assert (np.asarray(result).std(axis=1) > 1e-5).all()


@pytest.mark.parametrize("query", QUERIES)
def test_absent_tokens_neither_give_nor_get_attention(params, tokens, query):
    present = np.ones((4, 48), bool)
    present[1, 32:] = present[2, :16] = present[3, ::2] = False
    result = np.asarray(guide(params, tokens, query, jnp.asarray(present)))
    assert not result[~present].any()
    junk = jnp.where(present[:, :, None], tokens, 50.0)
    np.testing.assert_array_equal(result, guide(params, junk, query, jnp.asarray(present)))
    np.testing.assert_allclose(result[0], guide(params, tokens, query, None)[0], rtol=1e-4, atol=1e-7)


def test_a_sample_without_a_modality_is_guided_as_if_there_were_none(params):
    batch = {name: value for name, value in tiny_batch(2).items() if name != "semseg"}
    prepared = OBJECTIVE.prepare(on_device(batch))
    two = MODEL.embed(params, prepared.values_of(MODEL.inputs))
    assert two.layout.names == ("rgb", "depth")
    whole = jnp.concatenate([two.tokens, jnp.ones((2, 16, 48))], axis=1)
    present = jnp.broadcast_to(jnp.arange(48) < 32, (2, 48))
    for query in QUERIES:
        alone = jax.jit(lambda p, t, q=query: self_attention(MODEL, p, TokenBatch(t, two.layout), q))(params, two.tokens)
        np.testing.assert_allclose(guide(params, whole, query, present)[:, :32], alone, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("query", QUERIES)
def test_no_gradient_flows_through_guidance(params, tokens, query):
    gradient = jax.jit(jax.grad(lambda p, t: guide(p, t, query, None).sum(), argnums=(0, 1)))(params, tokens)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_guidance_is_looked_up_by_name():
    assert build_source(dict(name="self_attention", query="mean")) == GUIDANCE["self_attention"](query="mean")
    with pytest.raises(ValueError, match="config.objective.guidance.query is 'cls'; known: global, mean"):
        build_source(dict(name="self_attention", query="cls")).check(MODEL)
