"""Answers at the stored size of pictures, whole and by sliding windows, against plain numpy; published protocols by name."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.core.types import Batch
from maskvit.data import SOURCES
from maskvit.data.augment.opencv import resize_bilinear
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.evaluators.windows import starts
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIDE, CLASSES = 16, 4
DECLARED = dict(
    rgb=dict(RGB, patch=8),
    ids=dict(kind="categorical", num_classes=CLASSES, patch=8, loss="cross_entropy", missing=255),
    depth=dict(channels=1, patch=8, loss="l1", mean=(2.0,), std=(1.5,), missing=0.0),
)
SPECS = parse_modalities(DECLARED)
SIZES = [(20, 37), (40, 24), (16, 16), (30, 21), (20, 37)]


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def pictures(request):
    """(rgb, ids, depth) of pictures of several sizes; the source's records."""
    rng = np.random.default_rng(0)
    arrays = [
        (
            rng.integers(0, 256, (*size, 3), np.uint8),
            rng.choice([*range(CLASSES), 255], size).astype(np.uint8),
            np.where(rng.random((*size, 1)) < 0.2, 0, rng.uniform(0.5, 9.0, (*size, 1))).astype(np.float32),
        )
        for size in SIZES
    ]
    records = [dict(rgb=png(rgb), ids=png(ids), depth=depth) for rgb, ids, depth in arrays]
    SOURCES["several_sizes"] = lambda modalities, split="val": ListSource(records)
    request.addfinalizer(lambda: SOURCES.pop("several_sizes"))
    return arrays


def objective_of(target: str) -> Any:
    task = dict(name="segmentation", target=target) if target == "ids" else dict(name="regression", target=target)
    head = dict(name="linear", norm="none")
    block = dict(name="supervised", encoder=dict(width=16, depth=1, heads=2), task=task, head=head, final_norm=True)
    return build_objective(dict(image_size=SIDE, modalities=DECLARED, objective=block))


def figures_on(devices: int, objective: Any, params: Any, batch_size: int, image_size: int = SIDE, **block: Any) -> dict[str, Any]:
    mesh = make_mesh(jax.devices()[:devices])
    evaluators = build_evaluators(
        {"e": dict(batch_size=batch_size) | block}, objective=objective, modalities=SPECS, image_size=(image_size, image_size), mesh=mesh,
        data=dict(train=dict(source="several_sizes")),
    )  # fmt: skip
    return dict(evaluators["e"].run(jax.device_put(params, replicated(mesh)), {}, lambda: None))


