"""What replaces plain forms on accelerators, on the CPU: fused attention's shapes, GELU's and the layer norm's own derivatives."""

from __future__ import annotations

import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maskvit.core.types import Batch
from maskvit.nn import attention
from maskvit.nn.attention import attend, attention_kernel, evened, fitting_kernel, fused_attend, kernel_at, kernel_in_words, splash_attend
from maskvit.nn.layers import LayerNorm, apply, gelu
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh

XLA = functools.partial(fused_attend, implementation="xla")


@pytest.fixture
def without_gpu(monkeypatch):
    """JAX's fused attention by its form for all devices: the same shapes, lengths and layout as cuDNN's."""
    monkeypatch.setattr(attention, "fused_attend", XLA)


def tokens(*shape: int, seed: int = 0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (7, 7), (6, 9), (5, 8), (1, 3)])
def test_fused_attention_is_attention(queries, keys, without_gpu):
    """Outputs and the gradients of all three, where numbers of tokens are odd too."""
    q, k, v = tokens(2, queries, 24), tokens(2, keys, 24, seed=1), tokens(2, keys, 24, seed=2)
    weights = tokens(2, queries, 24, seed=3)

    def loss(q, k, v, kernel):
        out = attend(q, k, v, 3, kernel=kernel)
        return (out * weights).sum(), out

    both = [jax.jit(jax.value_and_grad(functools.partial(loss, kernel=kernel), (0, 1, 2), has_aux=True)) for kernel in ("cudnn", "plain")]
    found, plain = (function(q, k, v) for function in both)
    np.testing.assert_allclose(found[0][1], plain[0][1], rtol=2e-5, atol=1e-6)
    for ours, other in zip(found[1], plain[1], strict=True):
        np.testing.assert_allclose(ours, other, rtol=2e-5, atol=1e-6)


def test_tokens_that_are_not_there_come_out_as_zeros():
    """What lies behind the true number: not attended to, zeros out, gradients of zero; cuDNN promises the same of its padding."""
    x, length = evened(tokens(2, 5, 24), "cudnn")
    assert x.shape == (2, 6, 24) and length.tolist() == [5, 5]
    x = x.at[:, 5].set(1e4)  # whatever a block has made of it
    out, pull = jax.vjp(lambda q, k, v: XLA(q, k, v, 3, length, length), x, x, x)
    np.testing.assert_allclose(out[:, :5], attend(*[x[:, :5]] * 3, 3), rtol=2e-5, atol=1e-6)
    assert not out[:, 5].any() and not any(g[:, 5].any() for g in pull(jnp.ones_like(out).at[:, 5].set(0)))
    assert evened(x, "cudnn")[1] is None and evened(tokens(2, 5, 24), "plain")[0].shape[1] == 5


def test_a_mask_takes_plain_attention(monkeypatch):
    monkeypatch.setattr(attention, "fused_attend", lambda *_: pytest.fail("a fused kernel was given a mask"))
    q, mask = tokens(2, 5, 24), jnp.array([[True] * 5, [True, False, True, False, True]])
    np.testing.assert_array_equal(attend(q, q, q, 3, mask, "cudnn"), attend(q, q, q, 3, mask))


@pytest.mark.parametrize(("queries", "keys", "masked"), [(130, 261, False), (257, 257, True), (5, 900, False)])
def test_splash_attention_is_attention(queries, keys, masked, monkeypatch):
    """By JAX's interpreter of TPU kernels: outputs and gradients; numbers that no block divides, several blocks, a mask."""
    monkeypatch.setattr(attention, "splash_attend", functools.partial(splash_attend, interpret=True))
    q, k, v = tokens(2, queries, 128), tokens(2, keys, 128, seed=1), tokens(2, keys, 128, seed=2)
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (2, keys)) if masked else None
    weights = tokens(2, queries, 128, seed=3)

    def loss(q, k, v, kernel):
        out = attend(q, k, v, 2, mask, kernel)
        return (out * weights).sum(), out

    def by_itself(function):
        whole = dict(in_specs=PartitionSpec(), out_specs=PartitionSpec())
        return jax.shard_map(function, mesh=make_mesh(jax.devices()[:1]), **whole, check_vma=False)

    both = [jax.value_and_grad(functools.partial(loss, kernel=kernel), (0, 1, 2), has_aux=True) for kernel in ("splash", "plain")]
    found, plain = (jax.jit(by_itself(function))(q, k, v) for function in both)
    np.testing.assert_allclose(found[0][1], plain[0][1], rtol=2e-5, atol=2e-6)
    for ours, other in zip(found[1], plain[1], strict=True):
        np.testing.assert_allclose(ours, other, rtol=2e-5, atol=2e-6)
    assert not np.array_equal(found[0][1], plain[0][1])  # it was another computation


def test_splash_attention_is_for_many_keys_and_wide_heads(monkeypatch):
    """And for what each device does with its own samples."""
    assert kernel_at("splash", 256, 64) == "plain"
    monkeypatch.setattr(attention, "on_own_samples", lambda: True)
    assert [kernel_at("splash", *case) for case in ((256, 64), (255, 64), (256, 32))] == ["splash", "plain", "plain"]
    assert kernel_in_words("splash") == "splash; plain below 256 keys and for heads narrower than 64"
    assert kernel_at("cudnn", 4, 8) == "cudnn" and kernel_at("plain", 999, 64) == "plain"


