"""Models as plain data with pure functions: parameters go in as nested dicts, nothing is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key, Num

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.core.types import MaskPlan, Params, Queries, TokenBatch, TokenLayout
from maskvit.heads import DECODERS
from maskvit.heads.crossmae import CrossMaeDecoder
from maskvit.heads.mae import MaeDecoder
from maskvit.heads.places import Memory
from maskvit.heads.prototypes import Projection, redraw
from maskvit.heads.spatial import SpatialDecoder
from maskvit.masking.plan import show_all
from maskvit.nn.adapters import InputAdapter
from maskvit.nn.encoder import VARIANTS, Encoder, check_sizes, transformer_sizes
from maskvit.nn.layers import Dense, apply, layer_norm

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
POOLS = ("global", "mean")
POSITIONS = ("rows_first", "columns_first", "learned")


def encoder_sizes(encoder: str | Mapping[str, Any]) -> dict[str, Any]:
    """`"B"` or `{"width": ..., "depth": ..., "heads": ..., "mlp_ratio": ...}` to the arguments of `Encoder`, checked."""
    where = "config.objective.encoder"
    if isinstance(encoder, str):
        if encoder not in VARIANTS:
            raise ValueError(f"{where} is {encoder!r}; known: {', '.join(VARIANTS)}, or a block of sizes")
        return dict(VARIANTS[encoder])
    check_arguments(where, transformer_sizes, encoder)
    check_sizes(where, encoder)
    return dict(encoder)


@dataclasses.dataclass(frozen=True)
class MultiMaeModel:
    """MultiMAE: one input adapter per modality, one encoder, one decoder per output.

    Attributes:
      modalities: every declared modality that `inputs` or `outputs` name.
      inputs: input modalities; their order is the order of the tokens.
      outputs: a modality's name, or "norm_<name>" for its per-patch normalised form.
      error_outputs: inputs with a further decoder, "error_<name>", that predicts one number per token: how hard it is.
      image_size: (height, width) the position tables are stored at.
      encoder, decoder: sizes (and the decoder's options), as (key, value) pairs so that the model is hashable.
      decoder_name: the row of `DECODERS` that every output has.
      positions: which half of the fixed position tables is the row's: "rows_first" (MultiMAE) or "columns_first" (MAE, CrossMAE);
        or "learned": a trained table, and one for the global tokens (DINO, iBOT).
      qkv_parts: how many kernels a fused qkv of the encoder is initialised as: 3 (MultiMAE) or 1 (MAE).
      num_global_tokens: learned tokens without position, appended at the end.
      compute_dtype: "float32" or "bfloat16".
      remat: recompute the encoder's blocks in the backward pass.
      final_norm: whether a layer norm follows the encoder: plain ViTs have one, MultiMAE none.
      num_classes: classes of the head, 0 for none.
      pool: what head and norm read: "global" is the last global token out of the normed tokens (DINO, timm), "mean" the norm
        of the mean of all other tokens (fine-tuned MAE).
      mask_embed: whether hidden tokens may stay in the sequence, as a learned vector in place of their content (iBOT).
      projection: sizes of the head of self-distillation (`Projection`), as pairs; () where there is none.
    """

    modalities: tuple[Modality, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    image_size: tuple[int, int]
    encoder: tuple[tuple[str, Any], ...]
    decoder: tuple[tuple[str, Any], ...]
    num_global_tokens: int = 1
    compute_dtype: str = "float32"
    remat: bool = False
    error_outputs: tuple[str, ...] = ()
    final_norm: bool = False
    num_classes: int = 0
    pool: str = "global"
    decoder_name: str = "spatial"
    positions: str = "rows_first"
    qkv_parts: int = 3
    mask_embed: bool = False
    projection: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise ValueError(f"config.objective.positions is {self.positions!r}; known: {', '.join(POSITIONS)}")
        if self.decoder_name == "crossmae" and self.final_norm:
            raise ValueError(
                "config.objective.final_norm is True, but the crossmae decoder reads the encoder's blocks and would leave that norm "
                "untrained: set it to False"
            )
        if self.pool not in POOLS:
            raise ValueError(f"config.objective.pool is {self.pool!r}; known: {', '.join(POOLS)}")
        if self.num_classes and self.pool == "global" and not self.num_global_tokens:
            raise ValueError("config.objective.pool is 'global', but the model has no global token: set it to 'mean'")

    def modality(self, output: str) -> Modality:
        """The modality of an input or output name ("norm_rgb" -> rgb; "error_rgb" -> rgb with one value per token)."""
        by_name = {spec.name: spec for spec in self.modalities}
        if output.removeprefix("error_") in self.error_outputs and output not in by_name:
            spec = by_name[output.removeprefix("error_")]
            return dataclasses.replace(spec, kind="continuous", loss="mse", channels=1, mean=(0.0,), std=(1.0,), stride=spec.patch)
        return by_name.get(output) or by_name[output.removeprefix("norm_")]

    @property
    def width(self) -> int:
        """Width of the encoder's tokens."""
        return dict(self.encoder)["width"]

    @property
    def layout(self) -> TokenLayout:
        """The token layout at `image_size`."""
        return TokenLayout(self.inputs, tuple(self.modality(name).grid(self.image_size) for name in self.inputs))

    def layout_of(self, values: Mapping[str, Num[Array, "b h w *c"]]) -> TokenLayout:
        """The layout of given model values; modalities that are not in `values` are left out."""
        names = tuple(name for name in self.inputs if name in values)
        patches = {name: self.modality(name).patch_pixels for name in names}
        return TokenLayout(names, tuple((values[n].shape[1] // patches[n], values[n].shape[2] // patches[n]) for n in names))

    # The modules: what holds which parameters.

    def _dtype(self) -> Any:
        return DTYPES[self.compute_dtype]

    def _input(self, name: str) -> InputAdapter:
        spec = self.modality(name)
        learned = self.positions == "learned"
        return InputAdapter(spec, self.width, spec.grid(self.image_size), self._dtype(), self._columns_first, learned)

    def _encoder(self) -> Encoder:
        return Encoder(**dict(self.encoder), dtype=self._dtype(), remat=self.remat, qkv_parts=self.qkv_parts)

    def _decoder(self, name: str) -> SpatialDecoder | MaeDecoder | CrossMaeDecoder:
        spec, same = self.modality(name), dict(dtype=self._dtype(), columns_first=self._columns_first)
        return DECODERS[self.decoder_name](spec, self.inputs, spec.grid(self.image_size), **same, **dict(self.decoder))

    @property
    def _columns_first(self) -> bool:
        return self.positions == "columns_first"

    @property
    def decodes_part(self) -> bool:
        """Whether the decoders can decode some tokens of an output at the cost of those alone."""
        return self.decoder_name == "crossmae"

    def _projection(self) -> Projection:
        return Projection(**dict(self.projection), dtype=self._dtype())

    def _norm(self) -> nn.LayerNorm:
        return layer_norm(self._dtype())

    def _head(self) -> Dense:
        # The head is float32 whatever the compute type.
        return Dense(self.num_classes, jnp.float32)

    # The pure functions.

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, initialised as the reference does."""
        layout = self.layout
        input_key, global_key, encoder_key, output_key = jax.random.split(key, 4)
        params: Params = {"inputs": {}, "outputs": {}}
        for i, name in enumerate(self.inputs):
            spec = self.modality(name)
            height, width = spec.size(self.image_size)
            categorical = spec.kind == "categorical"
            values = jnp.zeros((1, height, width), jnp.int32) if categorical else jnp.zeros((1, height, width, spec.channels))
            masked = jnp.zeros((1, layout.sizes[i]), bool) if self.mask_embed else None
            params["inputs"][name] = self._input(name).init(jax.random.fold_in(input_key, i), values, masked)["params"]
        if self.num_global_tokens:  # an empty array could not be checkpointed
            params["global_tokens"] = 0.02 * jax.random.normal(global_key, (self.num_global_tokens, self.width))
        if self.positions == "learned":
            shape = (self.num_global_tokens, self.width)
            params["global_pos_embed"] = 0.02 * jax.random.normal(jax.random.fold_in(global_key, 1), shape)
        params["encoder"] = self._encoder().init(encoder_key, jnp.zeros((1, 1, self.width)))["params"]
        if self.projection:
            params["projection"] = self._projection().init(jax.random.fold_in(key, 2), jnp.zeros((1, self.width)), method=Projection.all)[
                "params"
            ]
        if self.final_norm:
            params["norm"] = self._norm().init(key, jnp.zeros((1, self.width)))["params"]
        if self.num_classes:
            params["head"] = self._head().init(jax.random.fold_in(key, 1), jnp.zeros((1, self.width)))["params"]
        plan = show_all(layout, 1)
        encoded = jnp.zeros((1, layout.num_tokens + self.num_global_tokens, self.width))
        memory = (encoded,) * len(dict(self.decoder).get("features", (0,)))
        for i, name in enumerate((*self.outputs, *(f"error_{name}" for name in self.error_outputs))):
            grid = self.modality(name).grid(self.image_size)
            decoder = self._decoder(name)
            params["outputs"][name] = decoder.init(jax.random.fold_in(output_key, i), memory, plan, layout, grid, False)["params"]
        return redraw(params, jax.random.fold_in(key, 3)) if self.projection else params

    def embed(
        self,
        params: Params,
        values: Mapping[str, Num[Array, "b h w *c"]],
        present: Bool[Array, "b n"] | None = None,
        masked: Bool[Array, "b n"] | None = None,
    ) -> TokenBatch:
        """Model values of the given modalities to tokens with position; the one place where tokens are made.

        Tokens that are `masked` keep their place and lose their content (`mask_embed`).
        """
        layout = self.layout_of(values)
        tokens = [
            apply(self._input(name), params["inputs"][name], values[name], None if masked is None else masked[:, layout.span(name)])
            for name in layout.names
        ]
        return TokenBatch(jnp.concatenate(tokens, axis=1), layout, present)

    def append_global(
        self, params: Params, tokens: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None
    ) -> tuple[Float[Array, "b e d"], Bool[Array, "b e"] | None]:
        """The tokens, and their mask where there is one, with the global tokens behind them."""
        if not self.num_global_tokens:
            return tokens, mask
        shape = (tokens.shape[0], *params["global_tokens"].shape)
        global_tokens = params["global_tokens"]
        if self.positions == "learned":
            global_tokens = global_tokens + params["global_pos_embed"]
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(global_tokens.astype(tokens.dtype), shape)], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, shape[1])), constant_values=True)
        return tokens, mask

    def encode(
        self,
        params: Params,
        tokens: Float[Array, "b v d"],
        mask: Bool[Array, "b v"] | None = None,
        branches: Float[Array, "depth two b"] | None = None,
    ) -> Float[Array, "b e d"]:
        """Encode tokens; the global tokens come last in the result. `mask` True where a token may be attended to.

        `branches`: stochastic depth (`maskvit.nn.encoder.drop_path`).
        """
        tokens, mask = self.append_global(params, tokens, mask)
        return self.normed(params, apply(self._encoder(), params["encoder"], tokens, mask, branches))

    def encode_with_attention(
        self, params: Params, tokens: Float[Array, "b v d"], queries: slice, mask: Bool[Array, "b v"] | None = None
    ) -> tuple[Float[Array, "b e d"], Float[Array, "b a q e"]]:
        """What `encode` gives, and the last block's attention of the tokens in `queries`, in one pass."""
        tokens, mask = self.append_global(params, tokens, mask)
        encoded, weights = apply(self._encoder(), params["encoder"], tokens, queries, mask, method=Encoder.with_attention)
        return self.normed(params, encoded), weights

    def project(self, params: Params, encoded: Float[Array, "*b d"], patches: bool = False) -> Float[Array, "*b k"]:
        """Prototype logits (float32) of encoded class tokens, or of `patches`."""
        method = Projection.patches if patches else Projection.__call__
        return apply(self._projection(), params["projection"], encoded, method=method)

    def memory(self, params: Params, tokens: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None) -> Memory:
        """Encode tokens as `encode` does, and give what the decoders read of it: the end, or features of chosen blocks."""
        if "features" not in dict(self.decoder):
            return (self.encode(params, tokens, mask),)
        tokens, mask = self.append_global(params, tokens, mask)
        return apply(self._encoder(), params["encoder"], tokens, dict(self.decoder)["features"], mask, method=Encoder.features)

    def normed(self, params: Params, tokens: Float[Array, "b e d"]) -> Float[Array, "b e d"]:
        """What leaves the last block, through the final norm where the model has one on every token."""
        if self.final_norm and self.pool == "global":
            return apply(self._norm(), params["norm"], tokens)
        return tokens

    def logits(self, params: Params, encoded: Float[Array, "b e d"]) -> Float[Array, "b k"]:
        """Class scores (before the softmax, float32) of encoded tokens, as `encode` or `normed` give them."""
        if not self.num_classes:
            raise ValueError("this model has no classifier: its config.objective.num_classes is 0")
        if self.pool == "global":
            pooled = encoded[:, -1]
        else:
            pooled = encoded[:, : encoded.shape[1] - self.num_global_tokens].mean(axis=1)
            if self.final_norm:
                pooled = apply(self._norm(), params["norm"], pooled)
        return apply(self._head(), params["head"], pooled)

    def attention(self, params: Params, batch: TokenBatch, queries: slice, block: int = -1) -> Float[Array, "b a q e"]:
        """The attention of one block on all tokens (global tokens last), for the queries asked for and no work beyond it."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return apply(self._encoder(), params["encoder"], tokens, queries, block, mask, method=Encoder.attention)

    def attention_from(
        self, params: Params, tokens: Float[Array, "b e d"], start: int, queries: slice, block: int, mask: Bool[Array, "b e"] | None = None
    ) -> Float[Array, "b a q e"]:
        """As `attention`, of tokens (global ones included, as `start` finds them) that went through the blocks before `start`."""
        return apply(self._encoder(), params["encoder"], tokens, queries, block, mask, start, method=Encoder.attention)

    def key_features(self, params: Params, batch: TokenBatch, block: int = -1, bias: bool = True) -> Float[Array, "b e d"]:
        """The attention keys of one block on all tokens (global tokens last), heads side by side; `bias` False leaves theirs out."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        encoder = params["encoder"]
        if not bias:
            name = f"block_{block % dict(self.encoder)['depth']:02d}"
            attn = encoder[name]["attn"]
            attn = {**attn, "qkv": {**attn["qkv"], "bias": jnp.zeros_like(attn["qkv"]["bias"])}}
            encoder = {**encoder, name: {**encoder[name], "attn": attn}}
        return apply(self._encoder(), encoder, tokens, block, mask, method=Encoder.key_features)

    def blocks(
        self, params: Params, tokens: Float[Array, "b v d"], start: int, stop: int, mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b v d"]:
        """Tokens (global ones included, as `start` finds them) through the encoder's blocks start ... stop - 1."""
        return apply(self._encoder(), params["encoder"], tokens, start, stop, mask, method=Encoder.blocks)

    def attentions(self, params: Params, batch: TokenBatch) -> list[Float[Array, "b a e e"]]:
        """The attention maps of every block on all tokens (global tokens last)."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return apply(self._encoder(), params["encoder"], tokens, mask, method=Encoder.attentions)

    def decode(
        self,
        params: Params,
        output: str,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        masks_keys: bool,
        queries: Queries | None = None,
    ) -> Float[Array, "b q p"]:
        """Predict one output's patch vectors (row, column, channel or class), float32, for its whole grid.

        `queries` asks for some of its tokens alone, where `decodes_part`.
        """
        asked = () if queries is None else (queries,)
        grid = self.output_grid(output, layout)
        return apply(self._decoder(output), params["outputs"][output], memory, plan, layout, grid, masks_keys, *asked)

    def decode_after_blocks(
        self, params: Params, output: str, memory: Memory, plan: MaskPlan, layout: TokenLayout, masks_keys: bool
    ) -> list[Float[Array, "b n p"]]:
        """What `decode` would give if a MAE or CrossMAE decoder ended after each of its blocks."""
        arguments = memory, plan, layout, self.output_grid(output, layout), masks_keys
        return apply(self._decoder(output), params["outputs"][output], *arguments, method="after_blocks")

    def decoder_attentions(
        self, params: Params, output: str, memory: Memory, plan: MaskPlan, layout: TokenLayout
    ) -> list[Float[Array, "b a s s"]]:
        """The attention maps of every block of a MAE decoder, over all tokens and the global ones."""
        arguments = memory, plan, layout, self.output_grid(output, layout)
        return apply(self._decoder(output), params["outputs"][output], *arguments, method="attentions")

    def output_grid(self, output: str, layout: TokenLayout) -> tuple[int, int]:
        """(rows, columns) of an output's own tokens: one that is not an input follows the image that the layout implies."""
        spec = self.modality(output)
        name = spec.name if spec.name in layout.names else layout.names[0]
        rows, columns = layout.grids[layout.names.index(name)]
        ratio = self.modality(name).patch / spec.patch
        return round(rows * ratio), round(columns * ratio)


def frozen_mask(params: Params, model: MultiMaeModel | None = None) -> Any:
    """A tree of bools, True for parameters that are never trained: fixed position tables, and fixed lengths of prototypes."""
    fixed_scale = model is not None and dict(model.projection).get("fixed_scale", False)

    def frozen(path: Any, _: Any) -> bool:
        return path[-1].key == "pos_embed" or (fixed_scale and path[0].key == "projection" and path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(frozen, params)


def count_parameters(params: Params, model: MultiMaeModel | None = None) -> tuple[int, int]:
    """(all values, trainable values)."""
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(frozen_mask(params, model)), strict=True))
    return sum(x.size for x, _ in leaves), sum(x.size for x, frozen in leaves if not frozen)
