"""What reports on pictures share: reading them one by one, and writing a file that appears whole or not at all."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from maskvit.core.arguments import check_output, number
from maskvit.data.batches import eval_batches
from maskvit.features import LoadedModel, Pictures, find_pictures, first_input, load, unreadable


def write(out: Path, content: str | bytes) -> None:
    """Write a text (as UTF-8) or bytes by way of a partial file beside it."""
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, out)


def each_picture(
    model: Any, paths: Sequence[Path], crop: float | int, left_out: dict[Path, str]
) -> Iterator[tuple[Path, Shaped[np.ndarray, "1 h w c"]]]:
    """The files that can be read and what they hold, one after the other, as the first input modality of a model is given.

    `left_out` receives the others, each with the reason. Raises ValueError, at the end, where none can be read.
    """
    spec, found = first_input(model), False
    left_out |= unreadable(paths)
    paths = [path for path in paths if path not in left_out]
    if paths:
        with eval_batches(Pictures(paths, spec.name), {spec.name: spec}, model.image_size, batch_size=1, crop=crop) as batches:
            for batch in batches:
                path = paths[int(batch["index"][0])]
                if batch["valid"][0]:
                    found = True
                    yield path, np.asarray(batch[spec.name])
                else:
                    left_out[path] = batch["reason"][0]
    if not found:
        raise ValueError(f"none of the files can be read as an image: {next(f'{p}: {why}' for p, why in left_out.items())}")


def add_picture_arguments(parser: argparse.ArgumentParser) -> None:
    """What `picture_command` takes."""
    parser.add_argument("--checkpoint", required=True, help="a run's workdir, its checkpoints directory, or one step's directory")
    parser.add_argument("--images", required=True, nargs="+", help="image files or folders of them")
    parser.add_argument("--out", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--crop", type=number(0, 1), default=0.875, help="image side over the side of the resized picture it is cut from")


def picture_command(
    page: Callable[[LoadedModel, Sequence[Path], str, float], tuple[str, Mapping[Path, str]]],
    checkpoint: str, images: Sequence[str], out: Path, crop: float,
) -> int:  # fmt: skip
    """Write the page of a checkpoint on pictures of one's own; 1 where a file was left out.

    `page`: (checkpoint, files, its name, crop) to the page and the files left out, each with the reason.
    """
    check_output(out)
    paths = find_pictures(images)
    text, left_out = page(load(checkpoint), paths, str(checkpoint), crop)
    write(out, text)
    print(f"{len(paths) - len(left_out)} picture(s) in {out}")
    for path, reason in left_out.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    return 1 if left_out else 0
