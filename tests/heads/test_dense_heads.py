"""Dense heads: resampling and pooling against numpy and torch, UPerNet against torch, what training changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.types import tree_paths
from maskvit.heads.dense import LinearHead, adaptive_mean, resize
from maskvit.heads.dpt import DptHead
from maskvit.heads.upernet import UperNetHead
from maskvit.nn.layers import TransposedConv, apply, apply_with_statistics

RNG = np.random.default_rng(0)
FORWARD = dict(rtol=1e-4, atol=1e-5)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def first(x):
    """Channels first, as torch has them."""
    return np.moveaxis(np.asarray(x), -1, 1)


def bilinear(x, rows, columns):
    """Values of (b, h, w, c) at these fractional places, one by one."""
    b, h, w, c = x.shape
    out = np.zeros((b, len(rows), len(columns), c))
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            r, s = int(np.floor(row)), int(np.floor(column))
            below, beside = min(r + 1, h - 1), min(s + 1, w - 1)
            u, v = row - r, column - s
            out[:, i, j] = (1 - u) * ((1 - v) * x[:, r, s] + v * x[:, r, beside]) + u * ((1 - v) * x[:, below, s] + v * x[:, below, beside])
    return out


@pytest.mark.parametrize("size", [(8, 10), (7, 3), (1, 1), (4, 5)])
def test_resize_with_aligned_corners(size):
    x = draw(2, 4, 5, 3)
    rows, columns = (np.linspace(0, n - 1, out) if out > 1 else [0.0] for n, out in zip((4, 5), size, strict=True))
    np.testing.assert_allclose(resize(jnp.asarray(x), size, align_corners=True), bilinear(x, rows, columns), **FORWARD)


def test_resize_with_half_pixel_centers():
    x = draw(2, 4, 5, 3)
    rows, columns = (np.clip((np.arange(3 * n) + 0.5) / 3 - 0.5, 0, n - 1) for n in (4, 5))
    np.testing.assert_allclose(resize(jnp.asarray(x), (12, 15)), bilinear(x, rows, columns), **FORWARD)


@pytest.mark.parametrize("bins", (1, 2, 3, 6))
@pytest.mark.parametrize("grid", [(6, 6), (7, 4), (16, 11)])
def test_adaptive_mean(bins, grid):
    x = draw(2, *grid, 3)
    rows, columns = ([(i * n // bins, int(np.ceil((i + 1) * n / bins))) for i in range(bins)] for n in grid)
    expected = np.stack([np.stack([x[:, a:b, c:d].mean((1, 2)) for c, d in columns], 1) for a, b in rows], 1)
    np.testing.assert_allclose(adaptive_mean(jnp.asarray(x), bins), expected, **FORWARD)


def test_resampling_as_torch():
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    x = draw(2, 7, 5, 3)
    theirs = torch.tensor(first(x))
    for size in ((14, 10), (3, 9)):
        for align in (False, True):
            expected = functional.interpolate(theirs, size=size, mode="bilinear", align_corners=align)
            np.testing.assert_allclose(first(resize(jnp.asarray(x), size, align)), expected.numpy(), err_msg=f"{size} {align}", **FORWARD)
    for bins in (1, 2, 3, 6):
        expected = functional.adaptive_avg_pool2d(theirs, bins).numpy()
        np.testing.assert_allclose(first(adaptive_mean(jnp.asarray(x), bins)), expected, **FORWARD)
    params = {"kernel": jnp.asarray(draw(4, 4, 3, 6)), "bias": jnp.asarray(draw(6))}
    weight = torch.tensor(np.asarray(params["kernel"]).transpose(2, 3, 0, 1).copy())
    expected = functional.conv_transpose2d(theirs, weight, torch.tensor(np.asarray(params["bias"])), stride=4)
    np.testing.assert_allclose(first(apply(TransposedConv(6, 4), params, jnp.asarray(x))), expected.numpy(), **FORWARD)


# UPerNet, small: four maps of 12 channels on a grid of 6 x 8.
HEAD = UperNetHead(channels=5, width=8, auxiliary_width=4, dropout=0.0)
MAPS = tuple(jnp.asarray(draw(2, 6, 8, 12)) for _ in range(4))
SIZE = (30, 50)


@pytest.fixture(scope="module")
def variables():
    """Random parameters and statistics."""
    shapes = jax.eval_shape(lambda key: HEAD.init(key, MAPS, SIZE), jax.random.key(0))
    random = jax.tree.map(lambda x: jnp.asarray(draw(*x.shape) / np.sqrt(max(np.prod(x.shape[:-1]), 1))), shapes)
    random["statistics"] = jax.tree.map(jnp.abs, random["statistics"])
    return random


def run(head, variables, train, key=None):
    rngs = None if key is None else {"dropout": key}

    @jax.jit
    def go(params, statistics, maps):
        return apply_with_statistics(head, params, statistics, maps, SIZE, train=train, rngs=rngs)

    return go(variables["params"], variables["statistics"], MAPS)


class TorchUperNet:
    """The head's equations with torch's functions, after its description in MMSegmentation."""

    def __init__(self, torch, variables, train):
        self.torch, self.functional, self.train = torch, torch.nn.functional, train
        self.params = {name: torch.tensor(np.asarray(x)) for name, x in tree_paths(variables["params"]).items()}
        self.statistics = {name: torch.tensor(np.asarray(x)) for name, x in tree_paths(variables["statistics"]).items()}

    def norm(self, name, x):
        running = self.statistics[f"{name}/mean"], self.statistics[f"{name}/variance"]
        return self.functional.batch_norm(x, *running, self.params[f"{name}/scale"], self.params[f"{name}/bias"], self.train)

    def conv(self, name, x):
        kernel = self.params[f"{name}/kernel"].permute(3, 2, 0, 1)
        return self.functional.conv2d(x, kernel, self.params.get(f"{name}/bias"), padding=kernel.shape[-1] // 2)

    def layer(self, name, x):
        return self.functional.relu(self.norm(f"{name}/norm", self.conv(f"{name}/conv", x)))

    def up(self, name, x):
        return self.functional.conv_transpose2d(x, self.params[f"{name}/kernel"].permute(2, 3, 0, 1), self.params[f"{name}/bias"], stride=2)

    def resized(self, x, size):
        return self.functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

    def __call__(self, maps):
        a, b, c, d = maps
        a = self.up("up4_conv2", self.functional.gelu(self.norm("up4_norm", self.up("up4_conv1", a))))
        b, d = self.up("up2_conv", b), self.functional.max_pool2d(d, 2)
        pooled = [self.resized(self.layer(f"pool_{k}", self.functional.adaptive_avg_pool2d(d, k)), d.shape[2:]) for k in (1, 2, 3, 6)]
        laterals = [self.layer(f"lateral_{i}", x) for i, x in enumerate((a, b, c), 1)]
        laterals.append(self.layer("bottleneck", self.torch.cat([d, *pooled], 1)))
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + self.resized(laterals[i], laterals[i - 1].shape[2:])
        outs = [self.layer(f"pyramid_{i + 1}", laterals[i]) for i in range(3)] + [laterals[3]]
        outs = [self.resized(x, outs[0].shape[2:]) for x in outs]
        logits = self.conv("head/conv", self.layer("fusion", self.torch.cat(outs, 1)))
        auxiliary = self.conv("auxiliary_head/conv", self.layer("auxiliary", c))
        return self.resized(logits, SIZE), self.resized(auxiliary, SIZE)


@pytest.mark.parametrize("train", (False, True), ids=("evaluation", "training"))
def test_upernet_as_torch(variables, train):
    torch = pytest.importorskip("torch")
    theirs = TorchUperNet(torch, variables, train)
    expected, auxiliary = theirs([torch.tensor(first(x)) for x in MAPS])
    ours, statistics = run(HEAD, variables, train)
    if train:
        ours, also = ours
        np.testing.assert_allclose(first(also), auxiliary.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(first(ours), expected.numpy(), rtol=1e-3, atol=1e-4)
    for name, value in tree_paths(statistics).items():
        np.testing.assert_allclose(value, theirs.statistics[name].numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_upernet_drops_whole_channels(variables):
    """With the other channels' classifier weights at zero a logit's deviation from the bias is 0 or twice as large, per picture."""
    params = dict(variables["params"])
    kernel = params["head"]["conv"]["kernel"]
    params["head"] = {"conv": {**params["head"]["conv"], "kernel": jnp.zeros_like(kernel).at[:, :, 0].set(kernel[:, :, 0])}}
    alone = {**variables, "params": params}
    whole = run(HEAD, alone, True)[0][0] - params["head"]["conv"]["bias"]
    dropped = UperNetHead(channels=5, width=8, auxiliary_width=4, dropout=0.5)
    seen = set()
    for seed in range(4):
        part = run(dropped, alone, True, jax.random.key(seed))[0][0] - params["head"]["conv"]["bias"]
        for ours, full in zip(part, whole, strict=True):
            factor = 2.0 if abs(ours).max() > 1e-4 else 0.0
            np.testing.assert_allclose(ours, factor * full, rtol=1e-3, atol=1e-4)
            seen.add(factor)
    assert seen == {0.0, 2.0}


def test_heads_of_four_maps_refuse_others():
    for head, name in ((HEAD, "upernet"), (DptHead(1), "dpt")):
        with pytest.raises(ValueError, match=f"the {name} head reads four blocks, not 3"):
            jax.eval_shape(lambda key, head=head: head.init(key, MAPS[:3], SIZE), jax.random.key(0))


def test_dpt_for_classes_drops_in_training():
    head = DptHead(5, form="segmentation", width=8, layer_dims=(4, 4, 4, 4))
    params = jax.jit(lambda key: head.init(key, MAPS, SIZE))(jax.random.key(0))["params"]
    step = jax.jit(
        lambda key, train: apply_with_statistics(head, params, {}, MAPS, SIZE, train=train, rngs={"dropout": key}), static_argnums=1
    )
    a, b = (jax.random.key(i) for i in range(2))
    evaluated, trained = step(a, False)[0], step(a, True)[0]
    assert trained.shape == (2, *SIZE, 5) and step(a, True)[1] == {}
    np.testing.assert_array_equal(evaluated, step(b, False)[0])
    np.testing.assert_array_equal(trained, step(a, True)[0])
    assert abs(trained - step(b, True)[0]).max() > 1e-3 and abs(trained - evaluated).max() > 1e-3


def test_dpt_on_odd_grids():
    """Levels of a grid with odd sides fit, and the result is at the size that is asked for."""
    head, maps = DptHead(2, width=8, layer_dims=(4, 4, 4, 4)), tuple(jnp.zeros((1, 3, 5, 12)) for _ in range(4))
    for size in ((48, 80), (24, 40)):
        result = jax.eval_shape(lambda key, size=size: head.apply(head.init(key, maps, size), maps, size), jax.random.key(0))
        assert result.shape == (1, *size, 2)


@pytest.mark.parametrize("norm", ("none", "batch", "batch_affine"))
def test_linear(norm):
    """Two maps side by side, normalized, one matrix, and up; each norm as its definition says."""
    head, maps = LinearHead(5, norm=norm), MAPS[:2]
    kernel, bias = draw(24, 5), draw(5)
    params = {"head": {"kernel": jnp.asarray(kernel[None, None]), "bias": jnp.asarray(bias)}}
    x = np.concatenate(maps, axis=-1)
    if norm != "none":
        x = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + 1e-5)
    statistics = {} if norm == "none" else {"norm": {"mean": jnp.zeros(24), "variance": jnp.ones(24)}}
    if norm == "batch_affine":
        scale, shift = draw(24), draw(24)
        x = x * scale + shift
        params["norm"] = {"scale": jnp.asarray(scale), "bias": jnp.asarray(shift)}
    logits, after = apply_with_statistics(head, params, statistics, maps, (12, 16), train=True)
    rows, columns = (np.clip((np.arange(2 * n) + 0.5) / 2 - 0.5, 0, n - 1) for n in (6, 8))
    np.testing.assert_allclose(logits, bilinear(x @ kernel + bias, rows, columns), rtol=1e-3, atol=1e-4)
    assert jax.tree.structure(after) == jax.tree.structure(statistics)
