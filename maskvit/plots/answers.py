"""What a model says of pictures beside what is true."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Shaped, UInt8

from maskvit.core.modalities import Modality
from maskvit.plots.panels import labeled_grid
from maskvit.plots.pictures import to_picture


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
