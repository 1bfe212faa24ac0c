"""A ResNet with bottleneck blocks as a fixed classifier: convolutions with their batch norms folded in, for inference alone.

Sources: He et al., "Deep Residual Learning for Image Recognition", 2016; the stride stands in the 3 x 3 convolution, as in torchvision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from maskvit.core.modalities import Modality, parse_modalities
from maskvit.core.types import Params
from maskvit.nn.layers import convolve

STAGES = 4


def _conv(params: Params, x: Float[Array, "b h w c"], stride: int = 1) -> Float[Array, "b i j k"]:
    return convolve(jnp.asarray(params["kernel"]), x, stride) + params["bias"]


def bottleneck(params: Params, x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b i j k"]:
    """1 x 1, 3 x 3 and 1 x 1 convolution beside the shortcut."""
    y = jax.nn.relu(_conv(params["conv1"], x))
    y = jax.nn.relu(_conv(params["conv2"], y, stride))
    shortcut = _conv(params["shortcut"], x, stride) if "shortcut" in params else x
    return jax.nn.relu(_conv(params["conv3"], y) + shortcut)


@dataclasses.dataclass(frozen=True)
class ResNet:
    """The network; parameters are {"stem", "stage_1": {"block_00": {"conv1", "conv2", "conv3", "shortcut"}, ...}, ..., "head"}.

    Attributes:
      modality: what it sees; gives scale, mean and deviation.
      depths: blocks per stage; ResNet-50 has (3, 4, 6, 3).
      num_classes: of the head.
    """

    modality: Modality
    depths: tuple[int, int, int, int] = (3, 4, 6, 3)
    num_classes: int = 1000

    def prepare(self, stored: Num[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Stored values (uint8 pixels) to the network's input."""
        return (stored.astype(jnp.float32) * self.modality.scale - jnp.array(self.modality.mean)) / jnp.array(self.modality.std)

    def features(self, params: Params, values: Float[Array, "b h w c"], stage: int = STAGES) -> Float[Array, "b i j k"]:
        """The activation behind stage 1 ... 4; at 224 pixels stage 3 is 14 x 14 and stage 4 is 7 x 7."""
        x = jax.nn.relu(_conv(params["stem"], values, 2))
        padding = [(0, 0), (1, 1), (1, 1), (0, 0)]
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        return self._stages(params, x, 0, stage)

    def logits(self, params: Params, features: Float[Array, "b i j k"], stage: int = STAGES) -> Float[Array, "b n"]:
        """Class scores (before the softmax) of the activation behind `stage`."""
        pooled = self._stages(params, features, stage, STAGES).mean(axis=(1, 2))
        return pooled @ params["head"]["kernel"] + params["head"]["bias"]

    def _stages(self, params: Params, x: Float[Array, "b i j k"], start: int, stop: int) -> Float[Array, "b u v w"]:
        for stage in range(start, stop):
            blocks = params[f"stage_{stage + 1}"]
            for i in range(self.depths[stage]):
                x = bottleneck(blocks[f"block_{i:02d}"], x, 2 if stage and not i else 1)
        return x


def resnet_of(config: Mapping[str, Any]) -> ResNet:
    """The network of an imported checkpoint's config: its `modalities` and `classifier` blocks."""
    block = config["classifier"]
    modality = next(iter(parse_modalities(config["modalities"]).values()))
    return ResNet(modality, tuple(block["depths"]), block["num_classes"])