MODALITIES = dict(
    rgb=dict(kind="continuous", channels=3, patch=4, loss="mse", scale=1 / 255, mean=(0.5,) * 3, std=(0.25,) * 3),
    depth=dict(kind="continuous", channels=1, patch=4, loss="l1"),
)
SMALL = dict(width=24, depth=2, heads=3)
METHODS = {
    "guided": dict(
        name="multimae", inputs=("rgb", "depth"), outputs=("rgb", "depth"), num_visible=10, scores=dict(name="attention_high"),
        guidance=dict(name="self_attention"),
    ),
    "mae": dict(name="mae"),
    "crossmae": dict(name="crossmae"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_objectives_with_fused_attention(name, without_gpu, monkeypatch):
    """The same masks, loss and gradients: 11 and 5 encoded tokens, 17 of MAE's decoder, 33 of the guidance pass are all odd."""
    monkeypatch.setattr("maskvit.objectives.methods.attention_kernel", lambda wanted, dtype: wanted)
    found = {}
    for kernel in ("plain", "cudnn"):
        names = ("rgb",) if name in ("mae", "crossmae") else ("rgb", "depth")
        block = dict(METHODS[name], encoder=SMALL, decoder=SMALL, attention=kernel)
        objective = build_objective(dict(image_size=(16, 16), modalities={n: MODALITIES[n] for n in names}, objective=block))
        assert objective.model.attention_kernel == kernel
        params = jax.jit(lambda key, o=objective: o.init(key)[0])(jax.random.key(0))
        rng = np.random.default_rng(0)
        pictures = {n: rng.integers(0, 256, (2, 16, 16, MODALITIES[n]["channels"])) for n in names}
        batch = Batch({n: jnp.asarray(x, jnp.uint8 if n == "rgb" else jnp.float32) for n, x in pictures.items()})
        keys, step = jax.random.split(jax.random.key(1), 2), jnp.zeros((), jnp.int32)
        found[kernel] = jax.jit(jax.value_and_grad(lambda p, o=objective, b=batch, k=keys, s=step: o.loss(p, {}, b, k, s)[0]))(params)
    np.testing.assert_allclose(found["cudnn"][0], found["plain"][0], rtol=1e-5)
    for ours, other in zip(*(jax.tree.leaves(found[kernel][1]) for kernel in ("cudnn", "plain")), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-3, atol=2e-6)


def test_which_kernel_is_chosen(monkeypatch):
    assert attention_kernel("auto", "bfloat16") == attention_kernel("auto", "float32") == attention_kernel("plain", "bfloat16") == "plain"
    assert attention_kernel("cudnn", "bfloat16") == "cudnn"
    for wanted, message in (("fast", "'fast'; known: auto, plain, cudnn"), ("cudnn", "which is for compute_dtype 'bfloat16'")):
        with pytest.raises(ValueError, match=message):
            attention_kernel(wanted, "float32")

    class Gpu:
        compute_capability = "9.0"

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Gpu()])
    assert attention_kernel("auto", "bfloat16") == "cudnn" and attention_kernel("auto", "float32") == "plain"
    Gpu.compute_capability = "8.0"
    assert attention_kernel("auto", "bfloat16") == "plain"
    assert fitting_kernel("tpu", None, "bfloat16") == "splash" and fitting_kernel("tpu", None, "float32") == "plain"


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-6), ("bfloat16", 1e-2)])
def test_gelu(dtype, rtol):
    """Values bit for bit, and its own derivative against automatic differentiation in float32."""
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), jnp.array([0.0, -40.0, 40.0])]).astype(dtype)
    plain = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_array_equal(jax.jit(gelu)(x), jax.jit(plain)(x))
    ours, g = jax.vjp(gelu, x)[1](jnp.full_like(x, 0.5))[0], jnp.full(x.shape, 0.5)
    np.testing.assert_allclose(ours.astype(jnp.float32), jax.vjp(plain, x.astype(jnp.float32))[1](g)[0], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm(dtype):
    """Values bit for bit those of Flax's layer, and the gradients of all three arguments."""
    x = (5 + 3 * tokens(4, 7, 32)).astype(dtype)
    theirs = flax.linen.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype)
    params, weights = dict(scale=tokens(32), bias=tokens(32, seed=1)), tokens(4, 7, 32, seed=2)

    def loss(module, params, x):
        y = apply(module, params, x)
        return (y.astype(jnp.float32) * weights).sum(), y

    both = [jax.jit(jax.value_and_grad(functools.partial(loss, module), (0, 1), has_aux=True)) for module in (LayerNorm(dtype), theirs)]
    found, plain = (function(params, x) for function in both)
    np.testing.assert_array_equal(found[0][1], plain[0][1])
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == "float32" else dict(rtol=2e-2, atol=2e-2)
    for ours, other in zip(*(jax.tree.leaves(x[1]) for x in (found, plain)), strict=True):
        np.testing.assert_allclose(ours.astype(jnp.float32), other.astype(jnp.float32), **tolerance)
