"""What masking strategies look at and hide, as one HTML page: a sheet per strategy and modality, and one that compares them."""

from __future__ import annotations

from pathlib import Path

from maskvit.commands.report.files import write
from maskvit.commands.report.strategies import (
    Shown,
    Shows,
    add_arguments,
    find_strategies,
    input_names,
    modality_pictures,
    notes,
    show_strategies,
)
from maskvit.core.arguments import check_output
from maskvit.plots import page, panels, pictures

__all__ = ["add_arguments", "run"]


def strategy_sheet(shows: Shows, shown: Shown, modality: str) -> bytes:
    """One strategy on one modality as PNG: image, guidance, loss weight, hidden tokens, and the attention of every head."""
    heads = shown.heads[modality].shape[1] if modality in shown.heads else 0
    columns = ["image", *(["guidance"] if shown.guidance else []), *(["loss weight"] if shown.weights else []), "visible"]
    columns += [f"head {head}" for head in range(heads)]
    rows = []
    for index, picture in enumerate(modality_pictures(shows, shown, modality)):
        masked = shown.masked[modality][index]
        tiles = [(picture, "")]
        for maps in (shown.guidance, shown.weights):
            if maps:
                values = maps[modality][index]
                tiles.append((pictures.heat_overlay(picture, values), f"{values.min():.3g} to {values.max():.3g}"))
        tiles.append((pictures.mask_overlay(picture, masked), f"{masked.sum()} of {masked.size} hidden"))
        tiles += [(pictures.heat_overlay(picture, shown.heads[modality][index, head]), "") for head in range(heads)]
        rows.append((shows.ids[index], tiles))
    return panels.labeled_grid(columns, rows, heat=("least", "most (each tile for itself)") if shown.guidance else None)


def comparison_sheet(shows: Shows, index: int) -> bytes:
    """What every strategy leaves visible of one image, as PNG: a row per modality, a column per strategy."""
    rows = []
    first = next(iter(shows.shown.values()))
    for modality in input_names(shows):
        picture = modality_pictures(shows, first, modality)[index]
        tiles: list[panels.Tile | None] = [(picture, "")]
        for shown in shows.shown.values():
            masked = shown.masked.get(modality)
            tiles.append(
                None
                if masked is None
                else (pictures.mask_overlay(picture, masked[index]), f"{masked[index].sum()} of {masked[index].size} hidden")
            )
        rows.append((modality, tiles))
    return panels.labeled_grid(["image", *(name.replace("_", "\n") for name in shows.shown)], rows)


def run(config: str, checkpoint: str | None, strategies: str | None, out: Path, images: int, split: str | None, crop: float) -> int:
    """The command; 1 where a strategy could not be shown."""
    check_output(out)
    plain, chosen = find_strategies(config, strategies)
    shows = show_strategies(plain, chosen, checkpoint, images, split, crop)
    sections = [notes(shows, chosen, checkpoint)]
    caption = "{}: grey is hidden. All strategies draw from the same keys; one that is random here is one draw of many."
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
    write(out, page.html_page("Masking strategies", sections, "What each looks at, and what it hides."))
    print(f"{len(shows.shown)} strategies on {len(shows.ids)} image(s) in {out}")
    for name, why in shows.missing.items():
        print(f"not shown: {name}: {why}")
    return 1 if shows.missing else 0
