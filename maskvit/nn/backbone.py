"""The backbone: input adapters, encoder, final norm. Plain data with pure functions: parameters go in as nested dicts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from maskvit.core.configuration import check_arguments
from maskvit.core.modalities import Modality
from maskvit.core.types import Params, TokenBatch, TokenLayout, path_name
from maskvit.nn.adapters import InputAdapter
from maskvit.nn.attention import KERNELS
from maskvit.nn.encoder import VARIANTS, Encoder, check_remat, check_sizes, transformer_sizes
from maskvit.nn.layers import LayerNorm, apply, layer_norm

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
POOLS = ("global", "mean", "all")
POSITIONS = ("rows_first", "columns_first", "learned")
FIXED = (r"(.*/)?pos_embed",)  # parameters that are never trained: fixed position tables


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
class Backbone:
    """A Vision Transformer over several modalities: one input adapter each, one encoder, perhaps a final norm.

    Attributes:
      modalities: every declared modality that the model names.
      inputs: input modalities; their order is the order of the tokens.
      image_size: (height, width) the position tables are stored at.
      encoder: its sizes, as (key, value) pairs so that the model is hashable.
      num_global_tokens: learned tokens without position, appended at the end.
      positions: which half of the fixed position tables is the row's: "rows_first" (MultiMAE) or "columns_first" (MAE, CrossMAE);
        or "learned": a trained table, and one for the global tokens (DINO, iBOT).
      final_norm: whether a layer norm follows the encoder: plain ViTs have one, MultiMAE none.
      pool: what a classifier and the norm read: "global" is the last global token out of the normed tokens (DINO, timm), "mean"
        the norm of the mean of all other tokens (fine-tuned MAE), "all" that of all tokens (fine-tuned MultiMAE).
      train_positions: whether fixed position tables are trained too, as fine-tuning MAE does.
      mask_embed: whether hidden tokens may stay in the sequence, as a learned vector in place of their content (iBOT).
      qkv_parts: how many kernels a fused qkv of the encoder is initialized as: 3 (MultiMAE) or 1 (MAE).
      compute_dtype: "float32" or "bfloat16".
      remat: recompute the encoder's blocks in the backward pass: a row of `maskvit.nn.encoder.REMAT`.
      attention_kernel: what computes attention, in encoder and decoders: a row of `maskvit.nn.attention.KERNELS`.
    """

    modalities: tuple[Modality, ...]
    inputs: tuple[str, ...]
    image_size: tuple[int, int]
    encoder: tuple[tuple[str, Any], ...]
    num_global_tokens: int = 1
    positions: str = "rows_first"
    final_norm: bool = False
    pool: str = "global"
    train_positions: bool = False
    mask_embed: bool = False
    qkv_parts: int = 3
    compute_dtype: str = "float32"
    remat: bool | str = False
    attention_kernel: str = "plain"

    def __post_init__(self) -> None:
        check_remat(self.remat)
        for key, known in (("positions", POSITIONS), ("pool", POOLS), ("compute_dtype", tuple(DTYPES)), ("attention_kernel", KERNELS)):
            if getattr(self, key) not in known:
                raise ValueError(f"config.objective.{key} is {getattr(self, key)!r}; known: {', '.join(known)}")

    def modality(self, name: str) -> Modality:
        """The modality of an input."""
        return {spec.name: spec for spec in self.modalities}[name]

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

    @property
    def fixed(self) -> tuple[str, ...]:
        """Patterns of the parameters that are never trained."""
        return () if self.train_positions else FIXED

    def _dtype(self) -> Any:
        return DTYPES[self.compute_dtype]

    @property
    def _columns_first(self) -> bool:
        return self.positions == "columns_first"

    def _input(self, name: str) -> InputAdapter:
        spec = self.modality(name)
        learned = self.positions == "learned"
        return InputAdapter(spec, self.width, spec.grid(self.image_size), self._dtype(), self._columns_first, learned, self.train_positions)

    def _encoder(self) -> Encoder:
        return Encoder(**dict(self.encoder), dtype=self._dtype(), remat=self.remat, qkv_parts=self.qkv_parts, kernel=self.attention_kernel)

    def _norm(self) -> LayerNorm:
        return layer_norm(self._dtype())

    # The pure functions.

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, initialized as the reference does."""
        layout = self.layout
        input_key, global_key, encoder_key, _ = jax.random.split(key, 4)  # the last one is the heads'
        params: Params = {"inputs": {}}
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
        if self.final_norm:
            params["norm"] = self._norm().init(key, jnp.zeros((1, self.width)))["params"]
        return params

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

    def features(
        self,
        params: Params,
        tokens: Float[Array, "b v d"],
        layers: tuple[int, ...],
        mask: Bool[Array, "b v"] | None = None,
        branches: Float[Array, "depth two b"] | None = None,
    ) -> tuple[Float[Array, "b e d"], ...]:
        """Tokens as they enter the encoder (0) and leave its blocks (1 ... depth), those in `layers`, ascending, global tokens last.

        The one way to read blocks: nothing beyond the last of `layers` is computed, and no norm applied. `mask` True where a token
        may be attended to; `branches`: stochastic depth (`maskvit.nn.encoder.drop_path`).
        """
        tokens, mask = self.append_global(params, tokens, mask)
        return apply(self._encoder(), params["encoder"], tokens, layers, mask, branches, method=Encoder.features)

    def encode(
        self,
        params: Params,
        tokens: Float[Array, "b v d"],
        mask: Bool[Array, "b v"] | None = None,
        branches: Float[Array, "depth two b"] | None = None,
    ) -> Float[Array, "b e d"]:
        """What leaves the last block, normed; arguments as `features`."""
        return self.normed(params, self.features(params, tokens, (dict(self.encoder)["depth"],), mask, branches)[0])

    def encode_with_attention(
        self, params: Params, tokens: Float[Array, "b v d"], queries: slice, mask: Bool[Array, "b v"] | None = None
    ) -> tuple[Float[Array, "b e d"], Float[Array, "b a q e"]]:
        """What `encode` gives, and the last block's attention of the tokens in `queries`, in one pass."""
        tokens, mask = self.append_global(params, tokens, mask)
        encoded, weights = apply(self._encoder(), params["encoder"], tokens, queries, mask, method=Encoder.with_attention)
        return self.normed(params, encoded), weights

    def normed(self, params: Params, tokens: Float[Array, "b e d"]) -> Float[Array, "b e d"]:
        """What leaves the last block, through the final norm where the model has one on every token."""
        if self.final_norm and self.pool == "global":
            return apply(self._norm(), params["norm"], tokens)
        return tokens

    def attention(self, params: Params, batch: TokenBatch, queries: slice, block: int = -1) -> Float[Array, "b a q e"]:
        """The attention of one block on all tokens (global tokens last), for the queries asked for and no work beyond it."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return apply(self._encoder(), params["encoder"], tokens, queries, block, mask, method=Encoder.attention)

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

    def attentions(self, params: Params, batch: TokenBatch) -> list[Float[Array, "b a e e"]]:
        """The attention maps of every block on all tokens (global tokens last)."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return apply(self._encoder(), params["encoder"], tokens, mask, method=Encoder.attentions)


def frozen_mask(params: Params, model: Backbone | None = None) -> Any:
    """A tree of bools, True for parameters that are never trained: fixed position tables, and what the model's heads fix."""
    fixed = "|".join(FIXED if model is None else model.fixed)
    return jax.tree_util.tree_map_with_path(lambda path, _: re.fullmatch(fixed, path_name(path)) is not None, params)


def count_parameters(params: Params, model: Backbone | None = None) -> tuple[int, int]:
    """(all values, trainable values)."""
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(frozen_mask(params, model)), strict=True))
    return sum(x.size for x, _ in leaves), sum(x.size for x, frozen in leaves if not frozen)
