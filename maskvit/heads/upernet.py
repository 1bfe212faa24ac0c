"""UPerNet on a plain ViT: features of four blocks at four scales, pyramid pooling, a feature pyramid."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.heads.dense import Maps, adaptive_mean, four_maps, resize
from maskvit.nn.encoder import MOST
from maskvit.nn.layers import BatchNorm, Conv, TransposedConv


class ConvNormRelu(nn.Module):
    """Convolution without bias (He's initial values, by fan-out), batch normalization, ReLU."""

    features: int
    side: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], train: bool) -> Float[Array, "b h w o"]:
        initial = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        x = Conv(self.features, self.side, use_bias=False, dtype=self.dtype, kernel_init=initial, name="conv")(x)
        return jax.nn.relu(BatchNorm(name="norm")(x, train)).astype(self.dtype)


class Classifier(nn.Module):
    """Whole channels dropped in training, then a linear layer per place, float32."""

    channels: int
    dropout: float

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"], train: bool) -> Float[Array, "b h w c"]:
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        return Conv(self.channels, kernel_init=nn.initializers.normal(0.01), name="conv")(x)


class UperNetHead(nn.Module):
    """Four maps at 4, 2, 1 and 1/2 times the tokens' scale; the coarsest also pooled; merged from coarse to fine, then side by side.

    Beside it, for training alone, a small fully convolutional head on the third map (index 2). Source: Xiao et al., "Unified Perceptual
    Parsing for Scene Understanding", 2018; on a ViT as BEiT, iBOT and MAE have it, with MMSegmentation's layers.

    Attributes:
      width: channels of pooling and pyramid; `auxiliary_width` of the auxiliary head.
      pools: parts per side that the coarsest map is pooled to.
      dropout: share of the channels dropped before each classifier.
    """

    channels: int
    width: int = 768
    pools: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1
    auxiliary_width: int = 256
    dtype: Any = jnp.float32

    @nn.nowrap
    def check(self, where: str, width: int, num_global_tokens: int) -> None:
        """Raise ValueError, naming `where`.key, for sizes that cannot be."""
        for key in ("width", "auxiliary_width"):
            if not 1 <= getattr(self, key) <= MOST["width"]:
                raise ValueError(f"{where}.{key} is {getattr(self, key)}; it must be at least 1 and at most {MOST['width']}")
        if not self.pools or min(self.pools) < 1:
            raise ValueError(f"{where}.pools is {self.pools}; give at least one number of parts, each at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{where}.dropout is {self.dropout}; it must be at least 0 and below 1")

    @nn.compact
    def __call__(
        self, maps: Maps, size: tuple[int, int], train: bool = False
    ) -> Float[Array, "b u v c"] | tuple[Float[Array, "b u v c"], Float[Array, "b u v c"]]:
        """Logits (float32) at `size`, (height, width) in pixels, of the maps of four blocks; in training also the auxiliary head's."""
        pyramid = self._rescaled(four_maps(maps, "upernet"), train)
        x = self._pooled(pyramid[3], train)
        merged = [x]
        for i in (2, 1, 0):
            x = self._layer(self.width, 1, f"lateral_{i + 1}")(pyramid[i], train) + resize(x, pyramid[i].shape[1:3])
            merged.insert(0, x)
        finest = merged[0].shape[1:3]
        outs = [self._layer(self.width, 3, f"pyramid_{i + 1}")(merged[i], train) for i in range(3)]
        x = jnp.concatenate([resize(x, finest) for x in (*outs, merged[3])], axis=-1)
        x = self._layer(self.width, 3, "fusion")(x, train)
        logits = resize(Classifier(self.channels, self.dropout, name="head")(x, train), size)
        if not train and not self.is_initializing():
            return logits
        x = self._layer(self.auxiliary_width, 3, "auxiliary")(pyramid[2], train)
        auxiliary = resize(Classifier(self.channels, self.dropout, name="auxiliary_head")(x, train), size)
        return logits, auxiliary

    def _layer(self, features: int, side: int, name: str) -> ConvNormRelu:
        return ConvNormRelu(features, side, self.dtype, name=name)

    def _rescaled(self, maps: Maps, train: bool) -> list[Float[Array, "b _h _w d"]]:
        """The maps at 4, 2, 1 and 1/2 times their scale."""
        width, tokens = maps[0].shape[-1], [x.astype(self.dtype) for x in maps]
        x = TransposedConv(width, 2, self.dtype, name="up4_conv1")(tokens[0])
        x = jax.nn.gelu(BatchNorm(name="up4_norm")(x, train), approximate=False)
        x = TransposedConv(width, 2, self.dtype, name="up4_conv2")(x)
        return [x, TransposedConv(width, 2, self.dtype, name="up2_conv")(tokens[1]), tokens[2], nn.max_pool(tokens[3], (2, 2), (2, 2))]

    def _pooled(self, x: Float[Array, "b h w d"], train: bool) -> Float[Array, "b h w c"]:
        """The coarsest map beside its means over parts of several sizes."""
        parts = [x]
        for bins in self.pools:
            pooled = self._layer(self.width, 1, f"pool_{bins}")(adaptive_mean(x, bins), train)
            parts.append(resize(pooled, x.shape[1:3]))
        return self._layer(self.width, 3, "bottleneck")(jnp.concatenate(parts, axis=-1), train)
