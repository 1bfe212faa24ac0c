"""Heads that say something of every pixel: what they share, and the linear one."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.core.patches import resampling_matrix
from maskvit.nn.layers import BatchNorm, Conv

# Token maps (global tokens left out) of the blocks that a head reads, ascending.
Maps = tuple[Float[Array, "b h w d"], ...]


def _aligned_matrix(size_in: int, size_out: int) -> Float[np.ndarray, "o i"]:
    """Rows of bilinear weights whose first and last sample points are the first and last of the input (PyTorch's `align_corners`)."""
    position = np.arange(size_out) * ((size_in - 1) / max(size_out - 1, 1))
    return np.maximum(1 - np.abs(position[:, None] - np.arange(size_in)), 0).astype(np.float32)


def _contracted(matrices: list[np.ndarray], x: Float[Array, "b h w c"]) -> Float[Array, "b u v c"]:
    """Rows and columns times a matrix each. In float32 whatever the type: its weights would lose the most."""
    rows, columns = matrices
    y = jnp.einsum("uh,bhwc->buwc", rows, x.astype(jnp.float32), precision="highest")
    return jnp.einsum("vw,buwc->buvc", columns, y, precision="highest").astype(x.dtype)


def resize(x: Float[Array, "b h w c"], size: tuple[int, ...], align_corners: bool = False) -> Float[Array, "b u v c"]:
    """Bilinear resampling to (height, width), as `torch.nn.functional.interpolate`: half-pixel centers, or aligned corners."""
    if x.shape[1:3] == tuple(size):
        return x
    matrix = _aligned_matrix if align_corners else lambda size_in, size_out: resampling_matrix(size_in, size_out, "bilinear")
    return _contracted([matrix(*sides) for sides in zip(x.shape[1:3], size, strict=True)], x)


def adaptive_mean(x: Float[Array, "b h w c"], bins: int) -> Float[Array, "b u v c"]:
    """Means of `bins` x `bins` parts, as PyTorch's adaptive average pooling: part i runs from floor(i n / bins) to ceil((i + 1) n / bins).

    Neighbors overlap where n does not divide.
    """

    def matrix(size: int) -> np.ndarray:
        i, place = np.arange(bins)[:, None], np.arange(size)
        inside = (place >= i * size // bins) & (place < -(-(i + 1) * size // bins))
        return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)

    return _contracted([matrix(size) for size in x.shape[1:3]], x)


def four_maps(maps: Maps, head: str) -> Maps:
    """The same. ValueError unless there are four."""
    if len(maps) != 4:
        raise ValueError(f"the {head} head reads four blocks, not {len(maps)}")
    return maps


class LinearHead(nn.Module):
    """One linear layer per token, on the maps side by side; bilinear up to the pixels.

    `norm`: "none", "batch" (batch normalization without scale and bias) or "batch_affine" (with them). Float32 whatever `dtype`.
    Source: Oquab et al., "DINOv2", 2024, its linear evaluation of segmentation, whose weights begin at deviation 0.01.
    """

    channels: int
    norm: Literal["none", "batch", "batch_affine"] = "batch_affine"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: Maps, size: tuple[int, int], train: bool = False) -> Float[Array, "b u v c"]:
        """Logits or values (float32) at `size`, (height, width) in pixels."""
        x = jnp.concatenate(maps, axis=-1).astype(jnp.float32)
        if self.norm != "none":
            x = BatchNorm(affine=self.norm == "batch_affine", name="norm")(x, train)
        return resize(Conv(self.channels, kernel_init=nn.initializers.normal(0.01), name="head")(x), size)
