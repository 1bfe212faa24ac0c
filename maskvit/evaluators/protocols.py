"""Published protocols by name: what `protocol="..."` of an evaluator's block stands for.

A row holds the evaluator's type, the size that `config.image_size` must have (None: any), and the arguments it fixes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from maskvit.core.configuration import look_up, shown
from maskvit.metrics.test_sets import ALEXNET_ERRORS, BACKGROUNDS, SEVERITIES


class Protocol(NamedTuple):
    """A row of `PROTOCOLS`."""

    type: str
    image_size: tuple[int, int] | None
    arguments: dict[str, Any]


def _sliding(window: int, stride: int) -> Protocol:
    options = dict(resolution="original", sliding=dict(window=window, stride=stride), flip=False)
    return Protocol("segmentation", None, dict(crop=None, limit=None, options=options))


def _padded(side: int) -> Protocol:
    return Protocol("segmentation", (side, side), dict(crop="pad", limit=None, options=dict(resolution="model")))


def _knn(ks: tuple[int, ...], norm: bool) -> Protocol:
    return Protocol("knn", (224, 224), dict(crop=0.875, ks=ks, temperature=0.07, norm=norm, limit_train=None, limit_test=None))


PROTOCOLS: dict[str, Protocol] = {
    # Classes of pictures: the short side at 256 / 224 of the model's, the middle cut out; beyond 224 pixels all of it (MAE, MultiMAE).
    "imagenet_224": Protocol("classification", (224, 224), dict(crop=0.875, limit=None)),
    "imagenet_384": Protocol("classification", (384, 384), dict(crop=1.0, limit=None)),
    # Stored at 224 pixels.
    "imagenet_c": Protocol(
        "corruptions", (224, 224), dict(crop=1.0, limit=None, options=dict(corruptions=tuple(ALEXNET_ERRORS), severities=SEVERITIES))
    ),
    "imagenet_9": Protocol("backgrounds", (224, 224), dict(crop=1.0, limit=None, options=dict(variants=BACKGROUNDS))),
    # DINO's, iBOT's and AttMask's k-NN; efficient probing's, of tokens before the final norm.
    "imagenet_knn_224": _knn((10, 20, 100, 200), True),
    "imagenet_knn_unnormed_224": _knn((5, 10, 15, 20, 50, 100, 200), False),
    # MultiMAE's: loss and figures on the padded square.
    "ade20k_padded_512": _padded(512),
    "hypersim_padded_512": _padded(512),
    "nyuv2_padded_640": _padded(640),
    # MMSegmentation's test of one scale, at the stored size. iBOT, DINOv3: stride 341; its config of MAE: 256.
    "ade20k_sliding_512": _sliding(512, 341),
    "ade20k_sliding_512_stride_256": _sliding(512, 256),
    # MultiMAE's script: 100 pictures (there by a permutation, here evenly spread) in two batches, whose figures are averaged.
    "nyuv2_depth_multimae": Protocol(
        "depth", (256, 256), dict(crop="shortest", limit=100, batch_size=50, options=dict(aggregation="per_batch", eigen_crop=False))
    ),
    # The same crop of all 654 pictures, each picture's figures averaged.
    "nyuv2_depth_256": Protocol(
        "depth", (256, 256), dict(crop="shortest", limit=None, options=dict(aggregation="per_image", eigen_crop=False, resolution="model"))
    ),
    # Eigen et al.'s crop of the stored 480 x 640 pixels, depths up to 10 m.
    "nyuv2_depth_eigen": Protocol(
        "depth", None,
        dict(
            crop=None, limit=None,
            options=dict(aggregation="per_image", eigen_crop=True, depth_range=(0.001, 10.0), align=None, resolution="original"),
        ),
    ),
    # MultiMAE's mean absolute error of Taskonomy's maps.
    "taskonomy_384": Protocol("maps", (384, 384), dict(crop=1.0, limit=None)),
}  # fmt: skip


def with_protocol(where: str, block: Mapping[str, Any], image_size: tuple[int, int] | None = None) -> dict[str, Any]:
    """An evaluator's block with the arguments of its `protocol`, which is left out; as it is where it names none.

    `image_size`: the model's, where it is known. Keys that the protocol does not fix may stand beside it. Raises ValueError for an
    unknown protocol, one of another evaluator or size, and a key that would change it: figures of a name must be of its protocol.
    """
    if "protocol" not in block:
        return dict(block)
    block = dict(block)
    name = block.pop("protocol")
    row = look_up(f"{where}.protocol", PROTOCOLS, name)
    if block.get("type") != row.type:
        raise ValueError(f"{where}.protocol {name!r} is one of the evaluator {row.type!r}, but type is {block.get('type')!r}")
    if image_size is not None and row.image_size not in (None, tuple(image_size)):
        raise ValueError(f"{where}.protocol {name!r} is of pictures of {row.image_size}, but config.image_size is {tuple(image_size)}")
    for key, fixed in row.arguments.items():
        given = block.get(key, fixed)
        if isinstance(fixed, dict) and isinstance(given, Mapping):
            _check_same(f"{where}.options", name, {k: v for k, v in given.items() if k != "examples"}, fixed)
            block[key] = {**given, **fixed}
        else:
            _check_same(where, name, {key: given}, {key: fixed})
            block[key] = fixed
    return block


def _check_same(where: str, name: str, given: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, value in given.items():
        as_plain = tuple(value) if isinstance(value, list) else value
        own = fixed.get(key, "its default")
        if as_plain != own:
            raise ValueError(
                f"{where}.{key} is {shown(value)}, but the protocol {name!r} has {shown(own)}: leave out the key, or name no protocol and "
                "write its other keys"
            )
