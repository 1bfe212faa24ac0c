"""The Vision Transformer: linear layers, attention, blocks, and an encoder that can stop at a block's attention.

The maths is plain JAX; modules only hold parameters. Compute runs in `dtype`, while parameters, layer-norm statistics
and softmax stay in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key

# "B": the sizes of ViT-B and so on; heads of width 64, of 80 in "H".
VARIANTS = {
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
}
MOST = {"width": 2**16, "depth": 2**10, "heads": 2**10}  # far beyond any ViT: what exceeds it is a slip, or a file that means harm


def transformer_sizes(*, width: int, depth: int, heads: int, mlp_ratio: float | int = 4.0) -> None:
    """The sizes of a stack of blocks as a config gives them; the signature is the reference."""


def check_sizes(where: str, sizes: Mapping[str, Any], least_depth: int = 1) -> None:
    """Raise ValueError, naming `where`.key, for widths, depths and heads that cannot be a stack of blocks."""
    for key, most in MOST.items():
        least = least_depth if key == "depth" else 1
        if not least <= sizes[key] <= most:
            raise ValueError(f"{where}.{key} is {sizes[key]}; it must be at least {least} and at most {most}")
    if sizes["width"] % sizes["heads"] or sizes["width"] % 4:
        raise ValueError(f"{where}.width {sizes['width']} must divide by its {sizes['heads']} heads and by 4")
    if not 0 < sizes.get("mlp_ratio", 4) <= 64:
        raise ValueError(f"{where}.mlp_ratio is {sizes['mlp_ratio']}; it must be above 0 and at most 64")


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


class Mlp(nn.Module):
    """Linear, exact (erf) GELU, linear."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        hidden = jax.nn.gelu(Dense(self.hidden, self.dtype, name="fc1")(x), approximate=False)
        return Dense(x.shape[-1], self.dtype, name="fc2")(hidden)


class SelfAttention(nn.Module):
    """Fused q | k | v projection (initialised as `qkv_parts` kernels), attention, output projection."""

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


class Block(nn.Module):
    """Pre-norm transformer block without dropout."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    qkv_parts: int = 3

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attn = SelfAttention(self.width, self.heads, self.dtype, self.qkv_parts)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = Mlp(round(self.width * self.mlp_ratio), self.dtype)

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, branches: Float[Array, "two b"] | None = None
    ) -> Float[Array, "b n d"]:
        """`branches`: what the attention and the MLP of each sample are multiplied with (`drop_path`)."""
        return self.behind_norm(x, self.norm1(x), mask, branches)

    def behind_norm(
        self,
        x: Float[Array, "b n d"],
        normed: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        branches: Float[Array, "two b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """The rest of the block, for tokens and what its first norm made of them."""
        attended = self.attn(normed, mask)
        if branches is None:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        scales = branches[:, :, None, None].astype(x.dtype)
        x = x + scales[0] * attended
        return x + scales[1] * self.mlp(self.norm2(x))

    def with_attention(
        self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a q n"]]:
        """What the block makes of the tokens, and its attention of those in `queries`."""
        attended, weights = self.attn.with_weights(self.norm1(x), queries, mask)
        x = x + attended
        return x + self.mlp(self.norm2(x)), weights

    def attention(self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b a q n"]:
        """This block's attention of the tokens in `queries`, and nothing beyond it."""
        return self.attn.weights(self.norm1(x), queries, mask)

    def key_features(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """This block's keys, and nothing beyond them."""
        return self.attn.key_features(self.norm1(x))


def drop_path(keys: Key[Array, " b"], depth: int, rate: float) -> Float[Array, "depth two b"]:
    """Stochastic depth: each sample's factor on both branches of every block, 0 or 1 / (share kept).

    The share dropped grows linearly from 0 in the first block to `rate` in the last. Source: Huang et al., "Deep Networks
    with Stochastic Depth", 2016.
    """
    kept = 1 - jnp.linspace(0.0, rate, depth)[:, None]
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)
    return jnp.moveaxis((draws < kept) / kept, 0, -1)


class Encoder(nn.Module):
    """A stack of separate blocks `block_00`, `block_01`, ... without a final norm.

    Separate, not scanned: their names map one to one to every checkpoint family, and a pass can stop inside any block.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    remat: bool = False
    qkv_parts: int = 3

    def setup(self) -> None:
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", block(self.width, self.heads, self.mlp_ratio, self.dtype, self.qkv_parts))

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, branches: Float[Array, "depth two b"] | None = None
    ) -> Float[Array, "b n d"]:
        return self.blocks(x, 0, self.depth, mask, branches)

    def blocks(
        self,
        x: Float[Array, "b n d"],
        start: int,
        stop: int,
        mask: Bool[Array, "b n"] | None = None,
        branches: Float[Array, "depth two b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """Blocks start ... stop - 1 only."""
        x = x.astype(self.dtype)
        for i in range(start, stop):
            x = getattr(self, f"block_{i:02d}")(x, mask, None if branches is None else branches[i])
        return x

    def with_attention(
        self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a q n"]]:
        """All blocks, and the last one's attention of the tokens in `queries`, in one pass."""
        x = self.blocks(x, 0, self.depth - 1, mask)
        return getattr(self, f"block_{self.depth - 1:02d}").with_attention(x, queries, mask)

    def features(
        self, x: Float[Array, "b n d"], wanted: tuple[int, ...], mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], ...]:
        """The wanted ones of f_0 (what enters block 0), f_1, ... f_depth (what leaves each block), in ascending order."""
        x = x.astype(self.dtype)
        found = [x] if 0 in wanted else []
        for i in range(max(wanted)):
            x = getattr(self, f"block_{i:02d}")(x, mask)
            found += [x] if i + 1 in wanted else []
        return tuple(found)

    def attention(
        self, x: Float[Array, "b n d"], queries: slice, block: int, mask: Bool[Array, "b n"] | None = None, start: int = 0
    ) -> Float[Array, "b a q n"]:
        """The attention of block `block` (negative counts from the end) on tokens as block `start` finds them; no work beyond."""
        block %= self.depth
        x = self.blocks(x, start, block, mask)
        return getattr(self, f"block_{block:02d}").attention(x, queries, mask)

    def key_features(self, x: Float[Array, "b n d"], block: int, mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b n d"]:
        """The keys of block `block` (negative counts from the end); later work is not computed."""
        block %= self.depth
        return getattr(self, f"block_{block:02d}").key_features(self.blocks(x, 0, block, mask))

    def attentions(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None) -> list[Float[Array, "b a n n"]]:
        """The attention maps of every block, for pictures and rollout."""
        x = x.astype(self.dtype)
        maps = []
        for i in range(self.depth):
            block = getattr(self, f"block_{i:02d}")
            maps.append(block.attention(x, slice(None), mask))
            x = block(x, mask)
        return maps
