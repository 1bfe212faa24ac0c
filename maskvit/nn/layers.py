"""Linear layers, the MLP and the norm of the Vision Transformer; convolutions and batch normalization; with their initial values."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.sharding import batch_devices, mean_over_devices, split_over_tensor


def xavier_uniform(parts: int = 1):
    """Xavier uniform over a (in, out) kernel; `parts` > 1 treats a fused kernel as that many separate ones."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = math.sqrt(6.0 / (shape[0] + shape[1] / parts))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def uniform_by_fan_in(fan_in: int):
    """PyTorch's default kernel and bias of linear layers and convolutions, uniform within 1 / sqrt(fan_in)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = 1.0 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def apply(module: nn.Module, params: Any, *arguments: Any, **options: Any) -> Any:
    """The module's result on these parameters. Flax's own `apply` may return changed variables beside it; ours change none."""
    return module.apply({"params": params}, *arguments, **options)


def apply_with_statistics(
    module: nn.Module, params: Any, statistics: Any, *arguments: Any, train: bool, rngs: dict[str, Array] | None = None, **options: Any
) -> tuple[Any, Any]:
    """(The module's result on these parameters and running statistics, the statistics after it).

    In training `BatchNorm` normalizes with the batch and the statistics change; else they are used as they are. A module that has
    none takes {} and gives {}. `rngs`: {"dropout": key} where the module drops in training.
    """
    variables = {"params": params, "statistics": statistics}
    if not train:
        return module.apply(variables, *arguments, train=False, rngs=rngs, **options), statistics
    result, changed = module.apply(variables, *arguments, train=True, rngs=rngs, mutable=["statistics"], **options)
    return result, changed.get("statistics", statistics)


class Dense(nn.Module):
    """A linear layer (kernel "in out"), with a bias unless `use_bias` is False. `columns` computes only that slice of the outputs.

    `parts`: of how many equal parts of these outputs each device of a tensor group computes some; 0 where all compute all.
    """

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = xavier_uniform()
    bias_init: Any = nn.initializers.zeros_init()
    use_bias: bool = True
    parts: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], columns: slice = slice(None)) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        used = kernel[:, columns].astype(self.dtype)
        if self.parts:
            used = split_over_tensor(used, 1, self.parts)
        # One flat matrix product: XLA's CPU backend is slow where a weight gradient contracts two batch axes.
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ used
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            flat = flat + bias[columns].astype(self.dtype)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


EPSILON = 1e-6  # added to the variance by every layer norm of a Vision Transformer


def _statistics(x: Array) -> tuple[Array, Array]:
    """Mean and 1 / standard deviation over the last axis, in float32, in two passes as PyTorch takes them."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + EPSILON)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x: Float[Array, "*b d"], scale: Float[Array, " d"], bias: Float[Array, " d"], dtype: Any) -> Float[Array, "*b d"]:
    """Layer norm of the last axis in float32, given as `dtype`.

    The backward pass reads tokens and gradient once for both parameters; what automatic differentiation makes of it writes and reads
    a float32 array of their size beside.
    """
    return _normalize_forward(x, scale, bias, dtype)[0]


def _normalize_forward(x: Array, scale: Array, bias: Array, dtype: Any) -> tuple[Array, tuple[Array, ...]]:
    mean, factor = _statistics(x)
    y = (x.astype(jnp.float32) - mean) * (factor * scale) + bias
    return y.astype(dtype), (x, mean, factor, scale)


def _normalize_backward(dtype: Any, kept: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, Array]:
    x, mean, factor, scale = kept
    # Else the compiler would take the statistics anew, which costs the pass over float32 that this is to save.
    mean, factor = jax.lax.optimization_barrier((mean, factor))
    wide = gradient.astype(jnp.float32)
    normed = (x.astype(jnp.float32) - mean) * factor
    rows = tuple(range(x.ndim - 1))
    scaled = wide * scale
    inner = scaled - scaled.mean(axis=-1, keepdims=True) - normed * (scaled * normed).mean(axis=-1, keepdims=True)
    return (factor * inner).astype(x.dtype), (wide * normed).sum(axis=rows), wide.sum(axis=rows)


normalize.defvjp(_normalize_forward, _normalize_backward)


class LayerNorm(nn.Module):
    """Layer norm with eps 1e-6 and two-pass float32 statistics, as PyTorch computes it."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        return normalize(x, scale, bias, self.dtype)


def layer_norm(dtype: Any, name: str | None = None) -> LayerNorm:
    """`LayerNorm` as a part of another module."""
    return LayerNorm(dtype, name=name)


@jax.custom_vjp
def gelu(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Exact (erf) GELU. Of the forward pass its input alone is kept, and the derivative made of it in float32.

    Automatic differentiation keeps the input and a second array of its size, which then cross memory twice more.
    """
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    return jax.nn.gelu(x, approximate=False), x


def _gelu_backward(x: Array, gradient: Array) -> tuple[Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * jnp.square(wide)) * (2 * math.pi) ** -0.5
    slope = 0.5 * jax.lax.erfc(-wide * 0.5**0.5) + wide * density
    return ((gradient.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = gelu(Dense(self.hidden, self.dtype, parts=self.hidden, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)


def convolve(kernel: Float[Array, "r s i o"], x: Float[Array, "b h w c"], stride: int = 1, groups: int = 1) -> Float[Array, "b u v o"]:
    """A square convolution (kernel "row column in out"), padded by half its side."""
    pad = kernel.shape[0] // 2
    options: dict[str, Any] = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad), (pad, pad)], **options)


class Conv(nn.Module):
    """A square convolution of odd `side`, padded by half of it; `groups` parts of the channels do not see each other.

    Kernel and bias begin as PyTorch's do, or, with a `kernel_init`, the kernel as it says and the bias at 0.
    """

    features: int
    side: int = 1
    stride: int = 1
    groups: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b u v o"]:
        shape = (self.side, self.side, x.shape[-1] // self.groups, self.features)
        default = uniform_by_fan_in(math.prod(shape[:3]))
        kernel = self.param("kernel", self.kernel_init or default, shape, jnp.float32)
        y = convolve(kernel.astype(self.dtype), x.astype(self.dtype), self.stride, self.groups)
        if not self.use_bias:
            return y
        bias_init = nn.initializers.zeros_init() if self.kernel_init else default
        return y + self.param("bias", bias_init, (self.features,), jnp.float32).astype(self.dtype)


class TransposedConv(nn.Module):
    """A transposed convolution (kernel "row column in out") whose stride is its side: one place becomes `side` x `side` ones.

    Initial values as PyTorch's, whose fan-in is that of the outputs here.
    """

    features: int
    side: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b u v o"]:
        (b, h, w, channels), s, o = x.shape, self.side, self.features
        initial = uniform_by_fan_in(s * s * o)
        kernel = self.param("kernel", initial, (s, s, channels, o), jnp.float32).astype(self.dtype)
        bias = self.param("bias", initial, (o,), jnp.float32).astype(self.dtype)
        # The places do not overlap: a linear layer to all that one place becomes.
        flat = x.reshape(-1, channels).astype(self.dtype) @ kernel.transpose(2, 0, 1, 3).reshape(channels, s * s * o)
        return flat.reshape(b, h, w, s, s, o).transpose(0, 1, 3, 2, 4, 5).reshape(b, h * s, w * s, o) + bias


class BatchNorm(nn.Module):
    """Batch normalization of the last axis over all others, in float32, as PyTorch's.

    In training the batch's mean and (biased) variance are used, and the running ones, the collection "statistics" (`mean`,
    `variance`), move towards the batch's by `momentum`, the weight of the new value; the running variance is unbiased. Else the
    running ones are used. `affine`: with `scale` and `bias`. In a train step on several devices their samples count as one batch, so
    nothing depends on their number; micro-batches are batches of their own.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1
    affine: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"], train: bool = False) -> Float[Array, "*b c"]:
        shape, x = (x.shape[-1],), x.astype(jnp.float32)
        running = self.variable("statistics", "mean", jnp.zeros, shape), self.variable("statistics", "variance", jnp.ones, shape)
        mean, variance = (value.value for value in running)
        if train:
            # In two passes: the mean of the squares would cancel where the mean is large.
            mean = self._over_batch(x)
            variance = self._over_batch(jnp.square(x - mean))
            count = math.prod(x.shape[:-1]) * batch_devices()
            if count < 2:
                raise ValueError("batch normalization needs more than one value per channel to train on: use larger batches")
            for kept, new in zip(running, (mean, variance * (count / (count - 1))), strict=True):
                kept.value = (1 - self.momentum) * kept.value + self.momentum * jax.lax.stop_gradient(new)
        y = (x - mean) * jax.lax.rsqrt(variance + self.epsilon)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones_init(), shape, jnp.float32)
            y = y * scale + self.param("bias", nn.initializers.zeros_init(), shape, jnp.float32)
        return y

    def _over_batch(self, x: Float[Array, "*b c"]) -> Float[Array, " c"]:
        return mean_over_devices(x.mean(axis=tuple(range(x.ndim - 1))))
