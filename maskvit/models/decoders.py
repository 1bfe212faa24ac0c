"""Output adapters: from encoded visible tokens to one modality's patches (the decoders of MultiMAE, MAE and CrossMAE).

Every decoder is called with `memory`, what it reads of the encoder: features "b e d" of the visible tokens in the order of
`plan.visible_ids`, then of the global tokens; the plan; the layout; the grid of the output's own tokens; and `masks_keys`, whether
`plan.visible_valid` may hold False. It returns float32 patch vectors (row, column, channel or class).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from maskvit.configuration import check_arguments, hashable, look_up
from maskvit.modalities import Modality
from maskvit.models.adapters import frozen_position_table
from maskvit.models.vit import Block, Dense, Mlp, SelfAttention, attend, check_sizes, layer_norm, xavier_uniform
from maskvit.patches import resample_pos_embed
from maskvit.types import MaskPlan, Queries, TokenLayout

Memory = tuple[Float[Array, "b e d"], ...]


class CrossAttention(nn.Module):
    """Attention of queries over a context; fused k | v projection, initialised as `kv_parts` kernels."""

    width: int
    heads: int
    dtype: Any = jnp.float32
    kv_parts: int = 2

    @nn.compact
    def __call__(
        self, queries: Float[Array, "b q d"], context: Float[Array, "b v w"], mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b q d"]:
        q = Dense(self.width, self.dtype, name="q")(queries)
        k, v = jnp.split(Dense(2 * self.width, self.dtype, xavier_uniform(parts=self.kv_parts), name="kv")(context), 2, axis=-1)
        return Dense(self.width, self.dtype, name="proj")(attend(q, k, v, self.heads, mask))


def fill_hidden(
    visible: Float[Array, "b v d"], mask_token: Float[Array, " d"], masked: Bool[Array, "b n"], span: slice
) -> Float[Array, "b s d"]:
    """The tokens of a span in raster order: the visible ones, and the mask token wherever one is hidden."""
    # The i-th visible token stands at position i of `visible`; every hidden token takes the mask token behind them.
    slot = jnp.where(masked, visible.shape[1], jnp.cumsum(~masked, axis=1) - 1)[:, span]
    with_mask = jnp.concatenate([visible, jnp.broadcast_to(mask_token, (visible.shape[0], 1, visible.shape[2]))], axis=1)
    return jnp.take_along_axis(with_mask, slot[:, :, None], axis=1)


def places(
    table: Float[Array, "h w d"], embeds: Mapping[str, Float[Array, " d"]], names: tuple[str, ...], grids: tuple[tuple[int, int], ...]
) -> Float[Array, "n d"]:
    """What the tokens of each modality carry besides their content: position, and the modality where it has an embedding."""
    parts = []
    for name, grid in zip(names, grids, strict=True):
        place = resample_pos_embed(table, grid, "bilinear").reshape(-1, table.shape[-1])
        parts.append(place + embeds[name] if name in embeds else place)
    return jnp.concatenate(parts)


def context_mask(plan: MaskPlan, num_context: int, masks_keys: bool) -> Bool[Array, "b e"] | None:
    """True for the visible tokens that exist and the global tokens behind them; None where all do."""
    if not masks_keys:
        return None
    return jnp.pad(plan.visible_valid, ((0, 0), (0, num_context - plan.visible_ids.shape[1])), constant_values=True)


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

    @nn.compact
    def __call__(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], masks_keys: bool
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

        x = CrossAttention(self.width, self.heads, self.dtype, name="cross_attn")(
            layer_norm(self.dtype, "query_norm")(queries),
            layer_norm(self.dtype, "context_norm")(context),
            context_mask(plan, context.shape[1], masks_keys),
        )
        hidden = round(self.width * self.mlp_ratio)
        x = x + Mlp(hidden, self.dtype, name="mlp")(layer_norm(self.dtype, "out_norm")(x))
        for i in range(self.depth):
            x = Block(self.width, self.heads, self.mlp_ratio, self.dtype, name=f"block_{i:02d}")(x)
        # The head and the loss are float32 whatever the compute type.
        return Dense(self.modality.values_per_token, jnp.float32, name="head")(x)


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

    def setup(self) -> None:
        self.context_proj = Dense(self.width, self.dtype)
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        self.table = frozen_position_table(self, self.grid, self.width, self.columns_first)
        if len(self.inputs) > 1:
            self.modality_embed = ModalityEmbed(self.inputs, self.width)
        for i in range(self.depth):
            setattr(self, f"block_{i:02d}", Block(self.width, self.heads, self.mlp_ratio, self.dtype, qkv_parts=1))
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
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], masks_keys: bool
    ) -> Float[Array, "b n p"]:
        """Predict all `query_grid` tokens of the output's modality; tokens that do not exist are mask tokens here."""
        return self.after_blocks(memory, plan, layout, query_grid, masks_keys)[-1]

    def after_blocks(
        self, memory: Memory, plan: MaskPlan, layout: TokenLayout, query_grid: tuple[int, int], masks_keys: bool
    ) -> list[Float[Array, "b n p"]]:
        """What norm and head make of the tokens after each block."""
        x, span = self.sequence(memory, plan, layout, query_grid)
        predictions = []
        for i in range(self.depth):
            x = getattr(self, f"block_{i:02d}")(x)
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


