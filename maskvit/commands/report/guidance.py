"""Guidance as loss weight, as one HTML page: from the raw map to exp(g / tau), several temperatures, and map sets side by side.

A map set is a strategy with a guidance source (its own attention, another source of the table) or a folder of stored maps.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from maskvit.commands.report import strategies as shown_by
from maskvit.commands.report.files import write
from maskvit.commands.report.strategies import Shows, find_strategies, input_names, modality_pictures, notes, show_strategies
from maskvit.commands.sweep.cells import overrides
from maskvit.core.arguments import check_output, number
from maskvit.core.types import TokenLayout
from maskvit.losses.weights import cosine_between, guidance_weights, normalize_guidance
from maskvit.plots import curves, page, panels, pictures

POINTS = 101  # of the schedule's curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    shown_by.add_arguments(parser)
    parser.add_argument("--maps", action="append", default=[], metavar="NAME=FOLDER", help="a folder of stored maps; repeatable")
    parser.add_argument("--tau", type=number(0), nargs="+", default=(0.7, 0.75, 0.8), help="temperatures")
    parser.add_argument(
        "--schedule", type=number(0), nargs=2, default=None, metavar=("FIRST", "LAST"), help="the config's pair, else the ends of --tau"
    )
    parser.add_argument("--modality", default=None, help="input modality to show; the first unless given")


def stored_maps(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """ "name=folder" to overrides that read the maps of that folder. Raises ValueError for other text."""
    found: dict[str, dict[str, Any]] = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"--maps {text!r} is not of the form name=folder")
        found[name] = {"objective.guidance": dict(name="stored", path=folder), "objective.scores": dict(name="attention_high")}
    return found


def one_per_source(config: Mapping[str, Any], strategies: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The strategies with a guidance source; of those with the same source the first, which stands for its maps."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, changes in strategies.items():
        guidance = overrides(config, changes, f"strategy {name!r}")["objective"].get("guidance")
        if guidance:
            found.setdefault(repr(sorted(guidance.items())), (name, dict(changes)))
    return dict(found.values())


def weights_of(values: Float[np.ndarray, "b gh gw"], tau: float | None) -> Float[np.ndarray, "b gh gw"]:
    """The maps normalized to [0, 1] per image, or, with `tau`, the loss weights exp(g / tau)."""
    layout = TokenLayout(("map",), (values.shape[1:],))
    flat = jnp.asarray(values.reshape(len(values), -1))
    result = normalize_guidance(flat, layout) if tau is None else guidance_weights(flat, layout, tau)
    return np.asarray(result).reshape(values.shape)


def weight_sheet(shows: Shows, name: str, modality: str, taus: Sequence[float]) -> bytes:
    """One map set as PNG, every tile on one color scale: raw, normalized, and for every temperature g / tau and exp(g / tau)."""
    shown = shows.shown[name]
    raw = shown.guidance[modality]
    unit = weights_of(raw, None)
    steps = {"raw": raw, "g in [0, 1]": unit}
    for tau in taus:
        steps |= {f"g / {tau:g}": unit / tau, f"exp(g / {tau:g})": weights_of(raw, tau)}
    limits = (0.0, float(np.exp(1 / min(taus))))
    rows = []
    for index, picture in enumerate(modality_pictures(shows, shown, modality)):
        tiles = [(picture, "")]
        for values in steps.values():
            here = values[index]
            tiles.append((pictures.heat_map(here, picture.shape[:2], limits), f"{here.min():.3g} to {here.max():.3g}"))
        rows.append((shows.ids[index], tiles))
    return panels.labeled_grid(["image", *steps], rows, heat=("0", f"{limits[1]:.2f}, all tiles"))


def map_sets_sheet(shows: Shows, modality: str, tau: float) -> bytes:
    """All map sets as PNG, a column each: the weights exp(g / tau) over the image on one scale."""
    limits = (1.0, float(np.exp(1 / tau)))
    rows = []
    given = modality_pictures(shows, next(iter(shows.shown.values())), modality)
    for index, picture in enumerate(given):
        tiles: list[panels.Tile | None] = [(picture, "")]
        for shown in shows.shown.values():
            weight = weights_of(shown.guidance[modality], tau)[index]
            tiles.append((pictures.heat_overlay(picture, weight, limits), f"mean {weight.mean():.2f}"))
        rows.append((shows.ids[index], tiles))
    return panels.labeled_grid(["image", *(n.replace("_", "\n") for n in shows.shown)], rows, heat=("1", f"{limits[1]:.2f}, all tiles"))


def schedule_plot(taus: Sequence[float], ends: tuple[float, float]) -> bytes:
    """Temperatures and the largest weight over a run, constant and on half a cosine, as PNG."""
    share = np.linspace(0, 1, POINTS)
    series: Mapping[str, np.ndarray] = {f"constant {tau:g}": np.full(POINTS, tau) for tau in taus} | {
        f"half cosine, {ends[0]:g} to {ends[1]:g}": np.array([cosine_between(*ends, jnp.asarray(x)) for x in share])
    }
    panels = {
        "tau": {label: [(share, values)] for label, values in series.items()},
        "largest weight exp(1 / tau)": {label: [(share, np.exp(1 / values))] for label, values in series.items()},
    }
    return curves.line_panels(panels, "share of the run")


def run(
    config: str, checkpoint: str | None, strategies: str | None, out: Path, images: int, split: str | None, crop: float,
    maps: Sequence[str], tau: Sequence[float], schedule: Sequence[float] | None, modality: str | None,
) -> int:  # fmt: skip
    """The command; 1 where a map set could not be shown."""
    check_output(out)
    plain, chosen = find_strategies(config, strategies)
    sources = one_per_source(plain, chosen) | stored_maps(maps)
    if not sources:
        raise ValueError("nothing to show: no strategy has a guidance source; give --maps NAME=FOLDER or a config with objective.guidance")
    shows = show_strategies(plain, sources, checkpoint, images, split, crop)
    modality = modality or input_names(shows)[0]
    if modality not in input_names(shows):
        raise ValueError(f"--modality is {modality!r}; the inputs: {', '.join(input_names(shows))}")
    pair = (plain["objective"].get("loss_weight") or {}).get("tau")
    ends = tuple(schedule or (pair if isinstance(pair, (list, tuple)) else (max(tau), min(tau))))
    middle = sorted(tau)[len(tau) // 2]
    words = "g is the map normalized to [0, 1] per image, so the background weighs exactly 1 and the most important token exp(1 / tau)."
    sections = [
        notes(shows, sources, checkpoint),
        page.Section(
            "Map sets side by side",
            [page.Figure(map_sets_sheet(shows, modality, middle), f"Loss weights exp(g / {middle:g}) over {modality}, one color scale.")],
        ),
        page.Section(
            "Temperature",
            [
                page.Figure(
                    schedule_plot(tau, ends), "Constant temperatures, and one that goes from the first to the second on half a cosine."
                )
            ],
        ),
    ]
    for name in shows.shown:
        caption = f"{name} on {modality}, every tile on the color scale of the weights. {words}"
        sections.append(page.Section(name, [page.Figure(weight_sheet(shows, name, modality, tau), caption)]))
    write(out, page.html_page("Guidance as loss weight", sections, "From the raw map to the weight of a token's loss."))
    print(f"{len(shows.shown)} map set(s) on {len(shows.ids)} image(s) in {out}")
    for name, why in shows.missing.items():
        print(f"not shown: {name}: {why}")
    return 1 if shows.missing else 0
