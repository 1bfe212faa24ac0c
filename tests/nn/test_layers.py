"""Batch normalization with explicit statistics, convolutions, and their initial values."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.types import tree_paths
from maskvit.nn.layers import BatchNorm, Conv, TransposedConv, apply, apply_with_statistics
from maskvit.sharding import make_mesh, on_each_device, sample_devices

RNG = np.random.default_rng(0)
X = (RNG.standard_normal((2, 3, 4, 5, 6)) * 3 + 100).astype(np.float32)  # two steps of (b, h, w, c), far from zero
PARAMS = {"scale": RNG.standard_normal(6).astype(np.float32), "bias": RNG.standard_normal(6).astype(np.float32)}
FRESH = {"mean": np.zeros(6, np.float32), "variance": np.ones(6, np.float32)}


def test_batch_norm_over_two_steps():
    """Against the definition in float64; the second step continues the first one's statistics, and evaluation uses them."""
    norm, statistics = BatchNorm(epsilon=1e-3, momentum=0.3), FRESH
    mean, variance = np.zeros(6), np.ones(6)
    for x in X:
        flat = x.reshape(-1, 6).astype(np.float64)
        y, statistics = apply_with_statistics(norm, PARAMS, statistics, jnp.asarray(x), train=True)
        expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-3) * PARAMS["scale"] + PARAMS["bias"]
        np.testing.assert_allclose(y.reshape(-1, 6), expected, rtol=1e-4, atol=1e-4)
        mean, variance = 0.7 * mean + 0.3 * flat.mean(0), 0.7 * variance + 0.3 * flat.var(0, ddof=1)
        np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(statistics["variance"], variance, rtol=1e-5)
    y, after = apply_with_statistics(norm, PARAMS, statistics, jnp.asarray(X[0]), train=False)
    expected = (X[0] - mean) / np.sqrt(variance + 1e-3) * PARAMS["scale"] + PARAMS["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert after is statistics


def test_batch_norm_as_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.BatchNorm2d(6, eps=1e-6, momentum=0.1)
    theirs.weight.data, theirs.bias.data = torch.tensor(PARAMS["scale"]), torch.tensor(PARAMS["bias"])
    statistics, weights = FRESH, RNG.standard_normal(X[0].shape).astype(np.float32)
    norm = BatchNorm(epsilon=1e-6)

    def loss(params, x, statistics):
        y, after = apply_with_statistics(norm, params, statistics, x, train=True)
        return (y * weights).sum(), (y, after)

    for x in X:
        source = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
        theirs.zero_grad()
        expected = theirs(source)
        (expected * torch.tensor(weights.transpose(0, 3, 1, 2))).sum().backward()
        (of_params, of_x), (y, statistics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(PARAMS, jnp.asarray(x), statistics)
        np.testing.assert_allclose(y, expected.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(of_x, source.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(of_params["scale"], theirs.weight.grad.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(statistics["mean"], theirs.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(statistics["variance"], theirs.running_var.numpy(), rtol=1e-5)


@pytest.mark.parametrize("sharding", [{}, dict(fsdp=2), dict(tensor=2)])
def test_the_batches_of_all_devices_count_as_one(sharding):
    """Parts of a batch on the devices of a step give what the whole batch gives, gradients too."""
    mesh = make_mesh(**sharding)
    whole = X.reshape(-1, 6)
    weights = RNG.standard_normal(whole.shape).astype(np.float32)

    def step(x, weights):
        def loss(x):
            y, after = apply_with_statistics(BatchNorm(affine=False), {}, FRESH, x, train=True)
            return (y * weights).sum(), (y, after)

        return jax.grad(loss, has_aux=True)(x)

    def on_device(params, shared, samples, exchange):
        gradient, (y, statistics) = step(*samples)
        return (), exchange.total(statistics), (gradient, y)

    gradient, (y, statistics) = step(whole, weights)
    _, sums, (ours, theirs) = jax.jit(lambda *samples: on_each_device(on_device, mesh)((), (), samples))(whole, weights)
    np.testing.assert_allclose(theirs, y, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours, gradient, rtol=1e-3, atol=1e-5)
    for name, value in statistics.items():
        np.testing.assert_allclose(sums[name] / sample_devices(mesh), value, rtol=1e-5, err_msg=name)


def test_batch_norm_of_one_value():
    with pytest.raises(ValueError, match="more than one value per channel"):
        apply_with_statistics(BatchNorm(affine=False), {}, FRESH, jnp.asarray(X[0, :1, 0, 0]), train=True)


def test_a_module_without_statistics():
    x = jnp.asarray(X[0])
    params = Conv(2).init(jax.random.key(0), x)["params"]

    class Plain(Conv):
        def __call__(self, x, train):
            return super().__call__(x) + train

    for train in (False, True):
        y, after = apply_with_statistics(Plain(2), params, {}, x, train=train)
        np.testing.assert_allclose(y, apply(Conv(2), params, x) + train, rtol=1e-6)
        assert after == {}


@pytest.mark.parametrize(
    "module,fan_in",
    [(Conv(8, 3), 9 * 64), (Conv(64, 7, groups=64), 49), (Conv(8, use_bias=False), 64), (TransposedConv(16, 4), 16 * 16)],
    ids=("square", "depthwise", "without bias", "transposed"),
)
def test_initial_values_are_pytorchs(module, fan_in):
    """Uniform within 1 / sqrt(fan-in), kernels and biases."""
    params = tree_paths(module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 64)))["params"])
    bound = 1 / math.sqrt(fan_in)
    assert set(params) == {"kernel", "bias"} - ({"bias"} if not getattr(module, "use_bias", True) else set())
    for name, value in params.items():
        assert 0.7 * bound < abs(value).max() <= bound, name
    np.testing.assert_allclose(params["kernel"].std(), bound / math.sqrt(3), rtol=0.1)


@pytest.mark.parametrize("stride", (1, 2))
def test_convolution_against_loops(stride):
    x, kernel = X[0], RNG.standard_normal((3, 3, 6, 2)).astype(np.float32)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = np.stack(
        [
            np.stack([np.einsum("brsc,rsco->bo", padded[:, i : i + 3, j : j + 3], kernel) for j in range(0, 5, stride)], axis=1)
            for i in range(0, 4, stride)
        ],
        axis=1,
    )
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.float32([1, -1])}
    np.testing.assert_allclose(apply(Conv(2, 3, stride), params, jnp.asarray(x)), expected + params["bias"], rtol=1e-4, atol=1e-3)
