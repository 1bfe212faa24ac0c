"""Guidance as loss weight, as one HTML page: from the raw map to exp(g / tau), several temperatures, and map sets side by side.

A map set is a strategy with a guidance source (its own attention, another source of the table) or a folder of stored maps.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from maskvit.commands.report import strategies as shown_by
from maskvit.commands.report.files import write
from maskvit.commands.report.strategies import Shows, doubt, find_strategies, input_names, modality_pictures, notes, show_strategies
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


def rank_correlation(one: Float[np.ndarray, "b gh gw"], other: Float[np.ndarray, "b gh gw"]) -> float:
    """Spearman's rank correlation of two maps' tokens, mean over images; images with a constant map are left out (NaN where all are)."""
    from scipy.stats import rankdata

    found = []
    for pair in zip(one, other, strict=True):
        ranks = np.stack([rankdata(values.reshape(-1)) for values in pair])
        if (np.ptp(ranks, axis=1) > 0).all():
            found.append(float(np.corrcoef(ranks)[0, 1]))
    return float(np.mean(found)) if found else float("nan")


def weight_on_top(weights: Float[np.ndarray, "b gh gw"]) -> float:
    """Share of an image's loss weight on the tenth of its tokens that weighs most, mean over images; even weights give about a tenth."""
    flat = np.sort(weights.reshape(len(weights), -1), axis=1)
    return float((flat[:, -max(1, round(flat.shape[1] / 10)) :].sum(axis=1) / flat.sum(axis=1)).mean())


def what_weighs(maps: Mapping[str, Float[np.ndarray, "b gh gw"]], modality: str, tau: float) -> tuple[list[page.Table | page.Prose], str]:
    """(tables of how far map sets agree and how much they weigh on, with what follows from them; the result in two sentences)."""
    weights = {name: weights_of(np.asarray(values, np.float32), tau) for name, values in maps.items()}
    top = {name: weight_on_top(values) for name, values in weights.items()}
    order = sorted(top, key=lambda name: -top[name])
    told = f"{top[order[0]]:.0%}" if len(order) == 1 else f"{top[order[-1]]:.0%} ({order[-1]}) to {top[order[0]]:.0%} ({order[0]})"
    size = next(iter(weights.values()))[0].size
    even = max(1, round(size / 10)) / size
    loads = f"At tau = {tau:g} the tenth of the {modality} tokens that weighs most has {told} of the loss weight"
    loads += f"; even weights would give it {even:.0%}."
    rows = [(name, *(f"{f(values):.2f}" for f in (np.mean, np.median, np.max)), f"{top[name]:.0%}") for name, values in weights.items()]
    blocks: list[page.Table | page.Prose] = [page.Table(("map set", "mean weight", "median", "largest", "weight on the top tenth"), rows)]
    blocks.append(page.Prose("The background weighs 1, so a mean far above 1 trains most tokens harder, and a median near 1 only few."))
    pairs = {
        (one, other): rank_correlation(maps[one], maps[other])
        for one, other in itertools.combinations(maps, 2)
        if maps[one].shape == maps[other].shape
    }
    known = {pair: value for pair, value in pairs.items() if np.isfinite(value)}
    if not known:
        alone = "There is one map set, so nothing is compared." if len(maps) == 1 else "No two map sets can be compared."
        return blocks, f"{loads} {alone}"
    least, most = min(known, key=lambda pair: known[pair]), max(known, key=lambda pair: known[pair])
    agree = "largely agree" if known[least] > 0.7 else "agree little" if known[most] < 0.3 else "agree in part"
    found = f"rank correlation {known[most]:.2f}"
    if len(known) > 1:
        found = f"rank correlations from {known[least]:.2f} ({' and '.join(least)}) to {known[most]:.2f} ({' and '.join(most)})"
    ranks = f"{f'{len(maps)} map sets' if len(maps) > 2 else ' and '.join(maps)} {agree} on which {modality} tokens matter: {found}."
    table = [
        (one, *("1" if one == other else f"{value:.2f}" if np.isfinite(value) else "-"
                for other in maps for value in [pairs.get((one, other), pairs.get((other, one), float("nan")))]))
        for one in maps
    ]  # fmt: skip
    words = "Spearman's rank correlation, mean over images: 1 is the same order of tokens, 0 none in common. Sets that agree weigh alike."
    return [page.Table(("rank correlation", *maps), table), page.Prose(words), *blocks], f"{ranks} {loads}"


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
    sets = {name: shown.guidance[modality] for name, shown in shows.shown.items() if modality in shown.guidance}
    table, result = what_weighs(sets, modality, middle)
    largest = ", ".join(f"{np.exp(1 / one):.2f} at tau = {one:g}" for one in sorted(tau))
    sections = [
        page.Section("How maps agree and weigh", table),
        notes(shows, sources, checkpoint),
        page.Section(
            "Map sets side by side",
            [page.Figure(map_sets_sheet(shows, modality, middle), f"Loss weights exp(g / {middle:g}) over {modality}, one color scale.")],
        ),
        page.Section(
            "Temperature",
            [
                page.Prose(f"The most important token weighs {largest} times the background."),
                page.Figure(
                    schedule_plot(tau, ends), "Constant temperatures, and one that goes from the first to the second on half a cosine."
                )
            ],
        ),
    ]
    for name in shows.shown:
        caption = f"{name} on {modality}, every tile on the color scale of the weights. {words}"
        sections.append(page.Section(name, [page.Figure(weight_sheet(shows, name, modality, tau), caption)]))
    write(out, page.html_page("Guidance as loss weight", sections, result + doubt(shows)))
    print(f"{len(shows.shown)} map set(s) on {len(shows.ids)} image(s) in {out}")
    for name, why in shows.missing.items():
        print(f"not shown: {name}: {why}")
    return 1 if shows.missing else 0
