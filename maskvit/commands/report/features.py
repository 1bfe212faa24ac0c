"""What patch features tell apart: their main components as colors, and patches like a chosen one, on pictures of one's own."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped, UInt8

from maskvit.commands.report.files import add_picture_arguments, each_picture, picture_command
from maskvit.core.types import Batch
from maskvit.features import LoadedModel, first_input
from maskvit.heads.values import encoded_tokens
from maskvit.plots import components, page, panels, pictures

COLUMNS = 4
MARK = (255, 255, 255), (28, 32, 38)  # the frame around a chosen patch: inner and outer line
Patch = tuple[int, int]  # row and column


class Looked(NamedTuple):
    """A picture and the features of its patches; `stored`: values as the model was given them."""

    path: Path
    stored: Shaped[np.ndarray, "h w c"]
    features: Float[np.ndarray, "gh gw d"]


def look(loaded: LoadedModel, paths: Sequence[Path], crop: float | int) -> tuple[list[Looked], dict[Path, str]]:
    """The features of an unmasked pass over pictures as the first input alone, and the files left out with the reason."""
    spec, model = first_input(loaded.model), loaded.model
    grid = spec.grid(model.image_size)
    tokens = jax.jit(functools.partial(encoded_tokens, model), static_argnames="inputs")
    left_out: dict[Path, str] = {}
    found = []
    for path, stored in each_picture(model, paths, crop, left_out):
        features = np.asarray(tokens(loaded.params, Batch({spec.name: jnp.asarray(stored)}), inputs=(spec.name,)).patches[0])
        found.append(Looked(path, stored[0], features.reshape(*grid, -1)))
    return found, left_out


def marked(picture: pictures.Picture, place: Patch, grid: tuple[int, int]) -> UInt8[np.ndarray, "_ _ 3"]:
    """The picture, at least 160 pixels high, with a frame around the patch at `place` = (row, column)."""
    factor = -(-160 // picture.shape[0])
    picture = picture.repeat(factor, 0).repeat(factor, 1)
    side = picture.shape[0] // grid[0], picture.shape[1] // grid[1]
    top, left = place[0] * side[0], place[1] * side[1]
    for inset, color in enumerate(MARK[::-1]):
        rows, columns = slice(top + inset, top + side[0] - inset), slice(left + inset, left + side[1] - inset)
        for edge in ((rows, columns.start), (rows, columns.stop - 1), (rows.start, columns), (rows.stop - 1, columns)):
            picture[edge] = color
    return picture


def features_page(
    loaded: LoadedModel, paths: Sequence[Path], checkpoint: str, crop: float | int = 0.875, places: Sequence[Patch] = ()
) -> tuple[str, dict[Path, str]]:
    """One self-contained HTML page of pictures given as the first input modality, and the files left out with the reason.

    `places`: (row, column) of the patches that others are compared with; the center one unless given. Raises ValueError for one
    outside the grid.
    """
    spec = first_input(loaded.model)
    grid = spec.grid(loaded.model.image_size)
    places = list(dict.fromkeys(places)) or [(grid[0] // 2, grid[1] // 2)]
    for row, column in places:
        if row >= grid[0] or column >= grid[1]:
            raise ValueError(f"--patch is {row},{column}, but there are {grid[0]} x {grid[1]} patches: rows and columns count from 0")
    looked, left_out = look(loaded, paths, crop)
    features = np.stack([one.features for one in looked])
    basis = components.fit_basis(features.reshape(-1, features.shape[-1]))
    content = components.fit_place(features).removed(features)
    own = components.fit_basis(content.reshape(-1, content.shape[-1]))
    cosines = {chosen: np.stack([components.cosine(one, one[chosen]) for one in features]) for chosen in places}
    low = float(np.percentile(np.stack(list(cosines.values())), components.SHARE))
    limits = low, 1.0

    sections = []
    for number, one in enumerate(looked):
        picture = pictures.to_picture(spec, one.stored)
        tiles = [
            ("input", picture),
            ("three components", components.component_colors(basis, one.features)),
            ("without the place", components.component_colors(own, content[number])),
        ]
        for chosen, values in cosines.items():
            heat = pictures.heat_overlay(picture, values[number], limits)
            tiles.append((f"like patch {chosen[0]},{chosen[1]}", marked(heat, chosen, grid)))
        caption = (
            f"{one.path.name}: the first three components of the patch features as red, green and blue; the same without what a "
            "patch's place says of its feature; the cosine of every patch's feature to that of the framed one."
        )
        figure = panels.tile_grid(tiles, COLUMNS, bar=(f"cosine {low:.2f} or less", "1"))
        sections.append(page.Section(one.path.name, [page.Figure(figure, caption)]))
    about = page.Section("What is shown", [page.Table(("", "value"), _facts(loaded, checkpoint, grid, basis, own))])
    count = f"{len(looked)} picture{'s' if len(looked) > 1 else ''}"
    summary = (
        f"Patch features of {count} after the last block: their three main components as colors, on one basis for all pictures, and the "
        f"patches like {'a chosen one' if len(places) == 1 else f'{len(places)} chosen ones'}, on one scale."
    )
    return page.html_page("Features", [about, *sections], summary), left_out


def _facts(
    loaded: LoadedModel, checkpoint: str, grid: tuple[int, int], basis: components.Basis, own: components.Basis
) -> list[tuple[str, str]]:
    """Where the page comes from, and how its colors are made."""
    spec, encoder = first_input(loaded.model), dict(loaded.model.encoder)
    percent = lambda spread: ", ".join(f"{share:.0%}" for share in spread)  # noqa: E731
    return [
        ("checkpoint", checkpoint),
        ("encoder", f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads"),
        ("patches", f"{grid[0]} x {grid[1]} of {spec.name} alone, nothing hidden"),
        ("components", f"of all patches of all pictures together; they hold {percent(basis.spread)} of the variance"),
        (
            "without the place",
            "less a polynomial of second degree in row and column, fitted to all pictures, so that objects stand out; its own three "
            f"components hold {percent(own.spread)} of what is left",
        ),
    ]


# The command


def patch_place(text: str) -> Patch:
    """An argparse type: ROW,COLUMN, counted from 0."""
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no ROW,COLUMN, such as 3,5 (counted from 0)")
    row, column = map(int, text.split(","))
    return row, column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    add_picture_arguments(parser)
    parser.add_argument(
        "--patch", type=patch_place, action="append", default=[], metavar="ROW,COLUMN",
        help="a patch that others are compared with, counted from 0; may be given several times (the center one)",
    )  # fmt: skip


def run(checkpoint: str, images: Sequence[str], out: Path, crop: float, patch: Sequence[Patch]) -> int:
    """The command; 1 where a file was left out."""

    def write(loaded: LoadedModel, paths: Sequence[Path], name: str, share: float) -> tuple[str, Mapping[Path, str]]:
        return features_page(loaded, paths, name, share, patch)

    return picture_command(write, checkpoint, images, out, crop)
