"""What masking strategies look at and hide, as one HTML page: a sheet per strategy and modality, and one that compares them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from maskvit.commands.report import strategies as shown_by
from maskvit.commands.report.files import write
from maskvit.commands.report.strategies import (
    Shown,
    Shows,
    find_strategies,
    input_names,
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
    sections = [notes(shows, chosen, checkpoint)]
    caption = "{}: grey is hidden, dark grey is not rebuilt either."
    caption += " All strategies draw from the same keys; one that is random here is one draw of many."
    sections.append(
        page.Section(
            "Strategies side by side",
            [page.Figure(comparison_sheet(shows, i), caption.format(name)) for i, name in enumerate(shows.ids)],
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
    return page.html_page("Masking strategies", sections, "What each looks at, and what it hides.")
