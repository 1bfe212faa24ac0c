"""A backbone with heads: what is rebuilt of its features, classified or projected. Which there are is a matter of `HEADS`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Key

from maskvit.core.modalities import Modality
from maskvit.core.types import MaskPlan, Params, Queries, TokenLayout
from maskvit.heads import DECODERS, HEADS
from maskvit.heads.places import Memory
from maskvit.masking.plan import show_all
from maskvit.nn.backbone import Backbone
from maskvit.nn.layers import apply

Pairs = tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Network(Backbone):
    """A backbone, one decoder per output (parameters "outputs/NAME") and heads by name (parameters "NAME").

    Attributes:
      outputs: a modality's name, or "norm_<name>" for its per-patch normalized form.
      error_outputs: inputs with a further decoder, "error_<name>", that predicts one number per token: how hard it is.
      decoder_name, decoder: the row of `DECODERS` that every output has, and its sizes and options as pairs.
      heads: (row of `HEADS`, its options as pairs).
    """

    outputs: tuple[str, ...] = ()
    error_outputs: tuple[str, ...] = ()
    decoder_name: str = "spatial"
    decoder: Pairs = ()
    heads: tuple[tuple[str, Pairs], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decoder_name == "crossmae" and self.final_norm:
            raise ValueError(
                "config.objective.final_norm is True, but the crossmae decoder reads the encoder's blocks and would leave that norm "
                "untrained: set it to False"
            )
        if self.num_classes and self.pool == "global" and not self.num_global_tokens:
            raise ValueError("config.objective.pool is 'global', but the model has no global token: set it to 'mean'")

    def modality(self, name: str) -> Modality:
        """The modality of an input or output name ("norm_rgb" -> rgb; "error_rgb" -> rgb with one value per token)."""
        by_name = {spec.name: spec for spec in self.modalities}
        if name.removeprefix("error_") in self.error_outputs and name not in by_name:
            spec = by_name[name.removeprefix("error_")]
            return dataclasses.replace(spec, kind="continuous", loss="mse", channels=1, mean=(0.0,), std=(1.0,), stride=spec.patch)
        return by_name.get(name) or by_name[name.removeprefix("norm_")]

    @property
    def projection(self) -> Pairs:
        """The options of the head of self-distillation; () where there is none."""
        return dict(self.heads).get("projection", ())

    @property
    def num_classes(self) -> int:
        """Classes of the classifier, 0 where there is none."""
        return dict(dict(self.heads).get("head", ())).get("num_classes", 0)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Patterns of the parameters that are never trained."""
        return (*super().fixed, *(pattern for name, options in self.heads for pattern in HEADS[name].fixed(**dict(options))))

    @property
    def decodes_part(self) -> bool:
        """Whether the decoders can decode some tokens of an output at the cost of those alone."""
        return DECODERS[self.decoder_name].decodes_part

    def _decoder(self, name: str) -> Any:
        spec, shared = self.modality(name), dict(dtype=self._dtype(), columns_first=self._columns_first, kernel=self.attention_kernel)
        return DECODERS[self.decoder_name].module(spec, self.inputs, spec.grid(self.image_size), **shared, **dict(self.decoder))

    def _head(self, name: str) -> nn.Module:
        return HEADS[name].module(dtype=self._dtype(), **dict(dict(self.heads)[name]))

    def init(self, key: Key[Array, ""]) -> Params:
        """Fresh parameters, initialized as the reference does."""
        params = super().init(key)
        layout, output_key = self.layout, jax.random.split(key, 4)[3]
        for name, _ in self.heads:
            row = HEADS[name]
            example = row.example(self.width, layout.grids[0], self.num_global_tokens)
            params[name] = self._head(name).init(jax.random.fold_in(key, row.stream), *example, method=row.everything)["params"]
        plan = show_all(layout, 1)
        encoded = jnp.zeros((1, layout.num_tokens + self.num_global_tokens, self.width))
        memory = (encoded,) * len(dict(self.decoder).get("features", (0,)))
        params["outputs"] = {}
        for i, name in enumerate((*self.outputs, *(f"error_{name}" for name in self.error_outputs))):
            arguments = memory, plan, layout, self.modality(name).grid(self.image_size), False
            params["outputs"][name] = self._decoder(name).init(jax.random.fold_in(output_key, i), *arguments)["params"]
        return params

    def memory(self, params: Params, tokens: Float[Array, "b v d"], mask: Bool[Array, "b v"] | None = None) -> Memory:
        """Encode tokens as `encode` does, and give what the decoders read of it: the end, or features of chosen blocks."""
        if "features" not in dict(self.decoder):
            return (self.encode(params, tokens, mask),)
        return self.features(params, tokens, dict(self.decoder)["features"], mask)

    def project(self, params: Params, encoded: Float[Array, "*b d"], patches: bool = False) -> Float[Array, "*b k"]:
        """Prototype logits (float32) of encoded class tokens, or of `patches`."""
        return apply(self._head("projection"), params["projection"], encoded, method="patches" if patches else "__call__")

    def logits(self, params: Params, encoded: Float[Array, "b e d"]) -> Float[Array, "b k"]:
        """Class scores (before the softmax, float32) of encoded tokens, as `encode` or `normed` give them."""
        if not self.num_classes:
            raise ValueError("this model has no classifier: its config.objective.num_classes is 0")
        if self.pool == "global":
            pooled = encoded[:, -1]
        else:
            patches = encoded.shape[1] - (0 if self.pool == "all" else self.num_global_tokens)
            pooled = encoded[:, :patches].mean(axis=1)
            if self.final_norm:
                pooled = apply(self._norm(), params["norm"], pooled)
        return apply(self._head("head"), params["head"], pooled)

    def decode(
        self,
        params: Params,
        output: str,
        memory: Memory,
        plan: MaskPlan,
        layout: TokenLayout,
        has_padding: bool,
        queries: Queries | None = None,
    ) -> Float[Array, "b q p"]:
        """Predict one output's patch vectors (row, column, channel or class), float32, for its whole grid.

        `queries` asks for some of its tokens alone, where `decodes_part`.
        """
        asked = () if queries is None else (queries,)
        grid = self.output_grid(output, layout)
        return apply(self._decoder(output), params["outputs"][output], memory, plan, layout, grid, has_padding, *asked)

    def decode_after_blocks(
        self, params: Params, output: str, memory: Memory, plan: MaskPlan, layout: TokenLayout, has_padding: bool
    ) -> list[Float[Array, "b n p"]]:
        """What `decode` would give if a MAE or CrossMAE decoder ended after each of its blocks."""
        arguments = memory, plan, layout, self.output_grid(output, layout), has_padding
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