class CrossBlock(nn.Module):
    """Queries attend to a context and, where asked for, to one another before; pre-norm, with residuals."""

    width: int
    heads: int
    mlp_ratio: float = 4.0
    self_attention: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.self_attention:
            self.norm0 = layer_norm(self.dtype)
            self.self_attn = SelfAttention(self.width, self.heads, self.dtype, qkv_parts=1)
        self.norm1 = layer_norm(self.dtype)
        self.cross_attn = CrossAttention(self.width, self.heads, self.dtype, kv_parts=1)
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

    def setup(self) -> None:
        self.mask_token = self.param("mask_token", nn.initializers.normal(0.02), (self.width,), jnp.float32)
        self.table = frozen_position_table(self, self.grid, self.width, self.columns_first)
        if len(self.inputs) > 1:
            self.modality_embed = ModalityEmbed(self.inputs, self.width)
        if self.weighted:
            self.feature_weights = self.param("feature_weights", xavier_uniform(), (self.depth, len(self.features)), jnp.float32)
        for i in range(self.depth):
            setattr(self, f"context_norm_{i:02d}", layer_norm(self.dtype))
            setattr(self, f"block_{i:02d}", CrossBlock(self.width, self.heads, self.mlp_ratio, self.self_attention, self.dtype))
        self.norm = layer_norm(self.dtype)
        self.head = Dense(self.modality.values_per_token, jnp.float32)

    def __call__(
        self,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        query_grid: tuple[int, int],
        masks_keys: bool,
        queries: Queries | None = None,
    ) -> Float[Array, "b q p"]:
        """Predict the tokens of the output's modality that `queries` asks for, by default all `query_grid` of them."""
        return self.after_blocks(memory, plan, layout, query_grid, masks_keys, queries)[-1]

    def after_blocks(
        self,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        query_grid: tuple[int, int],
        masks_keys: bool,
        queries: Queries | None = None,
    ) -> list[Float[Array, "b q p"]]:
        """What norm and head make of the queries after each block."""
        name, b = self.modality.name, memory[0].shape[0]
        embeds = self.modality_embed() if len(self.inputs) > 1 else {}
        place = places(self.table, embeds, (name,), (query_grid,))
        place = jnp.broadcast_to(place, (b, *place.shape)) if queries is None else place[queries.ids]
        x = (self.mask_token + place).astype(self.dtype)
        mask = context_mask(plan, memory[0].shape[1], masks_keys)
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


DECODERS = {"spatial": SpatialDecoder, "mae": MaeDecoder, "crossmae": CrossMaeDecoder}


def _sizes(*, width: int = 0, depth: int = 0, heads: int = 0, mlp_ratio: float | int = 4.0) -> None:
    """What every decoder's block may hold; the signature is the reference."""


def _crossmae(
    *, width: int = 0, depth: int = 0, heads: int = 0, mlp_ratio: float | int = 4.0, features: str | tuple[int, ...] = "all",
    use_input: bool | None = None, weighted: bool = True, self_attention: bool = False,
) -> None:  # fmt: skip
    """What the block of a `crossmae` decoder may hold."""


BLOCKS = {"spatial": _sizes, "mae": _sizes, "crossmae": _crossmae}


def decoder_arguments(block: Mapping[str, Any], encoder_depth: int) -> tuple[str, dict[str, Any]]:
    """`config.objective.decoder` to (name, arguments of that decoder), defaults filled in. Raises on unknown names and keys."""
    given = {key: hashable(value) for key, value in block.items()}
    name = given.pop("name", "spatial")
    decoder = look_up("config.objective.decoder.name", DECODERS, name)
    check_arguments("config.objective.decoder", BLOCKS[name], given)
    arguments = {key: getattr(decoder, key) for key in ("width", "depth", "heads")} | given
    if name == "crossmae":
        chosen = {key: arguments.pop(key) for key in ("features", "use_input") if key in arguments}
        arguments["features"] = crossmae_features(encoder_depth, arguments.get("weighted", True), **chosen)
    check_sizes("config.objective.decoder", arguments, least_depth=0 if name == "spatial" else 1)
    return name, arguments
