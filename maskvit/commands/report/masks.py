"""What masking strategies look at and hide, as one HTML page: a sheet per strategy and modality, and one that compares them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from maskvit.commands.report import strategies as shown_by
from maskvit.commands.report.files import write
from maskvit.commands.report.strategies import (
    Shown,
    Shows,
    doubt,
    find_strategies,
    input_names,
    legends,
    modality_pictures,
    notes,
    show_strategies,
)
from maskvit.core.arguments import check_output
from maskvit.plots import page, panels, pictures

HEAT = ("least", "most (each tile for itself)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    shown_by.add_arguments(parser, "HTML file to write; a name that ends in .png: the strategies side by side on the first image alone")


def visible_tile(shown: Shown, modality: str, index: int, picture: pictures.Picture) -> panels.Tile:
    """What a strategy leaves visible of one image, and how much it hides."""
    masked = shown.masked[modality][index]
    thrown = shown.thrown[modality][index] if shown.thrown else None
    words = f"{masked.sum()} of {masked.size} hidden" if thrown is None else f"{masked.sum()} hidden, {(masked & ~thrown).sum()} rebuilt"
    return pictures.mask_overlay(picture, masked, thrown), words


def heat_tile(values: Float[np.ndarray, "gh gw"], picture: pictures.Picture) -> panels.Tile:
    """A map over the picture, with its range."""
    return pictures.heat_overlay(picture, values), f"{values.min():.3g} to {values.max():.3g}"


def strategy_sheet(shows: Shows, shown: Shown, modality: str) -> bytes:
    """One strategy on one modality as PNG: image, guidance, loss weight, hidden tokens, and the attention of every head."""
    heads = shown.heads[modality].shape[1] if modality in shown.heads else 0
    columns = ["image", *(["guidance"] if shown.guidance else []), *(["loss weight"] if shown.weights else []), "visible"]
    columns += [f"head {head}" for head in range(heads)]
    rows = []
    for index, picture in enumerate(modality_pictures(shows, shown, modality)):
        tiles: list[panels.Tile] = [(picture, "")]
        tiles += [heat_tile(maps[modality][index], picture) for maps in (shown.guidance, shown.weights) if maps]
        tiles.append(visible_tile(shown, modality, index, picture))
        tiles += [(pictures.heat_overlay(picture, shown.heads[modality][index, head]), "") for head in range(heads)]
        rows.append((shows.ids[index], tiles))
    return panels.labeled_grid(columns, rows, heat=HEAT if shown.guidance else None)


def comparison_sheet(shows: Shows, index: int) -> bytes:
    """One image under every strategy, as PNG: a column per strategy; per modality what is visible and, where any has them, maps."""
    rows: list[tuple[str, list[panels.Tile | None]]] = []
    first = next(iter(shows.shown.values()))
    every = list(shows.shown.values())
    for modality in input_names(shows):
        picture = modality_pictures(shows, first, modality)[index]
        seen = [visible_tile(shown, modality, index, picture) if modality in shown.masked else None for shown in every]
        rows.append((modality, [(picture, ""), *seen]))
        for words, maps in (("guidance", [shown.guidance for shown in every]), ("loss weight", [shown.weights for shown in every])):
            heat = [heat_tile(each[modality][index], picture) if modality in each else None for each in maps]
            if any(heat):
                rows.append((words, [None, *heat]))
    guided = any(shown.guidance for shown in every)
    return panels.labeled_grid(["image", *(name.replace("_", "\n") for name in shows.shown)], rows, heat=HEAT if guided else None)


def top_tenth(values: Float[np.ndarray, "b gh gw"]) -> Bool[np.ndarray, "b gh gw"]:
    """Of each image the tenth of the tokens with the highest values, at least one; those that are not finite never."""
    flat = np.where(np.isfinite(values), values, -np.inf).reshape(len(values), -1)
    places = np.argsort(-flat, axis=1, kind="stable")[:, : max(1, round(flat.shape[1] / 10))]
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, places, True, axis=1)
    return (chosen & np.isfinite(flat)).reshape(values.shape)


def share_of(masked: Mapping[str, Bool[np.ndarray, "b _ _"]], among: Mapping[str, Bool[np.ndarray, "b _ _"]] | None = None) -> float:
    """Share of the tokens, or of those `among` them, that are hidden, over all modalities; NaN where there are none."""
    names = [name for name in masked if among is None or name in among]
    counted = [masked[name][among[name]] if among else masked[name].reshape(-1) for name in names]
    return float(np.concatenate(counted).mean()) if counted else float("nan")


def what_is_hidden(shows: Shows) -> tuple[list[page.Table | page.Prose], str]:
    """(a table of how much each strategy hides and what follows from it, the result in a sentence).

    Guided strategies, and the others beside them, are measured by how much they hide of what the first guided one is guided to.
    """
    names, every = input_names(shows), shows.shown
    guide = next((name for name, shown in every.items() if shown.guidance), "")
    top = {name: top_tenth(np.asarray(values, np.float64)) for name, values in every[guide].guidance.items()} if guide else {}
    total = {name: share_of(shown.masked) for name, shown in every.items()}
    hits = {name: share_of(shown.masked, top) for name, shown in every.items() if top}
    low, high = f"{min(total.values()):.0%}", f"{max(total.values()):.0%}"
    amount = f"hide {low if low == high else f'{low} to {high}'} of all tokens" if len(every) > 1 else f"hides {low} of all tokens"
    count = f"{len(shows.ids)} image{'s' if len(shows.ids) > 1 else ''}"
    subject = f"The {len(every)} strategies" if len(every) > 1 else next(iter(every))
    if guide:
        order = sorted(hits, key=lambda name: -hits[name])
        blind = next((name for name in order if not every[name].guidance), order[1 % len(order)])
        told = order if len(order) <= 4 else [name for name in order if name in (order[0], blind, order[-1])]
        result = (
            f"Of the tenth of the tokens that {guide} is guided to most, {', '.join(f'{name} hides {hits[name]:.0%}' for name in told)}"
            f"{f' (the other {len(order) - len(told)} lie between)' if len(told) < len(order) else ''}. {subject} {amount}, over {count}."
        )
    else:
        result = f"{subject} {amount}, over {count}. None is guided, so none looks at what is in the image."
    header = ["strategy", *(f"hidden of {name}" for name in names), "hidden of all"]
    header += [f"hidden of what {guide} is guided to"] if guide else []
    rows = []
    for name, shown in every.items():
        shares = [f"{np.mean(shown.masked[modality]):.0%}" if modality in shown.masked else "-" for modality in names]
        rows.append([name, *shares, f"{total[name]:.0%}", *([f"{hits[name]:.0%}"] if guide else [])])
    words = f"The last column counts, in each modality, the tenth of the tokens with the highest guidance of {guide}. " if guide else ""
    if guide:
        finder = max(hits, key=lambda name: hits[name] - total[name])
        words += (
            f"A strategy that does not look at the image hides about as much of them as of all tokens; {finder} hides "
            f"{100 * (hits[finder] - total[finder]):.0f} points more."
        )
    else:
        words = "The strategies share their random keys, so equal budgets hide equally many tokens of each modality."
    return [page.Table(header, rows), page.Prose(words)], result + doubt(shows)


def run(config: str, checkpoint: str | None, strategies: str | None, out: Path, images: int, split: str | None, crop: float) -> int:
    """The command; 1 where a strategy could not be shown."""
    check_output(out)
    plain, chosen = find_strategies(config, strategies)
    shows = show_strategies(plain, chosen, checkpoint, images, split, crop)
    if out.suffix.lower() == ".png":
        write(out, comparison_sheet(shows, 0))
    else:
        write(out, html(shows, chosen, checkpoint))
    print(f"{len(shows.shown)} strategies on {len(shows.ids)} image(s) in {out}")
    for name, why in shows.missing.items():
        print(f"not shown: {name}: {why}")
    return 1 if shows.missing else 0


def html(shows: Shows, chosen: Mapping[str, Mapping[str, Any]], checkpoint: str | None) -> str:
    """The page: all strategies side by side, then each by itself."""
    table, result = what_is_hidden(shows)
    sections = [page.Section("How much is hidden", table), notes(shows, chosen, checkpoint)]
    caption = "{}: grey is hidden, dark grey is not rebuilt either."
    caption += " All strategies draw from the same keys; one that is random here is one draw of many."
    sections.append(
        page.Section(
            "Strategies side by side",
            [*(page.Figure(comparison_sheet(shows, i), caption.format(name)) for i, name in enumerate(shows.ids)), *legends(shows)],
        )
    )
    for name, shown in shows.shown.items():
        blocks: list[page.Prose | page.Figure] = [page.Prose(shows.remarks[name])] if name in shows.remarks else []
        blocks += [
            page.Figure(strategy_sheet(shows, shown, modality), f"{name}, {modality}")
            for modality in input_names(shows)
            if modality in shown.masked
        ]
        sections.append(page.Section(name, blocks))
    return page.html_page("Masking strategies", sections, result)
