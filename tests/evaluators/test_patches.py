"""Patch tokens against pixels by k-NN, logistic and ridge regression: plain numpy does the same; their errors."""

from __future__ import annotations

import io
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators, patches
from maskvit.evaluators.frozen import held_out
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated
from tests.evaluators.test_logistic import by_scipy

SIZE, GRID, CLASSES = (16, 16), (4, 4), 3
IDS = dict(name="ids", kind="categorical", num_classes=CLASSES, patch=4, loss="cross_entropy", missing=255)
DEPTH = dict(name="depth", channels=1, patch=4, loss="l1", missing=0.0, metres_per_count=0.5)


@pytest.fixture(scope="module")
def objective(request):
    def png(array: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(array).save(stream, format="PNG")
        return stream.getvalue()

    def source(modalities: Any, split: str = "train") -> ListSource:
        """Bands of color, one class each, with noise, void pixels and a depth that goes with the brightness."""
        rng, rows = np.random.default_rng(len(split)), []
        for _ in range({"train": 12, "val": 5}[split]):
            ids = np.broadcast_to((np.arange(16)[:, None] // 3 + rng.integers(0, CLASSES)) % CLASSES, SIZE).astype(np.uint8).copy()
            rgb = np.clip(np.eye(3)[ids] * 120 + rng.normal(60, 40, (*SIZE, 3)), 0, 255).astype(np.uint8)
            depth = rgb.mean(axis=-1, keepdims=True).astype(np.float32) / 16 + 1
            ids[rng.random(SIZE) < 0.2] = 255
            ids[:4, :4] = 255
            rows.append(dict(rgb=png(rgb), ids=png(ids), depth=np.where(rng.random((*SIZE, 1)) < 0.2, 0, depth).astype(np.float32)))
        return ListSource(rows)

    SOURCES["bands"] = source
    request.addfinalizer(lambda: SOURCES.pop("bands"))
    block = dict(
        name="multimae", encoder=dict(width=16, depth=1, heads=2), decoder=dict(width=16, depth=1, heads=2), inputs=("rgb",),
        outputs=("rgb",), num_visible=5,
    )  # fmt: skip
    return build_objective(dict(image_size=SIZE, modalities=dict(rgb=dict(RGB, patch=4)), objective=block))


@pytest.fixture(scope="module")
def params(objective):
    return jax.jit(objective.init)(jax.random.key(0))[0]


def evaluator(objective: Any, kind: str, devices: int = 1, **block: Any) -> Any:
    target = DEPTH if kind == "patch_ridge" else IDS
    arguments = dict(
        objective=objective, modalities=parse_modalities(dict(rgb=dict(RGB, patch=4))), image_size=SIZE,
        mesh=make_mesh(jax.devices()[:devices]), data=dict(train=dict(source="bands")),
    )  # fmt: skip
    return build_evaluators({"e": dict(type=kind, target=target, batch_size=4) | block}, **arguments)["e"]


def of_patches(examples: Any, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Tokens, pixels) of all patches of some pictures."""
    tokens = np.asarray(examples.features["tokens"])[index][:, :16].reshape(-1, 16).astype(np.float64)
    maps = np.asarray(examples.labels)[index].reshape(len(index), *SIZE)
    cut = [m[r : r + 4, c : c + 4].ravel() for m in maps for r in range(0, 16, 4) for c in range(0, 16, 4)]
    return tokens, np.stack(cut)


def macro_jaccard(predicted: np.ndarray, truth: np.ndarray) -> float:
    """scikit-learn's, over the classes in truth or prediction, -1 being one of them where it is predicted."""
    predicted, truth = predicted[truth >= 0], truth[truth >= 0]
    found = np.unique(np.concatenate([predicted, truth]))
    return 100 * float(np.mean([((predicted == c) & (truth == c)).sum() / ((predicted == c) | (truth == c)).sum() for c in found]))


def most_frequent(values: np.ndarray, order: list[int]) -> int:
    return max(order, key=lambda c: ((values == c).sum(), -order.index(c)))


def labeled(x: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    label = np.array([most_frequent(p, [-1, 0, 1, 2]) for p in pixels])
    return x[label >= 0], pixels[label >= 0], label[label >= 0]


def test_nearest_patches_against_numpy(objective, params, monkeypatch):
    monkeypatch.setattr(patches, "TRAIN_CHUNK", 50)  # several, the last one padded
    monkeypatch.setattr(patches, "TEST_CHUNK", 48)  # three pictures, then the others
    settings = [(k, metric) for metric in ("cosine", "euclidean") for k in (1, 4)]

    def classified(train, fitted, test, tested, k, metric):
        x, pixels, _ = labeled(*of_patches(train, fitted))
        mean, deviation = x.mean(0), x.std(0)
        x, (y, truth) = (x - mean) / deviation, of_patches(test, tested)
        y = (y - mean) / deviation
        unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
        near = unit(y) @ unit(x).T if metric == "cosine" else -((y[:, None] - x) ** 2).sum(-1)
        order = np.argsort(-near, axis=1, kind="stable")[:, :k]
        return macro_jaccard(np.array([[most_frequent(pixels[o][:, p], [0, 1, 2, -1]) for p in range(16)] for o in order]), truth)

    results = []
    for devices in (1, 4):
        found = evaluator(objective, "patch_knn", devices, options=dict(ks=(1, 4)), hold_out=0.25)
        placed = jax.device_put(params, replicated(found.mesh))
        results.append(dict(found.run(placed, {})))
        assert set(results[-1]) == set(found.names)
    assert results[0] == pytest.approx(results[1])
    train, test = (found.extractions[split](placed, {}, ("tokens",)) for split in ("train", "test"))
    fitted, chosen_by = held_out(np.arange(12), 0.25, 0)
    scores = [classified(train, fitted, train, chosen_by, *setting) for setting in settings]
    k, metric = settings[int(np.argmax(scores))]
    assert (results[0]["k"], results[0]["cosine"]) == (k, metric == "cosine")
    assert results[0]["held_out_macro_jaccard"] == pytest.approx(max(scores), abs=0.2)  # float32 may order equal ones otherwise
    assert results[0]["macro_jaccard"] == pytest.approx(classified(train, np.arange(12), test, np.arange(5), k, metric), abs=0.2)


def test_logistic_regression_of_patches(objective, params):
    strengths = (0.01, 1.0)
    found = evaluator(objective, "patch_logistic", options=dict(strengths=strengths, iterations=300), hold_out=0.25)
    figures = dict(found.run(params, {}))
    assert set(figures) == set(found.names)
    train, test = (found.extractions[split](params, {}, ("tokens",)) for split in ("train", "test"))
    x, _, label = labeled(*of_patches(train, np.arange(12)))
    scaled = lambda values: (values - x.mean(0)) / x.std(0)  # noqa: E731
    kernel, bias = by_scipy(scaled(x), label, figures["c"])
    y, truth = of_patches(test, np.arange(5))
    predicted = (scaled(y) @ kernel + bias).argmax(1)[:, None].repeat(16, 1)
    assert figures["macro_jaccard"] == pytest.approx(macro_jaccard(predicted, truth), abs=0.2)


def test_ridge_regression_of_depth(objective, params):
    strengths = (0.1, 1000.0)
    found = evaluator(objective, "patch_ridge", options=dict(strengths=strengths), hold_out=0.25)
    figures = dict(found.run(params, {}))
    assert set(figures) == set(found.names) and figures["ridge"] in strengths
    train, test = (found.extractions[split](params, {}, ("tokens",)) for split in ("train", "test"))
    x, pixels = of_patches(train, np.arange(12))
    y = np.nanmean(pixels, axis=1)
    z = (x - x.mean(0)) / x.std(0)
    weights = np.linalg.solve(z.T @ z + figures["ridge"] * np.eye(16), z.T @ (y - y.mean()))
    tokens, _ = of_patches(test, np.arange(5))
    coarse = ((tokens - x.mean(0)) / x.std(0) @ weights + y.mean()).reshape(5, *GRID)
    places = np.clip((np.arange(16) + 0.5) / 4 - 0.5, 0, 3)
    tent = np.maximum(1 - np.abs(places[:, None] - np.arange(4)), 0)
    fine = np.einsum("ug,bgh,vh->buv", tent, coarse, tent)
    rmse = [0.5 * np.sqrt(np.nanmean((p - t[..., 0]) ** 2)) for p, t in zip(fine, test.labels, strict=True)]
    assert figures["rmse"] == pytest.approx(np.mean(rmse), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "block", "message"),
    [
        ("patch_knn", dict(target="ids"), "patch k-NN target is 'ids'; the model has rgb"),
        ("patch_knn", dict(target=dict(IDS, patch=8)), "target 'ids' must have the patch of the input 'rgb'"),
        ("patch_knn", dict(options=dict(ks=(0,))), "options.ks is .*; give numbers of neighbors"),
        ("patch_knn", dict(options=dict(metrics=("l1",))), "options.metrics is .*; known: cosine, euclidean"),
        ("patch_logistic", dict(target=DEPTH), "target 'depth' is continuous; it must be categorical"),
        ("patch_ridge", dict(target=IDS), "target 'ids' is categorical; it must be continuous"),
        ("patch_ridge", dict(target={}), "target lacks the key 'name'"),
        ("patch_ridge", dict(hold_out=0.0), "hold_out is 0.0; it must be a share"),
        ("patch_ridge", dict(limit_train=1), "needs at least 2 training pictures"),
    ],
)
def test_mistakes_are_named(objective, kind, block, message):
    with pytest.raises(ValueError, match=message):
        evaluator(objective, kind, **block)


def test_files_of_tokens_are_not_those_of_another_declaration(objective, params, tmp_path):
    kept = dict(cache=str(tmp_path), options=dict(ks=(1,)))
    one = evaluator(objective, "patch_knn", **kept)
    train = one.extractions["train"](params, {}, ("tokens",))
    assert isinstance(train.features["tokens"], np.memmap) and (np.asarray(train.labels) == -1).any()
    other = evaluator(objective, "patch_knn", target=dict(IDS, missing=2, num_classes=256), **kept)
    assert (np.asarray(other.extractions["train"](params, {}, ("tokens",)).labels) == 255).any()


def test_more_neighbors_than_patches_is_an_error(objective, params):
    with pytest.raises(ValueError, match="with k = 1000 over .* labeled training patches: lower ks"):
        dict(evaluator(objective, "patch_knn", options=dict(ks=(1000,))).run(params, {}))
