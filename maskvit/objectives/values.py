"""From what the loader delivers to what a model reads: numbers normalised, holes filled, tokens that exist."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from maskvit.losses import standardize_trimmed
from maskvit.models import MultiMaeModel
from maskvit.patches import patchify
from maskvit.types import Batch


class Prepared(NamedTuple):
    """A batch in model values.

    `values`: model input per modality (continuous float32 with 0 where invalid, categorical int with -1 where unknown);
    `valid`: pixels that have a value, per modality that can lack some; `restore`: (mean, deviation) that undo a
    modality's standardisation; `present`: tokens that exist, None where all do.
    """

    values: dict[str, Num[Array, "b h w *c"]]
    valid: dict[str, Bool[Array, "b h w 1"]]
    restore: dict[str, tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]]
    present: Bool[Array, "b n"] | None

    def values_of(self, names: tuple[str, ...]) -> dict[str, Num[Array, "b h w *c"]]:
        """The values of those modalities that the batch has."""
        return {name: self.values[name] for name in names if name in self.values}


def prepare(model: MultiMaeModel, batch: Batch) -> Prepared:
    """Normalise what the loader delivers; depth is standardised per sample over its valid pixels."""
    values: dict[str, Any] = {}
    valid: dict[str, Any] = {}
    restore: dict[str, Any] = {}
    for spec in model.modalities:
        if spec.name not in batch:
            continue
        stored = batch[spec.name]
        if "present" in batch and spec.name in model.inputs:
            # Whatever stands in for an absent modality (NaN) must not reach a product, not even one with weight 0.
            has = batch["present"][:, model.inputs.index(spec.name)]
            stored = jnp.where(has.reshape(-1, *(1,) * (stored.ndim - 1)), stored, jnp.zeros_like(stored))
        if spec.kind == "categorical":
            values[spec.name] = stored
            if spec.missing is not None:
                valid[spec.name] = (stored >= 0)[..., None]
            continue
        if spec.missing is not None:
            valid[spec.name] = jnp.isfinite(stored).all(axis=-1, keepdims=True)
            stored = jnp.where(valid[spec.name], stored, 0)
        if "present" in batch and spec.name in model.inputs:
            # Loaders fill what a sample lacks with NaN: no attention weight of zero would take that out again.
            there = batch["present"][:, model.inputs.index(spec.name)]
            stored = jnp.where(there[:, None, None, None], stored, 0)
        scaled = stored.astype(jnp.float32) * spec.scale
        scaled = (scaled - jnp.array(spec.mean)) / jnp.array(spec.std)
        if spec.standardize:
            scaled, mean, deviation = standardize_trimmed(scaled, valid.get(spec.name))
            restore[spec.name] = mean, deviation
        values[spec.name] = jnp.where(valid[spec.name], scaled, 0) if spec.name in valid else scaled
    return Prepared(values, valid, restore, _present_tokens(model, batch, values, valid))


def _present_tokens(model: MultiMaeModel, batch: Batch, values: Mapping[str, Any], valid: Mapping[str, Any]) -> Bool[Array, "b n"] | None:
    """Tokens of modalities that a sample has, with at least one valid pixel."""
    names = [name for name in model.inputs if name in values]
    if "present" not in batch and not any(name in valid for name in names):
        return None
    parts = []
    for name in names:
        patch = model.modality(name).patch_pixels
        b, height, width = values[name].shape[:3]
        tokens = jnp.ones((b, height * width // patch**2), bool)
        if name in valid:
            tokens = patchify(valid[name], patch).any(axis=-1)
        if "present" in batch:
            tokens &= batch["present"][:, model.inputs.index(name), None]
        parts.append(tokens)
    return jnp.concatenate(parts, axis=1)
