"""MAE's decoder: self-attention over the encoded tokens and mask tokens together."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from maskvit.core.modalities import Modality
from maskvit.core.types import MaskPlan, TokenLayout
from maskvit.heads.crossmae import ModalityEmbed
from maskvit.heads.places import Memory, fill_hidden, places
from maskvit.nn.adapters import frozen_position_table
from maskvit.nn.attention import evened
from maskvit.nn.encoder import Block
from maskvit.nn.layers import Dense, layer_norm


class MaeDecoder(nn.Module):
    """MAE's decoder: self-attention over all tokens, visible ones encoded and hidden ones the mask token, and the global ones.

    Of several modalities all tokens take part, each with its modality's embedding; an output that is not an input adds its own
    mask tokens. Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021.
    """

    modality: Modality
    inputs: tuple[str, ...]
    grid: tuple[int, int]
    width: int = 512
    depth: int = 8
    heads: int = 16
    mlp_ratio: float = 4.0
    dtype: Any = jnp.float32
    columns_first: bool = False
    kernel: str = "plain"

    def setup(self) -> None:
        self.context_proj = Dense(self.width, self.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        self.table = frozen_position_table(self, self.grid, self.width, self.columns_first)
        if len(self.inputs) > 1:
            self.modality_embed = ModalityEmbed(self.inputs, self.width)
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", Block(self.width, self.heads, self.mlp_ratio, self.dtype, qkv_parts=1, kernel=self.kernel))
        self.norm = layer_norm(self.dtype)
        self.head = Dense(self.modality.values_per_token, jnp.float32)

    def sequence(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int]
    ) -> tuple[Float[Array, "b s w"], slice]:
        """What enters the first block, global tokens last, and where the output's own tokens stand in it."""
        num_visible = plan.visible_ids.shape[1]
        mask_token = self.mask_token.astype(self.dtype)
        projected = self.context_proj(memory[0])
        tokens = fill_hidden(projected[:, :num_visible], mask_token, plan.masked, slice(None))
        embeds = self.modality_embed() if len(self.inputs) > 1 else {}
        parts = [tokens + places(self.table, embeds, layout.names, layout.grids).astype(self.dtype)]
        if self.modality.name in layout.names:
            span = layout.span(self.modality.name)
        else:
            place = places(self.table, embeds, (self.modality.name,), (query_grid,)).astype(self.dtype)
            parts.append(jnp.broadcast_to(mask_token + place, (tokens.shape[0], *place.shape)))
            span = slice(layout.num_tokens, layout.num_tokens + place.shape[0])
        return jnp.concatenate([*parts, projected[:, num_visible:]], axis=1), span

    def __call__(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], has_padding: bool
    ) -> Float[Array, "b n p"]:
        """Predict all `query_grid` tokens of the output's modality; tokens that do not exist are mask tokens here."""
        return self.after_blocks(memory, plan, layout, query_grid, has_padding)[-1]

    def after_blocks(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], has_padding: bool
    ) -> list[Float[Array, "b n p"]]:
        """What norm and head make of the tokens after each block."""
        x, span = self.sequence(memory, plan, layout, query_grid)
        predictions = []
        x, length = evened(x, self.kernel)
        for i in range(self.depth):
            x = getattr(self, f"block_{i:02d}")(x, length=length)
            predictions.append(self.head(self.norm(x[:, span])))
        return predictions

    def attentions(self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int]) -> list[Float[Array, "b a s s"]]:
        """The attention maps of every block, over the tokens as `sequence` orders them."""
        x, _ = self.sequence(memory, plan, layout, query_grid)
        maps = []
        for i in range(self.depth):
            block = getattr(self, f"block_{i:02d}")
            maps.append(block.attention(x, slice(None)))
            x = block(x)
        return maps
