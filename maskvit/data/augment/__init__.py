"""What is done to a record between decoding and batching.

In order: `settings` says what; `geometry` (or `dense`, for dense tasks) crops, flips and resizes all modalities together; then the colors
of pictures change (`photometric`, `randaugment`). `resizing` is Pillow's arithmetic, `opencv` OpenCV's.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from maskvit.data.augment.photometric import Change, draw_gray, draw_three_augment
from maskvit.data.augment.randaugment import apply_layers, draw_layers
from maskvit.data.augment.settings import Augment


def change_pictures(
    rng: np.random.Generator, pictures: Mapping[str, UInt8[np.ndarray, "h w 3"]], augment: Augment
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """The 8-bit RGB pictures of a record after one draw of what `augment` does to them. Draws nothing where it does nothing."""
    changes: list[Change] = []
    if augment.color_jitter is not None:
        changes += augment.color_jitter.draw(rng)
    if augment.gray:
        changes += draw_gray(rng, augment.gray)
    if augment.photometric_distortion is not None:
        changes += augment.photometric_distortion.draw(rng)
    if augment.three_augment:
        changes += draw_three_augment(rng)
    if augment.randaugment is not None:
        changes.append(Change(apply_layers, draw_layers(rng, augment.randaugment)))
    made = dict(pictures)
    for function, amount in changes:
        made = {name: function(picture, amount) for name, picture in made.items()}
    return made
