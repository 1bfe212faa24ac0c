"""What a fine-tuned model says of a folder of pictures.

    python -m maskvit predict --checkpoint RUN --images DIR --out DIR [--weights ema] [--crop pad] [--top 5]

The folder `--out` then holds `index.html`, a page of the first pictures, `about.json`, how the answers were made, and of a
    classification  predictions.csv: a line per file, its likeliest classes with their probabilities
    segmentation    ids/FILE.png, the number of a class per pixel; overlays/FILE.png; classes.csv, names and colors
    regression      values/FILE.npy, float32 "h w c" in the unit that about.json states; maps/FILE.png, the same in colors

Answers per pixel are at each picture's own size, but where --crop is a number they are of the middle, at the model's size.
"""

from __future__ import annotations

import argparse
import collections
import csv
import functools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped

from maskvit.core.arguments import make_folder, number, whole
from maskvit.core.errors import add_debug, run_command
from maskvit.core.modalities import Modality
from maskvit.core.patches import resampling_matrix
from maskvit.core.types import Batch
from maskvit.data.augment.dense import fitting_size
from maskvit.data.batches import eval_batches
from maskvit.evaluators.windows import Round, read_out
from maskvit.features import WEIGHTS, LoadedModel, Pictures, first_input, load, readable, tell_left_out
from maskvit.plots import page, panels, pictures
from maskvit.plots.answers import class_legend, class_name, class_overlay
from maskvit.sharding import make_mesh, place_batch

Crop = float | str | None

ON_PAGE = {False: 24, True: 12}  # pictures on the page, of answers per picture and per pixel
BATCH = {False: 64, True: 8}
SIDES = 128  # stored sizes are rounded up to multiples of it: pictures of many sizes share few compiled programs


class Answer(NamedTuple):
    """What is said of one picture.

    `place`: its number among the files; `picture`: what is shown of it, stored values "h w c"; `said`: probabilities "k", ids "h w" or
    values "h w c" (in meters where the unit is known), the latter two of the size of `picture`.
    """

    place: int
    picture: Shaped[np.ndarray, "h w c"]
    said: Shaped[np.ndarray, "*s"]


# Answers


def answers(loaded: LoadedModel, paths: Sequence[Path], batch_size: int, crop: Crop) -> Iterator[tuple[list[Answer], dict[int, str]]]:
    """The answers of a batch of files after the other, and the files that could not be used, with the reason.

    `crop` as in `maskvit.data.batches.eval_batches`; "pad" and None show whole pictures.
    """
    spec, mesh, task = first_input(loaded.model), make_mesh(), loaded.check_fine_tuned()
    batch_size = math.ceil(batch_size / mesh.size) * mesh.size
    stored = task.dense and crop in ("pad", None)
    settings: dict[str, Any] = dict(batch_size=batch_size, crop=crop, originals=(spec.name,) if stored else ())
    with eval_batches(Pictures(paths, spec.name), {spec.name: spec}, loaded.model.image_size, **settings) as batches:
        for batch in batches:
            values = place_batch({spec.name: batch[spec.name]}, mesh).values
            rows = np.flatnonzero(batch["valid"]).tolist()
            if stored:
                outputs = _outputs(loaded.objective, loaded.params, loaded.state, values)
                shown = [np.asarray(batch[f"original/{spec.name}"][row]) for row in rows]
                said = [_at_stored_size(loaded, outputs, row, picture.shape[:2], crop) for row, picture in zip(rows, shown, strict=True)]
            else:
                predicted = loaded.predict(values)
                key = next(name for name in ("probabilities", "ids", "meters", "values") if name in predicted)
                shown, said = [batch[spec.name][row] for row in rows], [predicted[key][row] for row in rows]
            bad = {int(i): reason for i, reason in zip(batch["index"], batch["reason"], strict=True) if reason}
            yield [Answer(int(batch["index"][row]), *pair) for row, *pair in zip(rows, shown, said, strict=True)], bad


@functools.partial(jax.jit, static_argnums=0)
def _outputs(objective: Any, params: Any, state: Any, values: Any) -> Float[Array, "b h w k"]:
    """Logits, or stored values, of every pixel at the model's size."""
    return next(iter(objective.answers(params, state, values, tuple(values)).values()))


