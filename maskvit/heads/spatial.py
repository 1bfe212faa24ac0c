"""MultiMAE's decoder: cross-attention from the tokens of one modality to the encoded ones, then blocks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.core.modalities import Modality
from maskvit.core.types import MaskPlan, TokenLayout
from maskvit.heads.crossmae import ModalityEmbed
from maskvit.heads.places import Memory, context_mask, fill_hidden, places
from maskvit.nn.adapters import frozen_position_table
from maskvit.nn.attention import CrossAttention
from maskvit.nn.encoder import Block
from maskvit.nn.layers import Dense, Mlp, layer_norm


class SpatialDecoder(nn.Module):
    """One output of MultiMAE: queries of the output's modality attend to the visible tokens of all modalities.

    Queries are that modality's tokens, visible ones encoded and hidden ones the mask token, with modality embedding
    and position. The cross-attention has no residual from the queries, and there is no final norm: so in the reference.
    """

    modality: Modality
    inputs: tuple[str, ...]
    grid: tuple[int, int]
    width: int = 256
    depth: int = 2
    heads: int = 8
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    columns_first: bool = False
    kernel: str = "plain"

    @nn.compact
    def __call__(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], has_padding: bool
    ) -> Float[Array, "b n p"]:
        """Predict all `query_grid` tokens of the output's modality."""
        num_visible = plan.visible_ids.shape[1]
        zeros = nn.initializers.zeros_init()
        mask_token = self.param("mask_token", zeros, (self.width,), jnp.float32).astype(self.dtype)
        embeds = ModalityEmbed(self.inputs, self.width, name="modality_embed")()
        projected = Dense(self.width, self.dtype, name="context_proj")(memory[0])
        visible, global_tokens = projected[:, :num_visible], projected[:, num_visible:]

        table = frozen_position_table(self, self.grid, self.width, self.columns_first)
        place = places(table, embeds, layout.names, layout.grids).astype(self.dtype)
        context = jnp.concatenate([visible + place[plan.visible_ids], global_tokens], axis=1)
        if self.modality.name in layout.names:
            span = layout.span(self.modality.name)
            queries = fill_hidden(visible, mask_token, plan.masked, span) + place[span]
        else:
            place = places(table, embeds, (self.modality.name,), (query_grid,)).astype(self.dtype)
            queries = jnp.broadcast_to(mask_token + place, (visible.shape[0], *place.shape))

        x = CrossAttention(self.width, self.heads, self.dtype, kernel=self.kernel, name="cross_attn")(
            layer_norm(self.dtype, "query_norm")(queries),
            layer_norm(self.dtype, "context_norm")(context),
            context_mask(plan, context.shape[1], has_padding),
        )
        hidden = round(self.width * self.mlp_ratio)
        x = x + Mlp(hidden, self.dtype, name="mlp")(layer_norm(self.dtype, "out_norm")(x))
        for i in range(self.depth):
            x = Block(self.width, self.heads, self.mlp_ratio, self.dtype, kernel=self.kernel, name=f"block_{i:02d}")(x)
        # The head and the loss are float32 whatever the compute type.
        return Dense(self.modality.values_per_token, jnp.float32, name="head")(x)
