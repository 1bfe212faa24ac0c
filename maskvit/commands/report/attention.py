"""What a checkpoint's attention looks at, on pictures of one's own, as one HTML page."""

from __future__ import annotations

import dataclasses
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
DEVIATIONS = 4.0  # a token is an outlier where its norm exceeds the mean by so many standard deviations


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


# Measures


def outliers(norms: Float[np.ndarray, "b n"], present: Bool[np.ndarray, "b n"], deviations: float = DEVIATIONS) -> Bool[np.ndarray, "b n"]:
    """Present tokens whose norm exceeds the mean of all of them by `deviations` standard deviations."""
    counted = norms[present]
    return present & (norms > counted.mean() + deviations * counted.std())


def last_block_input(model: Any, params: Params, tokens: TokenBatch) -> Float[Array, "b n d"]:
    """What the last block reads, patch tokens only: the encoder's output with one block less."""
    sizes = dict(model.encoder)
    shorter = dataclasses.replace(model, encoder=tuple(sorted((sizes | {"depth": sizes["depth"] - 1}).items())))
    blocks = dict(params["encoder"])
    blocks.pop(f"block_{sizes['depth'] - 1:02d}")
    encoded = shorter.encode({**params, "encoder": blocks}, tokens.tokens, tokens.present)
    return encoded[:, : tokens.layout.num_tokens].astype(jnp.float32)


def top_tenth(tokens: int) -> int:
    """A tenth of the tokens, at least one."""
    return max(1, round(tokens / 10))


def top_share(rows: Float[np.ndarray, "b n"]) -> Float[np.ndarray, " b"]:
    """Share of each row's attention that its most attended tenth of the tokens receives; an even spread gives a tenth."""
    return np.sort(rows, axis=1)[:, -top_tenth(rows.shape[1]) :].sum(axis=1) / rows.sum(axis=1)


# The attention page


class AttentionMaps(NamedTuple):
    """What a page shows of a batch; `n` patch tokens, `e` = n and the global tokens, which come last.

    `attentions`: every block's attention ("l" blocks); `rows`: the last block's, mean over heads, as the guidance "global"
    and "mean" reads it; `masked`: what each of them hides; `norms`: of the patch tokens that enter the last block.
    """

    attentions: Float[Array, "b l a e e"]
    rows: dict[str, Float[Array, "b n"]]
    masked: dict[str, Bool[Array, "b n"]]
    norms: Float[Array, "b n"]


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
    norms = jnp.linalg.norm(last_block_input(model, params, tokens), axis=-1)
    return AttentionMaps(attentions, rows, masked, norms)


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
    sections, names, seen = [], [], []
    for path, stored in each_picture(model, paths, crop, left_out):
        maps = jax.device_get(attention_maps(loaded.objective, loaded.params, Batch({spec.name: jnp.asarray(stored)}), visible))
        names.append(path.name)
        seen.append(maps._replace(attentions=maps.attentions[:0]))  # a page of many pictures need not keep all attention
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
    table, result = what_it_attends_to(names, seen)
    about = [page.Section("Picture by picture", table), page.Section("What is shown", [page.Table(("what", "value"), facts)])]
    return page.html_page("Attention", [*about, *sections], result), left_out


def what_it_attends_to(names: Sequence[str], seen: Sequence[AttentionMaps]) -> tuple[list[Any], str]:
    """(a table of how concentrated attention is, picture by picture, with what follows from it; the result in two sentences)."""
    rows = {query: np.concatenate([np.asarray(maps.rows[query], np.float64) for maps in seen]) for query in QUERIES}
    norms = np.concatenate([np.asarray(maps.norms, np.float64) for maps in seen])
    masked = {query: np.concatenate([np.asarray(maps.masked[query]) for maps in seen]) for query in QUERIES}
    top = {query: top_share(values) for query, values in rows.items()}
    strange = outliers(norms, np.ones_like(norms, bool))
    first, second = (masked[query] for query in QUERIES)
    shared = (first & second).sum(axis=1) / first.sum(axis=1)
    tokens, tenth = norms.shape[1], top_tenth(norms.shape[1])
    result = (
        f"The most attended {tenth} of {tokens} tokens receive {top['global'].mean():.0%} of what the global token attends to, and "
        f"{top['mean'].mean():.0%} of what all tokens attend to on average; an even spread would give them {tenth / tokens:.0%}. "
    )
    if strange.any():
        has = "has" if strange.sum() == 1 else "have"
        result += f"{strange.sum()} of {strange.size} tokens {has} an outlier norm before the last block; such tokens often draw attention."
    else:
        result += "No token has an outlier norm before the last block."
    header = ("picture", *(f"to the top {tenth}, {ROW_NAMES[query]}" for query in QUERIES), "hidden by both rows", "tokens of outlier norm")
    table = [
        (name, *(f"{top[query][i]:.0%}" for query in QUERIES), f"{shared[i]:.0%}", int(strange[i].sum())) for i, name in enumerate(names)
    ]
    chance = first.mean()
    alike = shared.mean() - chance > (1 - chance) / 2
    words = (
        f"Of the tokens that one row hides the other hides {shared.mean():.0%}, where masks drawn at random would share {chance:.0%}: "
        f"guided by one row or the other, {'largely the same' if alike else 'largely different'} tokens are hidden. The shares are of the "
        f"attention to patches alone. An outlier norm exceeds the mean by more than {DEVIATIONS:g} standard deviations, over all pictures."
    )
    return [page.Table(header, table), page.Prose(words)], result


# The command

add_arguments = add_picture_arguments


def run(checkpoint: str, images: Sequence[str], out: Path, crop: float) -> int:
    """The command; 1 where a file was left out."""
    return picture_command(attention_page, checkpoint, images, out, crop)
