"""From what the loader delivers to what a model reads: numbers normalized, holes filled, tokens that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from maskvit.core.modalities import Modality
from maskvit.core.patches import patchify
from maskvit.core.types import Batch, Params, batch_of
from maskvit.heads.network import Network
from maskvit.losses.pixels import standardize_trimmed


class Prepared(NamedTuple):
    """A batch in model values.

    `values`: model input per modality (continuous float32 with 0 where invalid, categorical int with -1 where unknown);
    `valid`: pixels that have a value, per modality that can lack some; `restore`: (mean, deviation) that undo a
    modality's standardization; `present`: tokens that exist, None where all do.
    """

    values: dict[str, Num[Array, "b h w *c"]]
    valid: dict[str, Bool[Array, "b h w 1"]]
    restore: dict[str, tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]]
    present: Bool[Array, "b n"] | None

    def values_of(self, names: tuple[str, ...]) -> dict[str, Num[Array, "b h w *c"]]:
        """The values of those modalities that the batch has."""
        return {name: self.values[name] for name in names if name in self.values}

    def valid_patches(self, spec: Modality) -> Float[Array, "b n p"] | None:
        """1 for the pixels of a modality that have a value, as patches; None where all have one."""
        return None if spec.name not in self.valid else patchify(self.valid[spec.name], spec.patch_pixels).astype(jnp.float32)


def prepare(model: Network, batch: Batch) -> Prepared:
    """Normalize what the loader delivers; depth is standardized per sample over its valid pixels.

    Raises ValueError for arrays of another form than the modality's, and for a batch that has none of the model's modalities.
    """
    if not isinstance(batch, Batch):
        raise TypeError(f"a batch is a maskvit.core.types.Batch, as batch_of(arrays by name) makes it, not a {type(batch).__name__}")
    if not any(spec.name in batch.values for spec in model.modalities):
        names = ", ".join(spec.name for spec in model.modalities)
        raise ValueError(f"the batch has none of the modalities {names}; it has {_names(batch.values)}")
    values: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    restore: dict[str, Any] = {}
    for spec in model.modalities:
        if spec.name not in batch.values:
            continue
        stored, has = batch.values[spec.name], _samples_with(model, batch, spec.name)
        check_values(spec, stored)
        if has is not None:
            # Whatever stands in for an absent modality (NaN) must not reach a product, not even one with weight 0.
            has = has[:, None, None, None]
            nothing = -1 if spec.kind == "categorical" else jnp.zeros((), stored.dtype)
            stored = jnp.where(has[..., 0] if spec.kind == "categorical" else has, stored, nothing)
        there = None
        if spec.missing is not None:
            there = (stored >= 0)[..., None] if spec.kind == "categorical" else jnp.isfinite(stored).all(axis=-1, keepdims=True)
        if has is not None:
            there = jnp.broadcast_to(has, (*stored.shape[:3], 1)) if there is None else there & has
        if there is not None:
            valid[spec.name] = there
        if spec.kind == "categorical":
            values[spec.name] = stored
            continue
        stored = stored if there is None else jnp.where(there, stored, 0)
        scaled = stored.astype(jnp.float32) * spec.scale
        scaled = (scaled - jnp.array(spec.mean)) / jnp.array(spec.std)
        if spec.standardize:
            scaled, mean, deviation = standardize_trimmed(scaled, there)
            restore[spec.name] = mean, deviation
        values[spec.name] = scaled if there is None else jnp.where(there, scaled, 0)
    return Prepared(values, valid, restore, _present_tokens(model, values, valid))


class Encoded(NamedTuple):
    """Float32 tokens of an unmasked pass.

    `patches`: of the inputs shown, in their order; `present`: which of them exist, None where all do; `global_tokens`: perhaps none.
    """

    patches: Float[Array, "b n d"]
    present: Bool[Array, "b n"] | None
    global_tokens: Float[Array, "b g d"]


def encoded_tokens(
    model: Network, params: Params, batch: Batch | Mapping[str, Any], inputs: tuple[str, ...] | None = None, norm: bool = True
) -> Encoded:
    """An unmasked pass over `inputs` (the first input modality alone unless given); `batch` may be arrays by name.

    `norm` False: as tokens leave the last block, without the final norm of models that have one.
    """
    return tokens_of_blocks(model, params, batch, (dict(model.encoder)["depth"],), inputs, norm)[0]


def tokens_of_blocks(
    model: Network, params: Params, batch: Batch | Mapping[str, Any], layers: tuple[int, ...], inputs: tuple[str, ...] | None = None,
    norm: bool = True,
) -> tuple[Encoded, ...]:  # fmt: skip
    """`encoded_tokens` as they leave several blocks, those in `layers` (counted from 1), ascending; the final norm is put on each."""
    names = inputs or model.inputs[:1]
    batch = batch if isinstance(batch, Batch) else batch_of(batch)
    prepared = prepare(model, batch.only(names))
    tokens = model.embed(params, prepared.values_of(names), prepared.present)
    n = tokens.layout.num_tokens
    found = []
    for encoded in model.features(params, tokens.tokens, layers, tokens.present):
        encoded = (model.normed(params, encoded) if norm else encoded).astype(jnp.float32)
        found.append(Encoded(encoded[:, :n], tokens.present, encoded[:, n:]))
    return tuple(found)


def pooled(encoded: Encoded) -> dict[str, Float[Array, "b d"]]:
    """One vector each: "mean", the mean of the patch tokens present; "global", the (first) global token, where there is one."""
    patches, present, global_tokens = encoded
    weights = jnp.ones(patches.shape[:2]) if present is None else present.astype(jnp.float32)
    mean = jnp.einsum("bnd,bn->bd", patches, weights) / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
    return {"mean": mean} | ({"global": global_tokens[:, 0]} if global_tokens.shape[1] else {})


class ReadsFeatures:
    """The part of an objective that evaluators and users of features read; `model` is the objective's."""

    model: Any

    def encoder_params(self, params: Params, state: Any) -> Params:
        """The parameters whose features are read."""
        return params

    def predict(
        self, params: Params, state: Any, batch: Batch | Mapping[str, Any], inputs: tuple[str, ...] | None = None, norm: bool = True
    ) -> dict[str, Float[Array, "b d"]]:
        """Features of an unmasked pass (`pooled`); arguments as `encoded_tokens`."""
        return pooled(self.tokens(params, state, batch, inputs, norm))

    def tokens(
        self, params: Params, state: Any, batch: Batch | Mapping[str, Any], inputs: tuple[str, ...] | None = None, norm: bool = True
    ) -> Encoded:
        """The tokens themselves (`encoded_tokens`)."""
        return encoded_tokens(self.model, self.encoder_params(params, state), batch, inputs, norm)

    def global_of_blocks(
        self, params: Params, state: Any, batch: Batch | Mapping[str, Any], layers: tuple[int, ...],
        inputs: tuple[str, ...] | None = None, norm: bool = True,
    ) -> Float[Array, "b e"]:  # fmt: skip
        """The (first) global token as it leaves each of the blocks `layers`, side by side, the earliest block first."""
        blocks = tokens_of_blocks(self.model, self.encoder_params(params, state), batch, layers, inputs, norm)
        return jnp.concatenate([encoded.global_tokens[:, 0] for encoded in blocks], axis=1)


