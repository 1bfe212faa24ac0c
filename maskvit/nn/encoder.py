"""The Vision Transformer: blocks, and an encoder that can stop at a block's attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from maskvit.nn.attention import SelfAttention, evened
from maskvit.nn.layers import Mlp, layer_norm

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


# `remat`: what of a block is kept for its backward pass beside its input; the rest is computed again. False keeps everything.
REMAT: dict[bool | str, Any] = {
    False: None,
    True: jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of its linear layers
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),  # the same, in the host's memory
}


def check_remat(remat: bool | str) -> bool | str:
    """`remat`, where it is a row of `REMAT`; else ValueError."""
    if remat not in REMAT:
        raise ValueError(f"config.objective.remat is {remat!r}; known: {', '.join(map(str, REMAT))}")
    return remat


class Block(nn.Module):
    """Pre-norm transformer block without dropout; `kernel`: what computes its attention (`maskvit.nn.attention.KERNELS`)."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    qkv_parts: int = 3
    kernel: str = "plain"

    def setup(self) -> None:
        self.norm1 = layer_norm(self.dtype)
        self.attn = SelfAttention(self.width, self.heads, self.dtype, self.qkv_parts, self.kernel)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = Mlp(round(self.width * self.mlp_ratio), self.dtype)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        branches: Float[Array, "two b"] | None = None,
        length: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """`branches`: what the attention and the MLP of each sample are multiplied with (`drop_path`). `length`: of `evened` tokens."""
        return self.after_norm(x, self.norm1(x), mask, branches, length)

    def after_norm(
        self,
        x: Float[Array, "b n d"],
        normed: Float[Array, "b n d"],
        mask: Bool[Array, "b n"] | None = None,
        branches: Float[Array, "two b"] | None = None,
        length: Int[Array, " b"] | None = None,
    ) -> Float[Array, "b n d"]:
        """The rest of the block, for tokens and what its first norm made of them."""
        attended = self.attn(normed, mask, length)
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
    remat: bool | str = False
    qkv_parts: int = 3
    kernel: str = "plain"

    def setup(self) -> None:
        block = nn.remat(Block, policy=REMAT[self.remat]) if self.remat else Block
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", block(self.width, self.heads, self.mlp_ratio, self.dtype, self.qkv_parts, self.kernel))

    def __call__(
        self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None, branches: Float[Array, "depth two b"] | None = None
    ) -> Float[Array, "b n d"]:
        return self.features(x, (self.depth,), mask, branches)[0]

    def features(
        self,
        x: Float[Array, "b n d"],
        layers: tuple[int, ...],
        mask: Bool[Array, "b n"] | None = None,
        branches: Float[Array, "depth two b"] | None = None,
    ) -> tuple[Float[Array, "b n d"], ...]:
        """Those in `layers` of f_0 (what enters block 0), f_1, ... f_depth (what leaves each block), ascending; no later block is run.

        `branches`: `drop_path`.
        """
        x, n = x.astype(self.dtype), x.shape[1]
        found, length = [x] if 0 in layers else [], None
        if mask is None:
            x, length = evened(x, self.kernel)
        for i in range(max(layers)):
            x = getattr(self, f"block_{i:02d}")(x, mask, None if branches is None else branches[i], length)
            found += [x[:, :n]] if i + 1 in layers else []
        return tuple(found)

    def with_attention(
        self, x: Float[Array, "b n d"], queries: slice, mask: Bool[Array, "b n"] | None = None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b a q n"]]:
        """All blocks, and the last one's attention of the tokens in `queries`, in one pass."""
        last = self.depth - 1
        return getattr(self, f"block_{last:02d}").with_attention(self.features(x, (last,), mask)[0], queries, mask)

    def attention(
        self, x: Float[Array, "b n d"], queries: slice, block: int, mask: Bool[Array, "b n"] | None = None
    ) -> Float[Array, "b a q n"]:
        """The attention of block `block` (negative counts from the end), and no work beyond it."""
        block %= self.depth
        return getattr(self, f"block_{block:02d}").attention(self.features(x, (block,), mask)[0], queries, mask)

    def key_features(self, x: Float[Array, "b n d"], block: int, mask: Bool[Array, "b n"] | None = None) -> Float[Array, "b n d"]:
        """The keys of block `block` (negative counts from the end), and no work beyond them."""
        block %= self.depth
        return getattr(self, f"block_{block:02d}").key_features(self.features(x, (block,), mask)[0])

    def attentions(self, x: Float[Array, "b n d"], mask: Bool[Array, "b n"] | None = None) -> list[Float[Array, "b a n n"]]:
        """The attention maps of every block, for pictures and rollout."""
        entering = self.features(x, tuple(range(self.depth)), mask)
        return [getattr(self, f"block_{i:02d}").attention(h, slice(None), mask) for i, h in enumerate(entering)]
