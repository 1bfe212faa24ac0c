"""Tiny archives in the layout of published data sets, and what reads the data sets packed from them."""

from __future__ import annotations

import pathlib

import numpy as np
from PIL import Image

from maskvit.core.modalities import RGB, Modality, parse_modalities
from maskvit.data import open_source
from maskvit.data.builders import prepare
from maskvit.data.builders.__main__ import main

COLOR = parse_modalities({"rgb": RGB})


def picture(path: pathlib.Path, value: int = 0, size: tuple[int, int] = (8, 10)) -> None:
    """A colored picture of one value, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def array(path: pathlib.Path, values: np.ndarray) -> None:
    """An array as a picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def packed(builder: str, root: pathlib.Path, modalities: dict[str, Modality] | None = None, split: str = "train", **options):
    """The split of the archive at `root`, packed beside it unless it is already."""
    data_dir = str(root.parent / f"tfds_{root.name}")
    directory = prepare(builder, data_dir, root=str(root), **options)
    return open_source("tfds", COLOR if modalities is None else modalities, data_dir=directory, split=split)


def labels(source) -> dict[str, str]:
    """Id -> class by name."""
    return {source[i]["id"]: source.label_names[source[i]["label"]] for i in range(len(source))}


def told(capsys, *words: str) -> str:
    """What the command says on standard error, which must fail."""
    assert main(list(words)) == 2
    return capsys.readouterr().err
