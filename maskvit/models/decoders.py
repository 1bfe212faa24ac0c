"""Output adapters: from encoded visible tokens to one modality's patches (MultiMAE's spatial decoder)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from maskvit.modalities import Modality
from maskvit.models.adapters import frozen_position_table
from maskvit.models.vit import Block, Dense, Mlp, attend, layer_norm, xavier_uniform
from maskvit.patches import resample_pos_embed
from maskvit.types import MaskPlan, TokenLayout


class CrossAttention(nn.Module):
    """Attention of queries over a context; fused k | v projection."""

    width: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b q d"], context: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b q d"]:
        q = Dense(self.width, self.dtype, name="q")(queries)
        k, v = jnp.split(Dense(2 * self.width, self.dtype, xavier_uniform(parts=2), name="kv")(context), 2, axis=-1)
        return Dense(self.width, self.dtype, name="proj")(attend(q, k, v, self.heads, mask))


class SpatialDecoder(nn.Module):
    """One output of MultiMAE: queries of the output's modality attend to the visible tokens of all modalities.

    Queries are that modality's tokens, visible ones encoded and hidden ones the mask token, with modality embedding
    and position. The cross-attention has no residual from the queries, and there is no final norm: so in the reference.
    """

    modality: Modality
    inputs: tuple[str, ...]
    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, encoded: Float[Array, "b e d"], plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], masks_keys: bool
    ) -> Float[Array, "b n p"]:
        """Predict all `query_grid` tokens of the output's modality.

        `encoded`: the visible tokens in the order of `plan.visible_ids`, then the global tokens. `masks_keys`: whether
        `plan.visible_valid` may hold False. Returns float32 patch vectors (row, column, channel or class).
        """
        num_visible = plan.visible_ids.shape[1]
        zeros = nn.initializers.zeros_init()
        mask_token = self.param("mask_token", zeros, (self.width,), jnp.float32).astype(self.dtype)
        embeds = ModalityEmbed(self.inputs, self.width, name="modality_embed")()
        projected = Dense(self.width, self.dtype, name="context_proj")(encoded)
        visible, global_tokens = projected[:, :num_visible], projected[:, num_visible:]

        # What a token of each input modality carries besides its content: its modality and its position.
        table = frozen_position_table(self, self.grid, self.width)
        tables = {grid: resample_pos_embed(table, grid, "bilinear") for grid in {*layout.grids, query_grid}}
        places = jnp.concatenate(
            [(tables[grid].reshape(-1, self.width) + embeds[name]) for name, grid in zip(layout.names, layout.grids, strict=True)]
        ).astype(self.dtype)

        context = jnp.concatenate([visible + places[plan.visible_ids], global_tokens], axis=1)
        if self.modality.name in layout.names:
            span = layout.span(self.modality.name)
            # The i-th visible token stands at position i of `visible`; every hidden token takes the mask token behind them.
            slot = jnp.where(plan.masked, num_visible, jnp.cumsum(~plan.masked, axis=1) - 1)[:, span]
            with_mask = jnp.concatenate([visible, jnp.broadcast_to(mask_token, (visible.shape[0], 1, self.width))], axis=1)
            queries = jnp.take_along_axis(with_mask, slot[:, :, None], axis=1) + places[span]
        else:
            place = tables[query_grid].reshape(-1, self.width).astype(self.dtype)
            queries = jnp.broadcast_to(mask_token + place, (visible.shape[0], *place.shape))

        mask = None
        if masks_keys:
            mask = jnp.pad(plan.visible_valid, ((0, 0), (0, global_tokens.shape[1])), constant_values=True)
        x = CrossAttention(self.width, self.heads, self.dtype, name="cross_attn")(
            layer_norm(self.dtype, "query_norm")(queries), layer_norm(self.dtype, "context_norm")(context), mask
        )
        hidden = round(self.width * self.mlp_ratio)
        x = x + Mlp(hidden, self.dtype, name="mlp")(layer_norm(self.dtype, "out_norm")(x))
        for i in range(self.depth):
            x = Block(self.width, self.heads, self.mlp_ratio, self.dtype, name=f"block_{i:02d}")(x)
        # The head and the loss are float32 whatever the compute type.
        return Dense(self.modality.values_per_token, jnp.float32, name="head")(x)


class ModalityEmbed(nn.Module):
    """One learned vector per input modality."""

    names: tuple[str, ...]
    width: int

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, " d"]]:
        return {name: self.param(name, nn.initializers.normal(0.02), (self.width,), jnp.float32) for name in self.names}
