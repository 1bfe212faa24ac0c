"""Segmenter's mask transformer as a head."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.heads.dense import Maps, resize
from maskvit.nn.encoder import Block, check_sizes
from maskvit.nn.layers import Dense, layer_norm


def _unit(x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """Of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class SegmenterHead(nn.Module):
    """Patches and one learned token per class attend to one another; a logit is the cosine of a patch and a class, normalized over classes.

    The maps stand side by side on the channel axis; the class tokens after the patches. Source: Strudel et al., "Segmenter", 2021,
    as MultiMAE has it.
    """

    channels: int
    width: int = 768
    depth: int = 4
    heads: int = 12
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.key, for sizes that cannot be."""
        check_sizes(where, dict(width=self.width, depth=self.depth, heads=self.heads))

    @nn.compact
    def __call__(self, maps: Maps, size: tuple[int, int], train: bool = False) -> Float[Array, "b u v c"]:
        """Logits (float32) at `size`, (height, width) in pixels; the same in training."""
        x = Dense(self.width, self.dtype, name="proj")(jnp.concatenate(maps, axis=-1))
        b, h, w, _ = x.shape
        # The reference's normal is truncated at a hundred deviations.
        class_tokens = self.param("class_tokens", nn.initializers.normal(0.02), (self.channels, self.width), jnp.float32)
        x = jnp.concatenate([x.reshape(b, h * w, -1), jnp.broadcast_to(class_tokens.astype(x.dtype), (b, *class_tokens.shape))], axis=1)
        for i in range(self.depth):
            x = Block(self.width, self.heads, dtype=self.dtype, name=f"block_{i:02d}")(x)
        x = layer_norm(self.dtype, "norm")(x)
        patches = _unit(Dense(self.width, self.dtype, use_bias=False, name="patch_proj")(x[:, : h * w]))
        classes = _unit(Dense(self.width, self.dtype, use_bias=False, name="class_proj")(x[:, h * w :]))
        logits = layer_norm(jnp.float32, "mask_norm")(jnp.einsum("bnd,bcd->bnc", patches, classes))
        return resize(logits.reshape(b, h, w, self.channels), size)
