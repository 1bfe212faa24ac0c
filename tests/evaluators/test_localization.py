"""Maps of objects against masks: the figures in plain numpy, the evaluator on any number of devices, its errors."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.evaluators.localization import connected
from maskvit.metrics import localization
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIZE, RECORDS = (24, 24), 7
TARGET = dict(name="mask", kind="categorical", num_classes=4, patch=4, loss="cross_entropy", missing=255)


def box_of(inside: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.where(inside)
    return rows.min(), columns.min(), rows.max() + 1, columns.max() + 1


def overlap(a: Any, b: Any) -> float:
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(height, 0) * max(width, 0)
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return both / (area(a) + area(b) - both)


def test_sums_against_numpy():
    rng = np.random.default_rng(0)
    maps, ids = rng.random((6, 4, 4)).astype(np.float32), rng.choice([-1, 0, 0, 0, 1, 2], (6, 8, 12)).astype(np.int32)
    ids[1] = 0
    ids[2], ids[3] = 0, 0
    ids[2, 2:6, 3:9] = 1
    ids[3, :2, :2], ids[3, 4:, 6:] = 2, 3
    region = np.zeros((6, 4, 4), bool)
    region[:, 1:3, 1:3] = True
    predicted = maps > 0.5
    valid = np.array([True] * 5 + [False])
    objects = np.array([False, True, True, False])
    found = localization.sums(*map(jnp.asarray, (maps, predicted, region, ids, objects, valid)))
    located, iou, accuracy, f = [], [], [], []
    for i in (0, 2, 3, 4):
        up = lambda x: x.repeat(2, 0).repeat(3, 1)  # noqa: E731
        known, true = ids[i] >= 0, np.isin(ids[i], (1, 2))
        answer = up(predicted[i])
        iou.append((answer & true)[known].sum() / (answer | true)[known].sum())
        accuracy.append((answer == true)[known].mean())
        truths = [box_of(ids[i] == k) for k in (1, 2) if (ids[i] == k).any()]
        located.append(max(overlap(box_of(up(region[i])), box) for box in truths) >= 0.5)
        per_threshold = []
        for t in np.linspace(0, 1 - 1e-10, 255):
            answer = up(maps[i] >= np.float32(t))
            hit = (answer & true & known).sum()
            p, r = hit / max((answer & known).sum(), 1), hit / true.sum()
            per_threshold.append(1.3 * p * r / max(0.3 * p + r, 1e-12))
        f.append(per_threshold)
    figures = localization.summarize(jax.tree.map(np.asarray, found))
    assert located[1] and not all(located)
    expected = dict(corloc=np.mean(located), iou=np.mean(iou), accuracy=np.mean(accuracy), max_f=np.mean(f, axis=0).max())
    assert figures == pytest.approx({name: 100 * value for name, value in expected.items()}, rel=1e-5)


def test_the_connected_part_of_the_highest_patch():
    maps = jnp.array([[[0.9, 0.6, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.8]], [[0.1, 0.2, 0.3], [0.9, 0.1, 0.3], [0.8, 0.7, 0.6]]])
    part = connected(maps, maps > 0.5)
    assert np.asarray(part).astype(int).tolist() == [[[1, 1, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [1, 0, 0], [1, 1, 1]]]


@pytest.fixture
def objective(monkeypatch):
    def png(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, format="PNG")
        return stream.getvalue()

    rng, records = np.random.default_rng(1), []
    for _ in range(RECORDS):
        mask, picture = np.zeros(SIZE, np.uint8), rng.integers(0, 60, (*SIZE, 3), np.uint8)
        top, left = rng.integers(0, 12, 2)
        mask[top : top + 10, left : left + 10] = 1
        picture[mask == 1] += 180
        records.append(dict(rgb=png(picture), mask=png(mask)))
    monkeypatch.setitem(SOURCES, "objects", lambda modalities, split="val": ListSource(records))
    block = dict(
        name="multimae", encoder=dict(width=32, depth=1, heads=2), decoder=dict(width=16, depth=1, heads=2), inputs=("rgb",),
        outputs=("rgb",), num_visible=9,
    )  # fmt: skip
    return build_objective(dict(image_size=SIZE, modalities=dict(rgb=dict(RGB, patch=4)), objective=block))


def evaluator(objective: Any, devices: int = 1, **block: Any) -> Any:
    arguments = dict(
        objective=objective, modalities=parse_modalities(dict(rgb=dict(RGB, patch=4))), image_size=SIZE,
        mesh=make_mesh(jax.devices()[:devices]), data=dict(train=dict(source="objects")),
    )  # fmt: skip
    return build_evaluators({"e": dict(type="localization", target=TARGET, batch_size=4) | block}, **arguments)["e"]


@pytest.mark.parametrize("guidance", [dict(name="tokencut", features="tokens"), dict(name="random_map")], ids=lambda block: block["name"])
def test_figures_do_not_depend_on_devices(objective, guidance):
    params = jax.jit(objective.init)(jax.random.key(0))[0]
    found = []
    for devices in (1, 4):
        placed = jax.device_put(params, replicated(make_mesh(jax.devices()[:devices])))
        found.append(dict(evaluator(objective, devices, guidance=guidance).run(placed, {}, lambda: None)))
    assert found[0] == pytest.approx(found[1], abs=0.01) and set(found[0]) == {"corloc", "iou", "accuracy", "max_f"}
    if guidance["name"] == "tokencut":  # bright squares on a dark ground are found even by tokens of a fresh model
        assert found[0]["iou"] > 50


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(target="mask"), "localization target is 'mask'; the model has rgb"),
        (dict(target=dict(TARGET, kind="continuous", loss="l1")), "localization target 'mask' is continuous; it must be categorical"),
        (dict(target=dict(TARGET, patch=8)), "target 'mask' must have the patch of the input 'rgb'"),
        (dict(objects=(4,)), "objects names 4; ids of 'mask' are 0 ... 3"),
        (dict(threshold=1.5), "threshold is 1.5; it must be between 0 and 1"),
        (dict(guidance=dict(name="saliency")), "guidance.name is 'saliency'; known: attention, tokencut, self_attention"),
        (dict(guidance=dict(name="stored", path="maps")), "needs maps, errors or a memory that an evaluator has not"),
        (dict(guidance=dict(name="tokencut", tau=2.0)), "TokenCut's tau is 2.0; it is a cosine"),
        (dict(guidance=dict(name="attention", head=5)), "head is 5; the encoder has heads 0 ... 1"),
        (dict(guidance=dict(name="tokencut", lam=1)), "config.evaluators guidance has unknown key 'lam'"),
    ],
)
def test_mistakes_are_named(objective, block, message):
    with pytest.raises(ValueError, match=message):
        evaluator(objective, **block)
