"""What the decoders share: whose place a token has, and what may be attended to."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from maskvit.core.patches import resample_pos_embed
from maskvit.core.types import MaskPlan

Memory = tuple[Float[Array, "b e d"], ...]


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


def context_mask(plan: MaskPlan, num_context: int, has_padding: bool) -> Bool[Array, "b e"] | None:
    """True for the visible tokens that exist and the global tokens behind them; None where all do."""
    if not has_padding:
        return None
    return jnp.pad(plan.visible_valid, ((0, 0), (0, num_context - plan.visible_ids.shape[1])), constant_values=True)
