"""Linear and attentive probes against numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.heads.attentive import AttentiveProbe, Probe
from maskvit.nn.layers import apply_with_statistics

RNG = np.random.default_rng(0)
D = 128
PATCHES, GLOBAL = (RNG.standard_normal((3, n, D)).astype(np.float32) for n in (9, 2))


def random_params(head):
    shapes = jax.eval_shape(lambda key: head.init(key, jnp.asarray(PATCHES), jnp.asarray(GLOBAL)), jax.random.key(0))
    return jax.tree.map(lambda x: RNG.standard_normal(x.shape).astype(np.float32) / 8, shapes["params"]), shapes.get("statistics", {})


def run(head, params, statistics, train):
    fresh = jax.tree_util.tree_map_with_path(lambda path, x: jnp.full(x.shape, float(path[-1].key == "variance")), statistics)
    params = jax.tree.map(jnp.asarray, params)
    return apply_with_statistics(head, params, fresh, jnp.asarray(PATCHES), jnp.asarray(GLOBAL), train=train)


def normed(x):
    """Batch normalization without scale and bias, over all axes but the last."""
    axes = tuple(range(x.ndim - 1))
    return (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-6)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def classified(params, x):
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("batch_norm", (True, False))
@pytest.mark.parametrize("source", ("global", "mean", "both"))
def test_probe(source, batch_norm):
    head = Probe(5, source=source, batch_norm=batch_norm)
    params, statistics = random_params(head)
    x = {"global": GLOBAL[:, -1], "mean": PATCHES.mean(1), "both": np.concatenate([GLOBAL[:, -1], PATCHES.mean(1)], 1)}[source]
    expected = classified(params, normed(x) if batch_norm else x)
    logits, after = run(head, params, statistics, True)
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)
    if batch_norm:
        np.testing.assert_allclose(after["norm"]["mean"], 0.1 * x.mean(0), rtol=1e-4, atol=1e-6)
        evaluated, same = run(head, params, statistics, False)
        np.testing.assert_allclose(evaluated, classified(params, x / np.sqrt(1 + 1e-6)), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(same["norm"]["mean"], 0)
    else:
        assert after == {}


@pytest.mark.parametrize("all_tokens", (False, True))
@pytest.mark.parametrize("d_out", (1, 2))
def test_efficient_probing(d_out, all_tokens):
    """Query by query: softmax over all channels, and its own slice of the values."""
    head = AttentiveProbe(5, queries=8, d_out=d_out, all_tokens=all_tokens)
    params, statistics = random_params(head)
    tokens = np.concatenate([GLOBAL, PATCHES], 1) if all_tokens else PATCHES
    pooling = params["pooling"]
    values, part = tokens @ pooling["v"]["kernel"], D // d_out // 8
    slices = []
    for j in range(8):
        weights = softmax(tokens @ pooling["queries"][j] / np.sqrt(D))
        slices.append(np.einsum("bn,bne->be", weights, values[:, :, j * part : (j + 1) * part]))
    expected = classified(params, normed(np.concatenate(slices, 1)))
    np.testing.assert_allclose(run(head, params, statistics, True)[0], expected, rtol=1e-3, atol=1e-3)


def heads_of(tokens, query, keys, values, heads):
    width = D // heads
    parts = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        weights = softmax(keys[:, :, own] @ query[own] / np.sqrt(width))
        parts.append(np.einsum("bn,bne->be", weights, values[:, :, own]))
    return np.concatenate(parts, 1)


def test_capi():
    head = AttentiveProbe(5, pooling="capi", batch_norm=False)
    params, statistics = random_params(head)
    assert statistics == {}
    kv = PATCHES @ params["pooling"]["kv"]["kernel"] + params["pooling"]["kv"]["bias"]
    pooled = heads_of(PATCHES, params["pooling"]["query"][0], kv[:, :, :D], kv[:, :, D:], 2)
    np.testing.assert_allclose(run(head, params, statistics, True)[0], classified(params, pooled), rtol=1e-3, atol=1e-4)


def test_aim():
    head = AttentiveProbe(5, pooling="aim", heads=4)
    params, statistics = random_params(head)
    tokens = normed(PATCHES)
    keys, values = (tokens @ params["pooling"][name]["kernel"] for name in "kv")
    pooled = heads_of(tokens, params["pooling"]["query"][0], keys, values, 4)
    logits, after = run(head, params, statistics, True)
    np.testing.assert_allclose(logits, classified(params, normed(pooled)), rtol=1e-3, atol=1e-3)
    variance = PATCHES.reshape(-1, D).var(0, ddof=1)
    np.testing.assert_allclose(after["pooling"]["token_norm"]["variance"], 0.9 + 0.1 * variance, rtol=1e-4)
