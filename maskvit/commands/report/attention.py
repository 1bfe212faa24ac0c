"""What a checkpoint's attention looks at, on pictures of one's own, as one HTML page."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from maskvit.commands.report.files import add_picture_arguments, each_picture, picture_command
from maskvit.core.types import Batch, Params, TokenBatch, TokenLayout
from maskvit.features import LoadedModel, first_input
from maskvit.guidance.attention import QUERIES, self_attention
from maskvit.masking.plan import drop, present_counts
from maskvit.plots import page, panels, pictures

ROW_NAMES = {"global": "global token's row", "mean": "mean over queries"}


# Equal budgets


def equal_counts(layout: TokenLayout, num_visible: int) -> tuple[int, ...]:
    """Visible tokens per modality, as equal as can be; what one modality is too small for goes to the next, in token order.

    Raises ValueError where there are fewer tokens than `num_visible`.
    """
    if num_visible > layout.num_tokens:
        raise ValueError(f"{num_visible} visible tokens of {layout.num_tokens}")
    counts = [0] * len(layout.sizes)
    while (left := num_visible - sum(counts)) > 0:
        room = [i for i, size in enumerate(layout.sizes) if counts[i] < size]
        for place, i in enumerate(room):
            counts[i] += min(left // len(room) + (place < left % len(room)), layout.sizes[i] - counts[i])
    return tuple(counts)


def share_visible(num_tokens: int, num_visible: int, all_tokens: int) -> int:
    """Of `num_tokens` as large a share visible as `num_visible` of `all_tokens`; at least one visible and one hidden."""
    return min(max(1, round(num_tokens * num_visible / all_tokens)), num_tokens - 1)


# The attention page


class AttentionMaps(NamedTuple):
    """What a page shows of a batch; `n` patch tokens, `e` = n and the global tokens, which come last.

    `attentions`: every block's attention ("l" blocks); `rows`: the last block's, mean over heads, as the guidance "global"
    and "mean" reads it; `masked`: what each of them hides.
    """

    attentions: Float[Array, "b l a e e"]
    rows: dict[str, Float[Array, "b n"]]
    masked: dict[str, Bool[Array, "b n"]]


@functools.partial(jax.jit, static_argnames=("objective", "num_visible"))
def attention_maps(objective: Any, params: Params, batch: Batch, num_visible: int) -> AttentionMaps:
    """Attention on the modalities in `batch` alone, and what stays hidden when `num_visible` tokens are shown."""
    model = objective.model
    prepared = objective.prepare(batch)
    tokens = model.embed(params, prepared.values, prepared.present)
    b = tokens.tokens.shape[0]
    rows = {query: self_attention(model, params, tokens, query) for query in QUERIES}
    counts = jnp.tile(jnp.array(equal_counts(tokens.layout, num_visible)), (b, 1))
    masked = {query: hide(row, counts, tokens, num_visible) for query, row in rows.items()}
    attentions = jnp.stack(model.attentions(params, tokens), axis=1)
    return AttentionMaps(attentions, rows, masked)


def hide(scores: Float[Array, "b n"], counts: Int[Array, "b m"], tokens: TokenBatch, num_visible: int) -> Bool[Array, "b n"]:
    """The tokens hidden where those with the highest `scores` are."""
    counts = jnp.minimum(counts, present_counts(tokens.layout, tokens.present, counts.shape[0]))
    return drop(scores, counts, tokens.layout, num_visible, tokens.present).masked


def attention_page(loaded: LoadedModel, paths: Sequence[Path], checkpoint: str, crop: float | int = 0.875) -> tuple[str, dict[Path, str]]:
    """One self-contained HTML page of pictures given as the first input modality, and the files left out with the reason."""
    spec, model = first_input(loaded.model), loaded.model
    grid = spec.grid(model.image_size)
    tokens = math.prod(grid)
    visible = share_visible(tokens, loaded.objective.num_visible, model.layout.num_tokens)
    left_out: dict[Path, str] = {}
    sections = []
    for path, stored in each_picture(model, paths, crop, left_out):
        maps = jax.device_get(attention_maps(loaded.objective, loaded.params, Batch({spec.name: jnp.asarray(stored)}), visible))
        rollout = pictures.attention_rollout(maps.attentions[0])[-1, :tokens]
        heads = maps.attentions[0, -1, :, -1, :tokens]
        picture = pictures.to_picture(spec, stored[0])
        on_grid = lambda values: np.asarray(values, np.float64).reshape(grid)  # noqa: E731
        heat = functools.partial(pictures.heat_overlay, picture)
        tiles = [("input", picture)]
        tiles += [(ROW_NAMES[query], heat(on_grid(maps.rows[query][0]))) for query in QUERIES]
        tiles += [("rollout over all blocks", heat(on_grid(rollout)))]
        tiles += [
            (f"visible, {ROW_NAMES[query]}", pictures.mask_overlay(picture, maps.masked[query][0].reshape(grid))) for query in QUERIES
        ]
        tiles += [(f"head {i}", heat(on_grid(head))) for i, head in enumerate(heads)]
        caption = (
            f"{path}: last-block attention averaged over heads (both rows), attention rollout, the {visible} of {tokens} tokens that "
            "stay visible when the most attended are hidden, and the global token's attention per head. Each heat map has its own "
            "scale."
        )
        sections.append(page.Section(path.name, [page.Figure(panels.tile_grid(tiles, 4, heat_bar=True), caption)]))

    encoder = dict(model.encoder)
    guidance = loaded.config["objective"].get("guidance") or {}
    facts = [
        ("checkpoint", checkpoint),
        ("image size", f"{model.image_size[0]} x {model.image_size[1]}, {tokens} tokens of {spec.name} alone"),
        ("encoder", f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads"),
        ("visible", f"{visible} of {tokens}, the share of {loaded.objective.num_visible} of {model.layout.num_tokens} in its config"),
        ("guidance in its config", ROW_NAMES.get(str(guidance.get("query")), "none") if guidance else "none"),
    ]
    about = page.Section("What is shown", [page.Table(("", "value"), facts)])
    return page.html_page("Attention", [about, *sections], "What the last block attends to, and what would be hidden for it."), left_out


# The command

add_arguments = add_picture_arguments


def run(checkpoint: str, images: Sequence[str], out: Path, crop: float) -> int:
    """The command; 1 where a file was left out."""
    return picture_command(attention_page, checkpoint, images, out, crop)
