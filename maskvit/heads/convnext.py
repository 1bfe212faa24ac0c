"""MultiMAE's head of ConvNeXt blocks."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.core.patches import unpatchify
from maskvit.heads.dense import Maps, resize
from maskvit.nn.encoder import MOST
from maskvit.nn.layers import Conv, Dense, layer_norm


class ConvNextBlock(nn.Module):
    """Depthwise 7 x 7 convolution, LayerNorm, two linear layers with GELU between; with a residual, without LayerScale."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        y = Conv(channels, 7, groups=channels, dtype=self.dtype, name="dwconv")(x)
        y = Dense(4 * channels, self.dtype, name="pwconv1")(layer_norm(self.dtype, "norm")(y))
        return x + Dense(channels, self.dtype, name="pwconv2")(jax.nn.gelu(y, approximate=False))


class ConvNextHead(nn.Module):
    """Each token becomes a square of `preds_per_patch` places of width / preds_per_patch channels, then blocks, a linear layer, and
    bilinear up to the pixels.

    The maps stand side by side on the channel axis. Source: Bachmann et al., "MultiMAE", 2022; blocks of Liu et al., "A ConvNet for
    the 2020s", 2022.
    """

    channels: int
    width: int = 6144
    preds_per_patch: int = 16
    depth: int = 4
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.key, for sizes that cannot be."""
        if self.preds_per_patch < 1 or math.isqrt(self.preds_per_patch) ** 2 != self.preds_per_patch:
            raise ValueError(f"{where}.preds_per_patch is {self.preds_per_patch}; it must be a square such as 16 (4 x 4 places per token)")
        if not 1 <= self.width <= MOST["width"] or self.width % self.preds_per_patch:
            raise ValueError(f"{where}.width {self.width} must be at least 1 and divide by preds_per_patch {self.preds_per_patch}")
        if not 0 <= self.depth <= MOST["depth"]:
            raise ValueError(f"{where}.depth is {self.depth}; it must be at least 0 and at most {MOST['depth']}")

    @nn.compact
    def __call__(self, maps: Maps, size: tuple[int, int], train: bool = False) -> Float[Array, "b u v c"]:
        """Logits or values (float32) at `size`, (height, width) in pixels; the same in training."""
        x = Dense(self.width, self.dtype, name="proj")(jnp.concatenate(maps, axis=-1))
        b, h, w, _ = x.shape
        x = unpatchify(x.reshape(b, h * w, self.width), (h, w), math.isqrt(self.preds_per_patch))
        for i in range(self.depth):
            x = ConvNextBlock(self.dtype, name=f"block_{i:02d}")(x)
        # The last layer is float32 whatever the compute type.
        return resize(Conv(self.channels, name="head")(x), size)
