"""Probes of frozen features: a linear layer on pooled tokens, the pooling fixed or by attention."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.nn.attention import attend, attention_weights
from maskvit.nn.layers import BatchNorm, Dense, uniform_by_fan_in

EPSILON = 1e-6  # of the probes' batch normalization
CAPI_HEAD_WIDTH = 64


def _classifier(num_classes: int, width: int, torch_default: bool, deviation: float = 0.02) -> Dense:
    """The last layer, float32 whatever the compute type."""
    if torch_default:
        initial = uniform_by_fan_in(width)
        return Dense(num_classes, jnp.float32, initial, initial, name="head")
    # The references' normal is truncated at a hundred deviations.
    return Dense(num_classes, jnp.float32, nn.initializers.normal(deviation), name="head")


class Probe(nn.Module):
    """A linear layer on the last global token, the mean of the patches, or both side by side. Float32 whatever `dtype`.

    The global token may be that of several blocks side by side, as in DINO's and iBOT's evaluation of small models. `batch_norm`:
    normalized before, without scale and bias. Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, its linear
    probing.
    """

    num_classes: int
    source: Literal["global", "mean", "both"] = "global"
    batch_norm: bool = True
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.source, where the backbone has not what it reads."""
        if self.source != "mean" and not num_global_tokens:
            raise ValueError(f"{where}.source is {self.source!r}, but the model has no global token: set it to 'mean'")

    @nn.compact
    def __call__(self, patches: Float[Array, "b n d"], global_tokens: Float[Array, "b g e"], train: bool = False) -> Float[Array, "b c"]:
        """Class scores (before the softmax, float32)."""
        parts = {"global": lambda: global_tokens[:, -1], "mean": lambda: patches.astype(jnp.float32).mean(axis=1)}
        read = ("global", "mean") if self.source == "both" else (self.source,)
        x = jnp.concatenate([parts[name]().astype(jnp.float32) for name in read], axis=-1)
        if self.batch_norm:
            x = BatchNorm(EPSILON, affine=False, name="norm")(x, train)
        return _classifier(self.num_classes, x.shape[-1], False, 0.01)(x)


class EfficientPooling(nn.Module):
    """`queries` learned queries attend to the tokens as they are; each pools its own slice of the values' d / `d_out` channels.

    Source: Psomas et al., "Attention, Please! Revisiting Attentive Probing", 2025 (efficient probing).
    """

    queries: int
    d_out: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b e"]:
        b, n, d = tokens.shape
        queries = self.param("queries", nn.initializers.normal(0.02), (self.queries, d), jnp.float32).astype(self.dtype)
        weights = attention_weights(jnp.broadcast_to(queries, (b, 1, *queries.shape)), tokens.astype(self.dtype)[:, None])[:, 0]
        values = Dense(d // self.d_out, self.dtype, uniform_by_fan_in(d), use_bias=False, name="v")(tokens)
        values = values.reshape(b, n, self.queries, -1)
        return jnp.einsum("bqn,bnqe->bqe", weights.astype(self.dtype), values).reshape(b, -1)


class CapiPooling(nn.Module):
    """One learned query attends to keys and values of one linear layer, in heads of width 64.

    Source: Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image Modeling" (CAPI), 2025.
    """

    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        b, _, d = tokens.shape
        query = self.param("query", nn.initializers.normal(0.02), (1, d), jnp.float32).astype(self.dtype)
        k, v = jnp.split(Dense(2 * d, self.dtype, nn.initializers.normal(0.02), name="kv")(tokens), 2, axis=-1)
        return attend(jnp.broadcast_to(query, (b, 1, d)), k, v, d // CAPI_HEAD_WIDTH)[:, 0]


class AimPooling(nn.Module):
    """One learned query attends to keys and values of the batch-normalized tokens.

    Source: El-Nouby et al., "Scalable Pre-training of Large Autoregressive Image Models" (AIM), 2024.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Float[Array, "b n d"], train: bool) -> Float[Array, "b d"]:
        b, _, d = tokens.shape
        tokens = BatchNorm(EPSILON, affine=False, name="token_norm")(tokens, train)
        query = self.param("query", nn.initializers.normal(0.02), (1, d), jnp.float32).astype(self.dtype)
        k, v = (Dense(d, self.dtype, uniform_by_fan_in(d), use_bias=False, name=name)(tokens) for name in "kv")
        return attend(jnp.broadcast_to(query, (b, 1, d)), k, v, self.heads)[:, 0]


class AttentiveProbe(nn.Module):
    """A linear layer on tokens that attention pools.

    Attributes:
      pooling: "ep" (efficient probing), "capi" or "aim"; of the three only ep's takes `queries` and `d_out`, only aim's `heads`.
      all_tokens: the global tokens take part too.
      batch_norm: normalize what is pooled, without scale and bias. CAPI does not.
    """

    num_classes: int
    pooling: Literal["ep", "capi", "aim"] = "ep"
    queries: int = 32
    d_out: int = 1
    heads: int = 16
    all_tokens: bool = False
    batch_norm: bool = True
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.key, for what cannot be or is not read."""
        read = {"ep": ("queries", "d_out"), "capi": (), "aim": ("heads",)}[self.pooling]
        for key in ("queries", "d_out", "heads"):
            value = getattr(self, key)
            if key not in read and value != getattr(AttentiveProbe, key):
                raise ValueError(f"{where}.{key} is {value}, but the pooling {self.pooling!r} has none: leave it out")
            if value < 1:
                raise ValueError(f"{where}.{key} is {value}; it must be at least 1")
        parts, of = {
            "ep": (self.queries * self.d_out, f"queries {self.queries} times d_out {self.d_out}"),
            "capi": (CAPI_HEAD_WIDTH, f"{CAPI_HEAD_WIDTH}, the width of capi's heads"),
            "aim": (self.heads, f"heads {self.heads}"),
        }[self.pooling]
        if width % parts:
            raise ValueError(f"{where}: the tokens' width {width} must divide by {of}")
        if self.all_tokens and not num_global_tokens:
            raise ValueError(f"{where}.all_tokens is True, but the model has no global token: leave it out")

    @nn.compact
    def __call__(self, patches: Float[Array, "b n d"], global_tokens: Float[Array, "b g d"], train: bool = False) -> Float[Array, "b c"]:
        """Class scores (before the softmax, float32)."""
        tokens = jnp.concatenate([global_tokens, patches], axis=1) if self.all_tokens else patches
        if self.pooling == "ep":
            x = EfficientPooling(self.queries, self.d_out, self.dtype, name="pooling")(tokens)
        elif self.pooling == "capi":
            x = CapiPooling(self.dtype, name="pooling")(tokens)
        else:
            x = AimPooling(self.heads, self.dtype, name="pooling")(tokens, train)
        x = x.astype(jnp.float32)
        if self.batch_norm:
            x = BatchNorm(EPSILON, affine=False, name="norm")(x, train)
        return _classifier(self.num_classes, x.shape[-1], self.pooling != "capi")(x)
