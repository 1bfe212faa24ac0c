"""Linear layers, the MLP and the norm of the Vision Transformer, with their initial values."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


def xavier_uniform(parts: int = 1):
    """Xavier uniform over a (in, out) kernel; `parts` > 1 treats a fused kernel as that many separate ones."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = math.sqrt(6.0 / (shape[0] + shape[1] / parts))
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def uniform_by_fan_in(fan_in: int):
    """PyTorch's default bias of a convolution, uniform within 1 / sqrt(fan_in); MultiMAE's patch projections keep it."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        bound = 1.0 / math.sqrt(fan_in)
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def apply(module: nn.Module, params: Any, *arguments: Any, **options: Any) -> Any:
    """The module's result on these parameters. Flax's own `apply` may return changed variables beside it; ours change none."""
    return module.apply({"params": params}, *arguments, **options)


class Dense(nn.Module):
    """A linear layer (kernel "in out"). `columns` computes only that slice of the outputs."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: Any = xavier_uniform()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: Float[Array, "*b i"], columns: slice = slice(None)) -> Float[Array, "*b o"]:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        kernel, bias = kernel[:, columns].astype(self.dtype), bias[columns].astype(self.dtype)
        # One flat matrix product: XLA's CPU backend is slow where a weight gradient contracts two batch axes.
        flat = x.reshape(-1, x.shape[-1]).astype(self.dtype) @ kernel + bias
        return flat.reshape(*x.shape[:-1], flat.shape[-1])


def layer_norm(dtype: Any, name: str | None = None) -> nn.LayerNorm:
    """LayerNorm with eps 1e-6 and two-pass float32 statistics, as PyTorch computes it."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = jax.nn.gelu(Dense(self.hidden, self.dtype, name="fc1")(x), approximate=False)
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)
