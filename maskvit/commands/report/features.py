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
ALIKE = 0.8  # cosine above which patches are counted as like the chosen one
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
        alike = what_is_alike([values[number] for values in cosines.values()], list(cosines))
        caption = (
            f"{one.path.name}: {alike} The first three components of the patch features as red, green and blue; the same without what a "
            "patch's place says of its feature; the cosine of every patch's feature to that of the framed one."
        )
        figure = panels.tile_grid(tiles, COLUMNS, bar=(f"cosine {low:.2f} or less", "1"))
        sections.append(page.Section(one.path.name, [page.Figure(figure, caption)]))
    about = page.Section("What is shown", [page.Table(("what", "value"), _facts(loaded, checkpoint, grid))])
    table, result = what_varies(features, content, basis, own)
    return page.html_page("Features", [page.Section("What varies", table), about, *sections], result), left_out


def what_varies(
    features: Float[np.ndarray, "b gh gw d"], content: Float[np.ndarray, "b gh gw d"], basis: components.Basis, own: components.Basis
) -> tuple[list[page.Table | page.Prose], str]:
    """(a table of the components' shares of the variance and what they mean, the result in two sentences).

    `content`: the features without what their place says; `own`: its basis.
    """
    flat, rest = (values.reshape(-1, values.shape[-1]).astype(np.float64) for values in (features, content))
    place = 1 - rest.var(axis=0).sum() / max(float(flat.var(axis=0).sum()), 1e-30)
    unit = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-30)
    alike = float((unit.mean(axis=0) ** 2).sum())  # the mean over all pairs of patches, each with itself included
    count = f"{len(features)} picture{'s' if len(features) > 1 else ''}"
    result = (
        f"Three components hold {basis.spread.sum():.0%} of what varies in the patch features of {count} after the last block. "
        f"{place:.0%} of the variance follows a patch's place, whatever is in the picture. The mean cosine of two patches is {alike:.2f}."
    )
    rows = [
        (name, *(f"{share:.0%}" for share in found.spread), f"{found.spread.sum():.0%}")
        for name, found in (("features", basis), ("without the place", own))
    ]
    words = (
        f"The colors below show {basis.spread.sum():.0%} of the variance, and {own.spread.sum():.0%} of what is left without the place. "
        "The place is a polynomial of second degree in row and column, fitted to all pictures and taken away, so that objects stand "
        "out. Components are of all patches of all pictures together, so a color means the same in each."
    )
    header = ("share of the variance", "first (red)", "second (green)", "third (blue)", "together")
    return [page.Table(header, rows), page.Prose(words)], result


def what_is_alike(cosines: Sequence[Float[np.ndarray, "gh gw"]], places: Sequence[Patch]) -> str:
    """How much of the picture is like each chosen patch, in one sentence."""
    told = []
    for values, (row, column) in zip(cosines, places, strict=True):
        others = np.delete(values.reshape(-1), row * values.shape[1] + column)
        told.append(f"{(others > ALIKE).mean():.0%} of the other patches are like patch {row},{column}")
    return f"{', '.join(told)} (cosine above {ALIKE})."


def _facts(loaded: LoadedModel, checkpoint: str, grid: tuple[int, int]) -> list[tuple[str, str]]:
    """Where the page comes from."""
    spec, encoder = first_input(loaded.model), dict(loaded.model.encoder)
    return [
        ("checkpoint", checkpoint),
        ("encoder", f"width {encoder['width']}, {encoder['depth']} blocks, {encoder['heads']} heads"),
        ("patches", f"{grid[0]} x {grid[1]} of {spec.name} alone, nothing hidden"),
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
