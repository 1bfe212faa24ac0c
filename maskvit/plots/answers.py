"""What a model says of pictures beside what is true."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Integer, Shaped, UInt8

from maskvit.core.modalities import Modality
from maskvit.plots.panels import _Sheet, labeled_grid
from maskvit.plots.pictures import Picture, palette, to_picture


def answers_picture(
    inputs: Mapping[str, Shaped[np.ndarray, "b h w ..."]],
    target: Shaped[np.ndarray, "b h w ..."],
    answer: Shaped[np.ndarray, "b h w ..."],
    modalities: Mapping[str, Modality],
    name: str,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """One row per example: inputs, the true values of the modality `name`, the answer on the same scale of colors; stored values or ids."""
    from PIL import Image

    rows = []
    for i in range(len(target)):
        shown = [to_picture(modalities[key], values[i]) for key, values in inputs.items()]
        shown += [to_picture(modalities[name], target[i]), to_picture(modalities[name], answer[i], like=target[i])]
        rows.append((str(i + 1), [(picture, "") for picture in shown]))
    page = labeled_grid([*inputs, name, "answer"], rows, side=160)
    return np.asarray(Image.open(io.BytesIO(page)).convert("RGB"))


def class_overlay(picture: Picture, ids: Integer[np.ndarray, "h w"], num_classes: int) -> Picture:
    """The colors of the classes (`palette`) over a picture of the same size, half of each."""
    colors = palette(num_classes)[ids].astype(np.uint16)
    return ((picture.astype(np.uint16) + colors) // 2).astype(np.uint8)


def class_name(number: int, names: Sequence[str]) -> str:
    """The name of a class id; "class 3" where it has none, or has its number for a name."""
    return names[number] if number < len(names) and names[number] != str(number) else f"class {number}"


def class_legend(maps: Iterable[Integer[np.ndarray, "_ _"]], modality: Modality, names: Sequence[str]) -> bytes:
    """The legend of the classes that maps of one categorical modality show, as PNG; `names`: of the ids 0, 1, ..., where they have any."""
    ids = sorted({number for one in maps for number in np.unique(one).tolist()} - {-1 if modality.missing is None else modality.missing})
    colors = palette(modality.num_classes)
    return legend([(class_name(number, names), colors[number]) for number in ids if 0 <= number < modality.num_classes])


def legend(classes: Sequence[tuple[str, UInt8[np.ndarray, "3"]]], columns: int = 4) -> bytes:
    """Names of classes beside their colors (red, green, blue), as PNG."""
    wide, line = 28 + 8 * max([len(name) for name, _ in classes] + [8]), 24
    rows = -(-len(classes) // columns)
    sheet = _Sheet(12 + wide * min(columns, len(classes)), 12 + line * rows)
    for place, (name, color) in enumerate(classes):
        x, y = 12 + wide * (place // rows), 10 + line * (place % rows)
        sheet.draw.rectangle((x, y, x + 13, y + 13), fill=tuple(map(int, color)))
        sheet.text((x + 20, y - 2), name)
    return sheet.png()
