"""Input adapters: one modality's pixels or class ids to tokens with position."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Num

from maskvit.core.modalities import Modality
from maskvit.core.patches import patchify, resample_learned, resample_pos_embed, sincos_position_table
from maskvit.nn.layers import Dense, uniform_by_fan_in


def position_table(module: nn.Module, grid: tuple[int, int], width: int, columns_first: bool = False) -> Float[Array, "h w d"]:
    """The module's `pos_embed` parameter, which begins as sines and cosines."""
    return module.param("pos_embed", lambda _: jnp.asarray(sincos_position_table(grid, width, columns_first)))


def frozen_position_table(module: nn.Module, grid: tuple[int, int], width: int, columns_first: bool = False) -> Float[Array, "h w d"]:
    """`position_table`, carried in checkpoints and never trained."""
    return jax.lax.stop_gradient(position_table(module, grid, width, columns_first))


class InputAdapter(nn.Module):
    """Patch projection (after a class embedding for categorical modalities) plus the position table, `learned` or of sines and cosines.

    The latter is fixed unless `trained`.
    """

    modality: Modality
    width: int
    grid: tuple[int, int]
    dtype: Any = jnp.float32
    columns_first: bool = False
    learned: bool = False
    trained: bool = False

    @nn.compact
    def __call__(self, values: Num[Array, "b h w *c"], masked: Bool[Array, "b n"] | None = None) -> Num[Array, "b n d"]:
        """`values`: model values (continuous, float) or class ids (categorical, int; -1 embeds to zero).

        Tokens that are `masked` have a learned vector in place of their projection; their position they keep (iBOT).
        """
        spec, patch = self.modality, self.modality.patch_pixels
        if spec.kind == "categorical":
            table = self.param("class_embed", nn.initializers.normal(0.02), (spec.num_classes, spec.embed_dim), jnp.float32)
            known = (values >= 0)[..., None]
            values = jnp.where(known, jnp.take(table, jnp.maximum(values, 0), axis=0), 0.0)
        vectors = patchify(values, patch)
        tokens = Dense(self.width, self.dtype, bias_init=uniform_by_fan_in(vectors.shape[-1]), name="proj")(vectors)
        if masked is not None:
            mask_embed = self.param("mask_embed", nn.initializers.zeros_init(), (self.width,), jnp.float32)
            tokens = jnp.where(masked[..., None], mask_embed.astype(tokens.dtype), tokens)
        grid = values.shape[1] // patch, values.shape[2] // patch
        if self.learned:
            table = self.param("learned_pos_embed", nn.initializers.normal(0.02), (*self.grid, self.width), jnp.float32)
            position = resample_learned(table, grid)
            return tokens + position.reshape(-1, self.width).astype(tokens.dtype)
        # The reference resamples image-like tables with bicubic, class maps' with bilinear kernels.
        method = "bilinear" if spec.kind == "categorical" else "bicubic"
        table = (position_table if self.trained else frozen_position_table)(self, self.grid, self.width, self.columns_first)
        position = resample_pos_embed(table, grid, method)
        return tokens + position.reshape(-1, self.width).astype(tokens.dtype)