@functools.partial(jax.jit, static_argnums=4)
def _resampled(
    outputs: Float[Array, "b h w k"], row: Any, rows: Float[Array, "u h"], columns: Float[Array, "p w"], as_ids: bool
) -> Num[Array, "u p *k"]:
    """Of one picture: values, or the class of the greatest logit, where rows and columns are resampled."""
    one = jax.lax.dynamic_index_in_dim(outputs, row)
    what = Round(Batch({}), rows[None, None, None], columns[None, None, None], jnp.zeros(()), None)
    return read_out(one, what, lambda x: x[:, 0].argmax(axis=-1).astype(jnp.int32) if as_ids else x[:, 0])[0]


def _at_stored_size(
    loaded: LoadedModel, outputs: Float[Array, "b h w k"], row: int, size: tuple[int, int], crop: Crop
) -> Num[np.ndarray, "u p *k"]:
    """The answer to picture `row`, resampled bilinearly to its own `size`; the padded part is cut off first."""
    image_size, spec = loaded.model.image_size, loaded.model.modality(loaded.objective.task.target)
    part = image_size if crop is None else fitting_size(*size, image_size)
    matrices = []
    for seen, whole_side, side in zip(part, image_size, size, strict=True):
        matrix = np.zeros((-(-side // SIDES) * SIDES, whole_side), np.float32)
        matrix[:side, :seen] = resampling_matrix(seen, side, "bilinear")
        matrices.append(matrix)
    found = np.asarray(_resampled(outputs, row, *matrices, spec.kind == "categorical"))[: size[0], : size[1]]
    unit = spec.metres_per_count if spec.kind == "continuous" else None
    return found if unit is None else found * np.float32(unit)


# What is written


def write_classes(out: Path, names: Sequence[str], files: Sequence[str], told: Sequence[Sequence[tuple[str, float]]]) -> None:
    """predictions.csv: per file its likeliest classes with their probabilities."""
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        count = len(told[0]) if told else 0
        table.writerow(["file", "class", "probability", *(f"{key}_{i}" for i in range(2, count + 1) for key in ("class", "probability"))])
        for name, classes in zip(files, told, strict=True):
            table.writerow([name, *(cell for label, share in classes for cell in (label, f"{share:.6f}"))])


def write_map(out: Path, name: str, answer: Answer, spec: Modality, shown: Modality) -> None:
    """The files of one picture's answers per pixel."""
    from PIL import Image

    folders = ("ids", "overlays") if spec.kind == "categorical" else ("values", "maps")
    exact, colored = (out / folder / name for folder in folders)
    for path in (exact, colored):
        path.parent.mkdir(parents=True, exist_ok=True)
    if spec.kind == "categorical":
        dtype = np.uint8 if spec.num_classes <= 256 else np.uint16
        Image.fromarray(answer.said.astype(dtype)).save(f"{exact}.png")
    else:
        np.save(f"{exact}.npy", answer.said)
    Path(f"{colored}.png").write_bytes(pictures.png_bytes(colored_map(answer, spec, shown)))


def colored_map(answer: Answer, spec: Modality, shown: Modality) -> pictures.Picture:
    """Classes over the picture, or values in colors of their own scale."""
    if spec.kind == "categorical":
        return class_overlay(pictures.to_picture(shown, answer.picture), answer.said, spec.num_classes)
    return pictures.to_picture(spec, answer.said)


def write_class_list(out: Path, names: Sequence[str]) -> None:
    """classes.csv: number, name and color of every class."""
    with open(out / "classes.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "class", "red", "green", "blue"])
        table.writerows(
            [i, name, *map(int, color)] for i, (name, color) in enumerate(zip(names, pictures.palette(len(names)), strict=True))
        )


# The page


def class_result(told: Sequence[Sequence[tuple[str, float]]]) -> str:
    """Which classes are answered most, and how sure the model is, in two sentences."""
    best = [classes[0] for classes in told]
    counts = collections.Counter(name for name, _ in best).most_common()
    named = ", ".join(f"{name} ({count})" for name, count in counts[:3])
    unsure = sum(share < 0.5 for _, share in best)
    first = f"The answer is {counts[0][0]} for all {len(told)} pictures." if len(counts) == 1 and len(told) > 1 else (
        f"{len(told)} picture{'s' if len(told) > 1 else ''}, {len(counts)} class{'es' if len(counts) > 1 else ''} answered"
        f"{', most often' if len(counts) > 3 else ''}: {named}."
    )  # fmt: skip
    middle = float(np.median([share for _, share in best]))
    return f"{first} Half of the answers have a probability of {middle:.0%} or more; {unsure} of {len(told)} are below 50%."


def pixel_result(pixels: Mapping[int, int], names: Sequence[str]) -> str:
    """Which classes the pixels of all pictures are given, in a sentence. `pixels`: how many, by class id."""
    order = sorted(pixels, key=lambda i: -pixels[i])
    total = sum(pixels.values())
    told = ", ".join(f"{class_name(i, names)} {pixels[i] / total:.0%}" for i in order[:3])
    found = f"{len(order)} of {len(names)} classes are found"
    return f"{found}{'; most pixels are' if len(order) > 3 else ':'} {told}."


def value_result(middles: Sequence[float], name: str, unit: str) -> str:
    """Where the values lie, in a sentence. `middles`: the median of every picture; those that are not finite are left out."""
    known = sorted(value for value in middles if math.isfinite(value))
    if not known:
        return f"No picture has a finite value of {name}."
    if len(known) == 1:
        return f"The median value of {name} is {known[0]:.3g} ({unit})."
    lowest, highest = known[0], known[-1]
    middle = float(np.median(known))
    return f"The median value of {name} in a picture goes from {lowest:.3g} to {highest:.3g}; half of them are above {middle:.3g} ({unit})."


def class_sections(
    first: Sequence[Answer], files: Sequence[str], told: Sequence[Sequence[tuple[str, float]]], shown: Modality
) -> list[page.Section]:
    """The first pictures as the model sees them with their likeliest class, and a table of all that is told of them."""
    tiles = []
    for answer, ((name, share), *_) in zip(first, told, strict=False):
        label = f"{name[:16]} {share:.0%}"
        tiles.append((label, pictures.to_picture(shown, answer.picture)))
    figure = page.Figure(panels.tile_grid(tiles, 6), "What the model sees of the first pictures, its answer and the probability of it.")
    header = ["file", "class", "probability", *(["next best"] if len(told[0]) > 1 else [])]
    rows = []
    for name, ((best, share), *others) in zip(files, told[: len(first)], strict=False):
        rest = [", ".join(f"{label} {probability:.1%}" for label, probability in others)] if others else []
        rows.append([name, best, f"{share:.1%}", *rest])
    words = f"The first {len(rows)} of {len(told)} answers; predictions.csv beside this page has all." if len(rows) < len(told) else (
        "The likeliest class of every picture, and those that follow it."
    )  # fmt: skip
    return [page.Section("Pictures", [figure]), page.Section("Answers", [page.Prose(words), page.Table(header, rows)])]


def map_sections(
    first: Sequence[Answer], files: Sequence[str], names: Sequence[str], spec: Modality, shown: Modality, unit: str
) -> list[page.Section]:
    """Each of the first pictures beside its answer."""
    sections = []
    for answer in first:
        tiles = [(pictures.to_picture(shown, answer.picture), ""), (colored_map(answer, spec, shown), "")]
        blocks: list[Any] = []
        if spec.kind == "categorical":
            ids, counts = np.unique(answer.said, return_counts=True)
            order = np.argsort(-counts, kind="stable")
            caption = ", ".join(f"{class_name(int(ids[i]), names)} {counts[i] / answer.said.size:.1%}" for i in order[:8])
            blocks.append(page.Figure(class_legend([answer.said], spec, names), "The classes found."))
        else:
            low, high = pictures.value_range(spec, answer.said)
            caption = f"{spec.name} in {unit}: {low:.4g} (dark) to {high:.4g} (light)"
        grid = panels.labeled_grid((shown.name, spec.name), [("", tiles)], side=224)
        sections.append(page.Section(files[answer.place], [page.Figure(grid, caption), *blocks]))
    return sections


def write_page(out: Path, about: Mapping[str, Any], sections: Sequence[page.Section], count: int, shown: int, result: str) -> None:
    """index.html and about.json. `result`: what comes first; of `count` pictures, `shown` are on the page."""
    facts = page.Section("How", [page.Table(("setting", "value"), [(key.replace("_", " "), str(value)) for key, value in about.items()])])
    summary = f"{result} " + (
        f"This page shows the first {shown} of {count} pictures, the other files in this folder hold all."
        if shown < count
        else f"This page shows {'all ' if count > 1 else 'the '}{f'{count} pictures' if count > 1 else 'one picture'}."
    )
    text = page.html_page(f"Answers to {count} picture{'s' if count > 1 else ''}", [*sections, facts], summary)
    for name, content in (("about.json", json.dumps(about, indent=2) + "\n"), ("index.html", text)):
        partial = out / f"{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, out / name)


# The command


def parse_crop(text: str) -> float | str:
    """An argparse type: "pad", "none", or a share above 0 and at most 1."""
    if text in ("pad", "none"):
        return text
    try:
        return number(0, 1)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}; or give pad or none") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; the exit status is 1 where a file was left out, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(
        prog="python -m maskvit predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="a fine-tuned run's workdir, WORKDIR/best, or one step's directory")
    parser.add_argument("--images", required=True, type=Path, help="folder of pictures; those in folders below it count too")
    parser.add_argument("--out", required=True, type=Path, help="folder to write to: a new one, or an empty one")
    parser.add_argument("--weights", choices=WEIGHTS, default="params", help="the run's weights, or the average that it kept of them")
    parser.add_argument("--batch_size", type=whole(), default=None, help="pictures at once, over all devices (64; of maps 8)")
    parser.add_argument(
        "--crop", type=parse_crop, default=None,
        help="image side over the side of the resized picture whose middle is shown; pad: whole pictures, padded; none: whole pictures, "
        "squeezed (0.875; of maps pad)",
    )  # fmt: skip
    parser.add_argument("--top", type=whole(), default=None, help="classes told per picture (5, or all where there are fewer)")
    add_debug(parser)
    arguments = vars(parser.parse_args(argv))
    debug = arguments.pop("debug")
    return run_command(lambda: predict_folder(**arguments), debug)


def predict_folder(
    checkpoint: str, images: Path, out: Path, weights: str, batch_size: int | None, crop: float | str | None, top: int | None
) -> int:
    """Do what the flags say; the exit status."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"--out is {str(out)!r}, which is there already: give a new folder")
    paths, left_out = readable(images)
    loaded = load(checkpoint, weights)
    task, shown = loaded.check_fine_tuned(), first_input(loaded.model)
    names, specs = loaded.class_names, {spec.name: spec for spec in loaded.model.modalities}
    if top is not None and (task.dense or top > len(names)):
        raise ValueError(f"--top is {top}, but " + ("the answers are maps" if task.dense else f"the model knows {len(names)} classes"))
    if task.dense and (others := [name for name in loaded.model.read_from if name != shown.name]):
        raise ValueError(f"pictures are read as the first input, {shown.name!r}, but the head also reads {others[0]!r}")
    make_folder(out)
    about: dict[str, Any] = dict(
        checkpoint=str(checkpoint), weights=weights, task=type(task).__name__.lower(), input=shown.name,
        image_size=list(loaded.model.image_size), crop=crop or ("pad" if task.dense else 0.875),
    )  # fmt: skip
    spec = specs[task.target] if task.dense else None
    unit = ""
    if spec is not None and spec.kind == "continuous":
        unit = "stored units of its config" if spec.metres_per_count is None else "meters"
        about["unit"] = unit

    from tqdm import tqdm

    files: list[str] = []
    first: list[Answer] = []
    told: list[list[tuple[str, float]]] = []
    pixels: collections.Counter[int] = collections.Counter()
    middles: list[float] = []
    with tqdm(total=len(paths), desc="predict", unit="image", disable=None) as bar:
        for found, bad in answers(loaded, paths, batch_size or BATCH[task.dense], None if crop == "none" else about["crop"]):
            left_out |= {paths[index]: reason for index, reason in bad.items()}
            for answer in found:
                files.append(paths[answer.place].relative_to(images).as_posix())
                if spec is None:
                    order = np.argsort(-answer.said, kind="stable")[: top or 5]
                    told.append([(names[i], float(answer.said[i])) for i in order])
                else:
                    write_map(out, files[-1], answer, spec, shown)
                    if spec.kind == "categorical":
                        pixels.update(dict(zip(*(part.tolist() for part in np.unique(answer.said, return_counts=True)), strict=True)))
                    else:
                        middles.append(float(np.median(answer.said)))
                if len(first) < ON_PAGE[task.dense]:
                    first.append(answer._replace(place=len(files) - 1))
            bar.update(len(found) + len(bad))
    if not files:
        raise ValueError(f"none of the pictures below {images} can be read; the first: {next(iter(left_out.values()))}")
    if spec is None:
        write_classes(out, names, files, told)
        sections, result = class_sections(first, files, told, shown), class_result(told)
    else:
        if spec.kind == "categorical":
            write_class_list(out, names)
        sections = map_sections(first, files, names, spec, shown, unit)
        result = pixel_result(pixels, names) if spec.kind == "categorical" else value_result(middles, spec.name, unit)
    write_page(out, about, sections, len(files), len(first), result)
    print(f"{len(files)} picture(s) answered: open {out / 'index.html'}")
    return tell_left_out(left_out)


if __name__ == "__main__":
    sys.exit(main())
