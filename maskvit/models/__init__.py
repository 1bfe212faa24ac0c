"""Models as plain data with pure functions: parameters go in as nested dicts, nothing is stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from maskvit.masking import show_all
from maskvit.modalities import Modality
from maskvit.models.adapters import InputAdapter
from maskvit.models.decoders import SpatialDecoder
from maskvit.models.vit import VARIANTS, Encoder
from maskvit.types import MaskPlan, Params, TokenBatch, TokenLayout

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def encoder_sizes(encoder: str | Mapping[str, Any]) -> dict[str, Any]:
    """`"B"` or `{"width": ..., "depth": ..., "heads": ..., "mlp_ratio": ...}` to the arguments of `Encoder`."""
    if isinstance(encoder, str):
        if encoder not in VARIANTS:
            raise ValueError(f"config.objective.encoder is {encoder!r}; known: {', '.join(VARIANTS)}, or a block of sizes")
        return dict(VARIANTS[encoder])
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
      encoder, decoder: sizes, as (key, value) pairs so that the model is hashable.
      num_global_tokens: learned tokens without position, appended at the end.
      compute_dtype: "float32" or "bfloat16".
      remat: recompute the encoder's blocks in the backward pass.
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
        return InputAdapter(spec, self.width, spec.grid(self.image_size), self._dtype())

    def _encoder(self) -> Encoder:
        return Encoder(**dict(self.encoder), dtype=self._dtype(), remat=self.remat)

    def _decoder(self, name: str) -> SpatialDecoder:
        spec = self.modality(name)
        return SpatialDecoder(spec, self.inputs, grid=spec.grid(self.image_size), dtype=self._dtype(), **dict(self.decoder))

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
            params["inputs"][name] = self._input(name).init(jax.random.fold_in(input_key, i), values)["params"]
        params["global_tokens"] = 0.02 * jax.random.normal(global_key, (self.num_global_tokens, self.width))
        params["encoder"] = self._encoder().init(encoder_key, jnp.zeros((1, 1, self.width)))["params"]
        plan = show_all(layout, 1)
        encoded = jnp.zeros((1, layout.num_tokens + self.num_global_tokens, self.width))
        for i, name in enumerate((*self.outputs, *(f"error_{name}" for name in self.error_outputs))):
            grid = self.modality(name).grid(self.image_size)
            decoder = self._decoder(name)
            params["outputs"][name] = decoder.init(jax.random.fold_in(output_key, i), encoded, plan, layout, grid, False)["params"]
        return params

    def embed(self, params: Params, values: Mapping[str, Num[Array, "b h w *c"]], present: Bool[Array, "b n"] | None = None) -> TokenBatch:
        """Model values of the given modalities to tokens with position; the one place where tokens are made."""
        layout = self.layout_of(values)
        tokens = [self._input(name).apply({"params": params["inputs"][name]}, values[name]) for name in layout.names]
        return TokenBatch(jnp.concatenate(tokens, axis=1), layout, present)

    def append_global(
        self, params: Params, tokens: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None
    ) -> tuple[Float[Array, "b e d"], Bool[Array, "b e"] | None]:
        """The tokens, and their mask where there is one, with the global tokens behind them."""
        shape = (tokens.shape[0], *params["global_tokens"].shape)
        tokens = jnp.concatenate([tokens, jnp.broadcast_to(params["global_tokens"].astype(tokens.dtype), shape)], axis=1)
        if mask is not None:
            mask = jnp.pad(mask, ((0, 0), (0, shape[1])), constant_values=True)
        return tokens, mask

    def encode(self, params: Params, tokens: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None) -> Float[Array, "b e d"]:
        """Encode tokens; the global tokens come last in the result. `mask` True where a token may be attended to."""
        tokens, mask = self.append_global(params, tokens, mask)
        return self._encoder().apply({"params": params["encoder"]}, tokens, mask)

    def attention(self, params: Params, batch: TokenBatch, queries: slice, block: int = -1) -> Float[Array, "b a q e"]:
        """The attention of one block on all tokens (global tokens last), for the queries asked for and no work beyond it."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return self._encoder().apply({"params": params["encoder"]}, tokens, queries, block, mask, method=Encoder.attention)

    def blocks(
        self, params: Params, tokens: Float[Array, "b v d"], start: int, stop: int, mask: Bool[Array, "b v"] | None = None
    ) -> Float[Array, "b v d"]:
        """Tokens (global ones included, as `start` finds them) through the encoder's blocks start ... stop - 1."""
        return self._encoder().apply({"params": params["encoder"]}, tokens, start, stop, mask, method=Encoder.blocks)

    def attentions(self, params: Params, batch: TokenBatch) -> list[Float[Array, "b a e e"]]:
        """The attention maps of every block on all tokens (global tokens last)."""
        tokens, mask = self.append_global(params, batch.tokens, batch.present)
        return self._encoder().apply({"params": params["encoder"]}, tokens, mask, method=Encoder.attentions)

    def decode(
        self, params: Params, output: str, encoded: Float[Array, "b e d"], plan: MaskPlan, layout: TokenLayout, masks_keys: bool
    ) -> Float[Array, "b q p"]:
        """Predict one output's patch vectors (row, column, channel or class), float32, for its whole grid."""
        spec = self.modality(output)
        # Outputs that are not inputs have no tokens in the layout: their grid follows the image that the layout implies.
        name = spec.name if spec.name in layout.names else layout.names[0]
        rows, columns = layout.grids[layout.names.index(name)]
        ratio = self.modality(name).patch / spec.patch
        grid = round(rows * ratio), round(columns * ratio)
        variables = {"params": params["outputs"][output]}
        return self._decoder(output).apply(variables, encoded, plan, layout, grid, masks_keys)


def frozen_mask(params: Params) -> Any:
    """A tree of bools, True for parameters that are never trained: the position tables of this family."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "pos_embed", params)


def count_parameters(params: Params) -> tuple[int, int]:
    """(all values, trainable values)."""
    leaves = list(zip(jax.tree.leaves(params), jax.tree.leaves(frozen_mask(params)), strict=True))
    return sum(x.size for x, _ in leaves), sum(x.size for x, frozen in leaves if not frozen)