def check_values(spec: Modality, stored: Any) -> None:
    """Raise ValueError unless an array is "b h w c" of a continuous modality, or integers "b h w", and divides into its tokens."""
    shape, patch, where = tuple(stored.shape), spec.patch_pixels, f"batch[{spec.name!r}]"
    if spec.kind == "categorical":
        if len(shape) != 3 or not jnp.issubdtype(stored.dtype, jnp.integer):
            raise ValueError(f"{where} is {stored.dtype} of shape {shape}; class ids are integers of shape (batch, height, width)")
    elif len(shape) != 4 or shape[3] != spec.channels:
        hint = ": channels come last" if len(shape) == 4 and shape[1] == spec.channels else ""
        raise ValueError(f"{where} has shape {shape}; it must be (batch, height, width, {spec.channels}){hint}")
    if not shape[1] or not shape[2] or shape[1] % patch or shape[2] % patch:
        raise ValueError(f"{where} is {shape[1]} x {shape[2]} pixels, which do not divide into tokens of {patch} x {patch}")


def check_targets(model: Network, prepared: Prepared) -> None:
    """Raise ValueError where a batch lacks what an output of the model is compared with."""
    for output in (*model.outputs, *model.error_outputs):
        name = model.modality(output).name
        if name not in prepared.values:
            raise ValueError(
                f"the batch lacks the modality {name!r}, which the output {output!r} is compared with; it has {_names(prepared.values)}. "
                "Give it, or build the objective without that output"
            )


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(values) or "nothing"


def _samples_with(model: Network, batch: Batch, name: str) -> Bool[Array, " b"] | None:
    """Which samples have a modality; None where all do."""
    if batch.present is None:
        return None
    columns = (*model.inputs, *(spec.name for spec in model.modalities if spec.name not in model.inputs))
    column = columns.index(name)
    return batch.present[:, column] if column < batch.present.shape[1] else None


def _present_tokens(model: Network, values: Mapping[str, Any], valid: Mapping[str, Any]) -> Bool[Array, "b n"] | None:
    """Tokens of the inputs that have at least one valid pixel."""
    names = [name for name in model.inputs if name in values]
    if not any(name in valid for name in names):
        return None
    parts = []
    for name in names:
        patch = model.modality(name).patch_pixels
        b, height, width = values[name].shape[:3]
        everything = jnp.ones((b, height * width // patch**2), bool)
        parts.append(patchify(valid[name], patch).any(axis=-1) if name in valid else everything)
    return jnp.concatenate(parts, axis=1)


def take(values: Num[Array, "b n *p"], ids: Int[Array, "b q"]) -> Num[Array, "b q *p"]:
    """The values of the tokens `ids`."""
    return jnp.take_along_axis(values, ids.reshape(*ids.shape, *(1,) * (values.ndim - 2)), axis=1)


def split_channels(patches: Num[Array, "b n k"], spec: Modality) -> Num[Array, "b n p c"]:
    """Flat patches as pixels times channels."""
    return patches.reshape(*patches.shape[:2], spec.patch_pixels**2, -1)
