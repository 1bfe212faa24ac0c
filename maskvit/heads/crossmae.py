"""CrossMAE's decoder: cross-attention from the hidden tokens alone to weighted features of the encoder's blocks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from maskvit.core.modalities import Modality
from maskvit.core.types import MaskPlan, Queries, TokenLayout
from maskvit.heads.places import Memory, context_mask, places
from maskvit.nn.adapters import frozen_position_table
from maskvit.nn.attention import CrossAttention, SelfAttention
from maskvit.nn.layers import Dense, Mlp, layer_norm, xavier_uniform


class CrossBlock(nn.Module):
    """Queries attend to a context and, where asked for, to one another before; pre-norm, with residuals."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    self_attention: bool = False
    dtype: Any = jnp.float32
    kernel: str = "plain"

    def setup(self) -> None:
        if self.self_attention:
            self.norm0 = layer_norm(self.dtype)
            self.self_attn = SelfAttention(self.width, self.heads, self.dtype, qkv_parts=1, kernel=self.kernel)
        self.norm1 = layer_norm(self.dtype)
        self.cross_attn = CrossAttention(self.width, self.heads, self.dtype, kv_parts=1, kernel=self.kernel)
        self.norm2 = layer_norm(self.dtype)
        self.mlp = Mlp(round(self.width * self.mlp_ratio), self.dtype)

    def __call__(
        self,
        x: Float[Array, "b q d"],
        context: Float[Array, "b e w"],
        mask: Bool[Array, "b e"] | None = None,
        query_mask: Bool[Array, "b q"] | None = None,
    ) -> Float[Array, "b q d"]:
        if self.self_attention:
            x = x + self.self_attn(self.norm0(x), query_mask)
        x = x + self.cross_attn(self.norm1(x), context, mask)
        return x + self.mlp(self.norm2(x))


class CrossMaeDecoder(nn.Module):
    """CrossMAE's decoder: mask tokens attend to weighted sums of the encoder's block outputs, and not to one another.

    So any part of the hidden tokens can be decoded at its own cost, and each comes out the same whichever others are decoded
    with it (not so with `self_attention`). The visible tokens bring their positions along from the encoder; `features` are the
    indices read of f_0 (what enters the encoder) ... f_depth, `crossmae_features` makes them. Where not `weighted`, every block
    reads the one feature as it is. Source: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", 2024.
    """

    modality: Modality
    inputs: tuple[str, ...]
    grid: tuple[int, int]
    features: tuple[int, ...]
    width: int = 512
    depth: int = 12
    heads: int = 16
    mlp_ratio: float = 4.0
    weighted: bool = True
    self_attention: bool = False
    dtype: Any = jnp.float32
    columns_first: bool = False
    kernel: str = "plain"

    def setup(self) -> None:
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        self.table = frozen_position_table(self, self.grid, self.width, self.columns_first)
        if len(self.inputs) > 1:
            self.modality_embed = ModalityEmbed(self.inputs, self.width)
        if self.weighted:
            self.feature_weights = self.param("feature_weights", xavier_uniform(), (self.depth, len(self.features)), jnp.float32)
        for i in range(self.depth):
            setattr(self, f"context_norm_{i:02d}", layer_norm(self.dtype))
            block = CrossBlock(self.width, self.heads, self.mlp_ratio, self.self_attention, self.dtype, self.kernel)
            setattr(self, f"block_{i:02d}", block)
        self.norm = layer_norm(self.dtype)
        self.head = Dense(self.modality.values_per_token, jnp.float32)

    def __call__(
        self,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        query_grid: tuple[int, int],
        has_padding: bool,
        queries: Queries | None = None,
    ) -> Float[Array, "b q p"]:
        """Predict the tokens of the output's modality that `queries` asks for, by default all `query_grid` of them."""
        return self.after_blocks(memory, plan, layout, query_grid, has_padding, queries)[-1]

    def after_blocks(
        self,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        query_grid: tuple[int, int],
        has_padding: bool,
        queries: Queries | None = None,
    ) -> list[Float[Array, "b q p"]]:
        """What norm and head make of the queries after each block."""
        name, b = self.modality.name, memory[0].shape[0]
        embeds = self.modality_embed() if len(self.inputs) > 1 else {}
        place = places(self.table, embeds, (name,), (query_grid,))
        place = jnp.broadcast_to(place, (b, *place.shape)) if queries is None else place[queries.ids]
        x = (self.mask_token + place).astype(self.dtype)
        mask = context_mask(plan, memory[0].shape[1], has_padding)
        query_mask = None if queries is None else queries.valid

        if self.weighted:
            weights = self.feature_weights.astype(self.dtype)
            contexts = jnp.einsum("lf,fbed->lbed", weights, jnp.stack(memory))
        predictions = []
        for i in range(self.depth):
            context = getattr(self, f"context_norm_{i:02d}")(contexts[i] if self.weighted else memory[0])
            x = getattr(self, f"block_{i:02d}")(x, context, mask, query_mask)
            predictions.append(self.head(self.norm(x)))
        return predictions


class ModalityEmbed(nn.Module):
    """One learned vector per input modality."""

    names: tuple[str, ...]
    width: int

    @nn.compact
    def __call__(self) -> dict[str, Float[Array, " d"]]:
        return {name: self.param(name, nn.initializers.normal(0.02), (self.width,), jnp.float32) for name in self.names}


def crossmae_features(
    encoder_depth: int, weighted: bool, features: str | tuple[int, ...] = "all", use_input: bool | None = None
) -> tuple[int, ...]:
    """Which of f_0 ... f_depth a CrossMAE decoder reads: blocks by number ("all", or some; negative counts from the end) and,
    with `use_input`, what enters the encoder (by default where the features are weighted). Not weighted: the last block alone.
    """
    if not weighted:
        if features != "all" or use_input:
            raise ValueError(
                "config.objective.decoder.weighted is False, which reads the last block alone: leave features and use_input out"
            )
        return (encoder_depth,)
    if isinstance(features, str) and features != "all":
        raise ValueError(f"config.objective.decoder.features is {features!r}; give 'all' or a list of encoder blocks")
    blocks = range(encoder_depth) if isinstance(features, str) else features
    wrong = [i for i in blocks if not -encoder_depth <= i < encoder_depth]
    if wrong:
        raise ValueError(
            f"config.objective.decoder.features names block {wrong[0]}, but the encoder has blocks 0 to {encoder_depth - 1} "
            f"(or -{encoder_depth} to -1)"
        )
    chosen = sorted({i % encoder_depth + 1 for i in blocks})
    if not chosen or len(chosen) != len(blocks):
        raise ValueError(f"config.objective.decoder.features is {tuple(blocks)}: name at least one encoder block, each once")
    return (0, *chosen) if use_input is None or use_input else tuple(chosen)


def crossmae_options(
    encoder_depth: int, *, width: int = 0, depth: int = 0, heads: int = 0, mlp_ratio: float | int = 4.0,
    features: str | tuple[int, ...] = "all", use_input: bool | None = None, weighted: bool = True, self_attention: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What the block of a `crossmae` decoder may hold; gives the features that it reads."""
    return {"features": crossmae_features(encoder_depth, weighted, features, use_input)}
