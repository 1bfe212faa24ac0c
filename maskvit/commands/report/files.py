"""Writing a report: a file appears whole or not at all."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from maskvit.core.arguments import check_output, number
from maskvit.features import LoadedModel, find_pictures, load


def write(out: Path, text: str) -> None:
    """Write `text` by way of a partial file beside it."""
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)


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
