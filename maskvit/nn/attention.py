"""Multi-head attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from maskvit.nn.layers import Dense, xavier_uniform


def split_heads(x: Float[Array, "b n d"], heads: int) -> Float[Array, "b a n e"]:
    """Head h owns channels h*e ... h*e + e - 1."""
    b, n, d = x.shape
    return x.reshape(b, n, heads, d // heads).transpose(0, 2, 1, 3)


def attention_weights(
    q: Float[Array, "b a q e"], k: Float[Array, "b a n e"], mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b a q n"]:
    """Softmax over keys of q k^T / sqrt(e), in float32. `mask` True where a key may be attended to."""
    # The scale goes onto the queries: on the logits XLA's CPU backend is slower (2.6 times, for heads of width 32 on 196 tokens).
    logits = jnp.einsum("baqe,bane->baqn", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(logits, axis=-1)


def attend(
    q: Float[Array, "b q d"], k: Float[Array, "b n d"], v: Float[Array, "b n d"], heads: int, mask: Bool[Array, "b n"] | None = None
) -> Float[Array, "b q d"]:
    """Multi-head attention on projected tokens; `mask` as in `attention_weights`."""
    weights = attention_weights(split_heads(q, heads), split_heads(k, heads), mask)
    out = jnp.einsum("baqn,bane->baqe", weights.astype(v.dtype), split_heads(v, heads))
    b, a, n, e = out.shape
    return out.transpose(0, 2, 1, 3).reshape(b, n, a * e)


class SelfAttention(nn.Module):
    """Fused q | k | v projection (initialized as `qkv_parts` kernels), attention, output projection."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    qkv_parts: int = 3

    def setup(self) -> None:
        self.qkv = Dense(3 * self.width, self.dtype, xavier_uniform(parts=self.qkv_parts))
        self.proj = Dense(self.width, self.dtype)

    def __call__(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b n d"]:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self.proj(attend(q, k, v, self.heads, mask))

    def with_weights(
        self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a q n"]]:
        """What calling it gives, and the softmax attention of the tokens in `queries`, off one projection."""
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        weights = attention_weights(split_heads(q[:, queries], self.heads), split_heads(k, self.heads), mask)
        return self.proj(attend(q, k, v, self.heads, mask)), weights

    def weights(self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b a q n"]:
        """The softmax attention of the tokens in `queries` over all tokens; values and projection are not computed."""
        q = self.qkv(x[:, queries], columns=slice(0, self.width))
        k = self.qkv(x, columns=slice(self.width, 2 * self.width))
        return attention_weights(split_heads(q, self.heads), split_heads(k, self.heads), mask)

    def key_features(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The keys, heads side by side; nothing else is computed."""
        return self.qkv(x, columns=slice(self.width, 2 * self.width))


class CrossAttention(nn.Module):
    """Attention of queries over a context; fused k | v projection, initialized as `kv_parts` kernels."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    kv_parts: int = 2

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b q d"], context: Float[Array, "b v w"], mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b q d"]:
        q = Dense(self.width, self.dtype, name="q")(queries)
        k, v = jnp.split(Dense(2 * self.width, self.dtype, xavier_uniform(parts=self.kv_parts), name="kv")(context), 2, axis=-1)
        return Dense(self.width, self.dtype, name="proj")(attend(q, k, v, self.heads, mask))
