"""The head of the Dense Prediction Transformer: features of four blocks, fused from coarse to fine."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.heads.dense import Maps, four_maps, resize
from maskvit.nn.encoder import MOST
from maskvit.nn.layers import Conv, TransposedConv


class ResidualUnit(nn.Module):
    """ReLU and 3 x 3 convolution, twice, beside the input."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = Conv(x.shape[-1], 3, dtype=self.dtype, name="conv1")(jax.nn.relu(x))
        return x + Conv(x.shape[-1], 3, dtype=self.dtype, name="conv2")(jax.nn.relu(y))


class Reassemble(nn.Module):
    """A token map at the scale of level 1 ... 4 (four times, twice, once, half the grid's), in the channels that fusion works with."""

    level: int
    channels: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b u v c"]:
        x = Conv(self.channels, dtype=self.dtype, name="proj")(x)
        if self.level < 3:
            x = TransposedConv(self.channels, {1: 4, 2: 2}[self.level], self.dtype, name="resize")(x)
        elif self.level == 4:
            x = Conv(self.channels, 3, stride=2, dtype=self.dtype, name="resize")(x)
        return Conv(self.width, 3, use_bias=False, dtype=self.dtype, name="reduce")(x)


class DptHead(nn.Module):
    """DPT's decoder for values ("regression") or classes ("segmentation"), as MultiMAE has it.

    Level 4 has no first residual unit: the reference holds one there that it never uses. With patches of 16 pixels the result is at
    the size of the image and `size` changes nothing; else it is resampled from 16 pixels per token. Source: Ranftl et al., "Vision
    Transformers for Dense Prediction", 2021.

    Attributes:
      form: the layers behind the fusion; "segmentation" drops values (a tenth, in training) before the classifier.
      width: channels of the fusion.
      layer_dims: channels that the four maps are projected to.
    """

    channels: int
    form: Literal["regression", "segmentation"] = "regression"
    width: int = 256
    layer_dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.key, for sizes that cannot be."""
        if not 2 <= self.width <= MOST["width"] or self.width % 2:
            raise ValueError(f"{where}.width is {self.width}; it must be even, at least 2 and at most {MOST['width']}")
        if not all(1 <= width <= MOST["width"] for width in self.layer_dims):
            raise ValueError(f"{where}.layer_dims is {self.layer_dims}; each must be at least 1 and at most {MOST['width']}")

    @nn.compact
    def __call__(self, maps: Maps, size: tuple[int, int], train: bool = False) -> Float[Array, "b u v c"]:
        """Values or logits (float32) at `size`, (height, width) in pixels, of the maps of four blocks."""
        h, w = four_maps(maps, "dpt")[0].shape[1:3]
        levels = [Reassemble(i + 1, self.layer_dims[i], self.width, self.dtype, name=f"reassemble_{i + 1}")(maps[i]) for i in range(4)]
        # Twice as large each time; of a grid with an odd side the next level says how large.
        scales = [(8 * h, 8 * w), *(level.shape[1:3] for level in levels[:3])]
        x = levels[3]
        for i in (4, 3, 2, 1):
            if i < 4:
                x = x + ResidualUnit(self.dtype, name=f"fusion_{i}_unit1")(levels[i - 1])
            x = resize(ResidualUnit(self.dtype, name=f"fusion_{i}_unit2")(x), scales[i - 1], align_corners=True)
            x = Conv(self.width, dtype=self.dtype, name=f"fusion_{i}_out")(x)
        full = (16 * h, 16 * w)
        if self.form == "regression":
            x = resize(Conv(self.width // 2, 3, dtype=self.dtype, name="head_conv1")(x), full, align_corners=True)
            x = jax.nn.relu(Conv(32, 3, dtype=self.dtype, name="head_conv2")(x))
            x = Conv(self.channels, name="head")(x)
        else:
            x = jax.nn.relu(Conv(self.width, 3, use_bias=False, dtype=self.dtype, name="head_conv1")(x))
            x = nn.Dropout(0.1, deterministic=not train)(x)
            x = resize(Conv(self.channels, name="head")(x), full, align_corners=True)
        return resize(x, size)