def interpolated(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, half-pixel centers, point by point: what PyTorch's interpolate does with align_corners=False."""
    result = np.zeros((*size, values.shape[2]))
    for u in range(size[0]):
        y = max((u + 0.5) * values.shape[0] / size[0] - 0.5, 0)
        y0 = int(y)
        y1 = min(y0 + 1, values.shape[0] - 1)
        for v in range(size[1]):
            x = max((v + 0.5) * values.shape[1] / size[1] - 0.5, 0)
            x0 = int(x)
            x1 = min(x0 + 1, values.shape[1] - 1)
            top = values[y0, x0] * (1 - (x - x0)) + values[y0, x1] * (x - x0)
            low = values[y1, x0] * (1 - (x - x0)) + values[y1, x1] * (x - x0)
            result[u, v] = top * (1 - (y - y0)) + low * (y - y0)
    return result


def answer(objective: Any, params: Any, picture: np.ndarray) -> np.ndarray:
    (values,) = objective.answers(params, {}, Batch({"rgb": jnp.asarray(picture[None])})).values()
    return np.asarray(values[0], np.float64)


def slid(objective: Any, params: Any, picture: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The mean of overlapping answers on a canvas, as MMSegmentation's slide_inference; the picture's short side is the window's."""
    factor = window / min(picture.shape[:2])
    size = tuple(max(window, round(side * factor)) for side in picture.shape[:2])
    picture = resize_bilinear(picture, size)
    total, count = 0.0, np.zeros((*size, 1))
    rows = max(size[0] - window + stride - 1, 0) // stride + 1
    columns = max(size[1] - window + stride - 1, 0) // stride + 1
    for i in range(rows):
        for j in range(columns):
            bottom, right = min(i * stride + window, size[0]), min(j * stride + window, size[1])
            here = slice(bottom - window, bottom), slice(right - window, right)
            values = answer(objective, params, picture[here])
            canvas = np.zeros((*size, values.shape[2]))
            canvas[here] = values
            total, count[here] = total + canvas, count[here] + 1
    return total / count


def mean_iou(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    found = []
    for c in range(CLASSES):
        inside = sum(((p == c) & (t == c)).sum() for p, t in pairs)
        either = sum((((p == c) & (t != 255)) | (t == c)).sum() for p, t in pairs)
        found.append(inside / either)
    return 100 * float(np.mean(found))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_sliding_windows_with_mirrored_ones_against_a_canvas(pictures):
    objective = objective_of("ids")
    params = objective.init(jax.random.key(0))[0]
    pairs = []
    for rgb, ids, _ in pictures:
        views = [slid(objective, params, rgb, 16, 11), slid(objective, params, rgb[:, ::-1], 16, 11)[:, ::-1]]
        # resizing commutes with mirroring, and the softmax is of the resized logits
        mean = np.mean([softmax(interpolated(view, rgb.shape[:2])) for view in views], axis=0)
        pairs.append((mean.argmax(-1), ids))
    options = dict(resolution="original", sliding=dict(window=16, stride=11), flip=True, examples=0)
    one, four = (
        figures_on(n, objective, params, size, type="segmentation", crop=None, options=options) for n, size in ((1, 3), (4, 4))
    )
    assert one["mean_iou"] == pytest.approx(mean_iou(pairs), abs=0.1)
    assert one.keys() == four.keys() and all(one[name] == pytest.approx(four[name]) for name in one)


def test_depth_of_padded_pictures_at_their_stored_size(pictures):
    objective = objective_of("depth")
    params = objective.init(jax.random.key(1))[0]
    rmse = []
    for rgb, _, depth in pictures:
        factor = SIDE / max(rgb.shape[:2])
        height, width = (max(1, round(side * factor)) for side in rgb.shape[:2])
        both = []
        for picture in (rgb, rgb[:, ::-1]):
            padded = np.full((SIDE, SIDE, 3), 128, np.uint8)
            padded[:height, :width] = resize_bilinear(picture, (height, width))
            both.append(interpolated(answer(objective, params, padded)[:height, :width], rgb.shape[:2]))
        predicted, known = (both[0] + both[1][:, ::-1]) / 2, depth != 0
        rmse.append(np.sqrt(np.square(predicted - depth)[known].mean()))
    options = dict(resolution="original", flip=True, examples=3)
    one, four = (figures_on(n, objective, params, size, type="depth", crop="pad", options=options) for n, size in ((1, 2), (4, 4)))
    # Bilinear on 8 bits of the mirrored picture rounds otherwise in places.
    assert one["rmse"] == pytest.approx(np.mean(rmse), rel=1e-3)
    for name, value in one.items():
        if name != "examples":
            assert value == pytest.approx(four[name], rel=1e-5), name
    assert one["examples"].dtype == np.uint8 and one["examples"].shape == four["examples"].shape
    assert np.abs(one["examples"].astype(int) - four["examples"]).max() <= 2  # a rounded color


def test_windows_begin_as_mmsegmentation_counts():
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(1100, 512, 341) == [0, 341, 588]


def test_a_protocol_stands_for_its_arguments(pictures):
    from maskvit.evaluators.protocols import PROTOCOLS, with_protocol

    block = with_protocol("w", dict(type="segmentation", protocol="ade20k_sliding_512", batch_size=4, options=dict(examples=2)))
    assert block == dict(
        type="segmentation", batch_size=4, crop=None, limit=None,
        options=dict(resolution="original", sliding=dict(window=512, stride=341), flip=False, examples=2),
    )  # fmt: skip
    objective = objective_of("ids")
    for name, row in PROTOCOLS.items():
        if row.type in ("segmentation",):
            size = (row.image_size or (512, 512))[0]
            large = build_objective(
                dict(
                    image_size=size, modalities=DECLARED,
                    objective=dict(
                        name="supervised", encoder=dict(width=16, depth=1, heads=2), task=dict(name="segmentation", target="ids"),
                        head=dict(name="linear"),
                    ),
                )
            )  # fmt: skip
            build_evaluators(
                {"e": dict(type=row.type, protocol=name)}, objective=large, modalities=SPECS, image_size=(size, size), mesh=make_mesh(),
                data=dict(train=dict(source="several_sizes")),
            )  # fmt: skip
    with pytest.raises(ValueError, match=r"config.evaluators.e.protocol 'ade20k_padded_512' is of pictures of \(512, 512\), but"):
        figures_on(1, objective, {}, 4, type="segmentation", protocol="ade20k_padded_512")


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(protocol="ade20k"), "config.evaluators.e.protocol is 'ade20k'; known: imagenet_224"),
        (dict(protocol="imagenet_224"), "'imagenet_224' is one of the evaluator 'classification', but type is 'segmentation'"),
        (dict(protocol="ade20k_sliding_512", limit=10), "config.evaluators.e.limit is 10, but the protocol 'ade20k_sliding_512' has None"),
        (dict(protocol="ade20k_sliding_512", options=dict(flip=True)), "e.options.flip is True, but the protocol"),
        (dict(options=dict(flip=True)), "options.flip is for answers at the stored size: set resolution to 'original'"),
        (dict(options=dict(resolution="full")), "options.resolution is 'full'; known: model, original"),
        (dict(options=dict(resolution="original")), "crop is 0.875, but answers at the original resolution need whole pictures"),
        (dict(crop=None, options=dict(resolution="original", sliding=dict(window=16, stride=20))), "sliding.stride is 20; it must be"),
        (dict(crop=None, options=dict(resolution="original", sliding=dict(window=20, stride=9))), "image height 20 is not a multiple of"),
        (dict(options=dict(examples=9)), "options.examples is 9; it must be at least 0 and at most 8"),
    ],
)
def test_mistakes_are_named(block, message, pictures):
    with pytest.raises(ValueError, match=message):
        figures_on(1, objective_of("ids"), {}, 4, type="segmentation", **block)
