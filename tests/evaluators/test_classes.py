"""Figures of classes on test sets of ImageNet's kinds, and of pictures with hidden patches, against plain numpy."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import RGB, parse_modalities
from maskvit.core.types import Batch, Record, TokenBatch
from maskvit.data import SOURCES
from maskvit.data.sources import ListSource
from maskvit.evaluators import build_evaluators
from maskvit.guidance.attention import self_attention
from maskvit.heads.values import prepare
from maskvit.metrics.test_sets import ALEXNET_ERRORS, BACKGROUNDS, NINE_OF_THOUSAND
from maskvit.objectives import build_objective
from maskvit.sharding import make_mesh, replicated

SIZE, CLASSES, RECORDS = (16, 16), 9, 11
DECLARED = dict(rgb=dict(RGB, patch=4))
SPECS = parse_modalities(DECLARED)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG")
    return stream.getvalue()


class Pictures(ListSource):
    """Pictures that differ by split, with labels, and for the split "real" with sets of them."""

    def __init__(self, modalities: Any, split: str = "val"):
        self.split, rng = split, np.random.default_rng(list(split.encode()))
        self.pixels = rng.integers(0, 256, (RECORDS, *SIZE, 3), np.uint8)
        self.classes = rng.integers(0, CLASSES, RECORDS) if split != "few" else rng.choice([1, 4, 6], RECORDS)
        self.sets = rng.random((RECORDS, CLASSES)) < 0.2
        labels = [] if split == "real" else self.classes.tolist()
        rows = [{"rgb": png(x)} | ({"label": labels[i]} if labels else {}) for i, x in enumerate(self.pixels)]
        super().__init__(rows, list("abcdefghi"))

    def label_sets(self) -> np.ndarray | None:
        return self.sets if self.split == "real" else None


@pytest.fixture(scope="module")
def objective(request):
    SOURCES["pictures_in_memory"] = Pictures
    request.addfinalizer(lambda: SOURCES.pop("pictures_in_memory"))
    task = dict(name="classification", num_classes=CLASSES)
    return build_objective(
        dict(image_size=SIZE, modalities=DECLARED, objective=dict(name="supervised", encoder=dict(width=16, depth=1, heads=2), task=task))
    )


@pytest.fixture(scope="module")
def params(objective):
    params = jax.jit(objective.init)(jax.random.key(0))[0]
    head = 3 * jax.random.normal(jax.random.key(1), params["head"]["kernel"].shape)  # so that answers differ between pictures
    return {**params, "head": {**params["head"], "kernel": head}}


def evaluator(objective: Any, devices: int = 1, split: str = "val", **block: Any) -> Any:
    mesh = make_mesh(jax.devices()[:devices])
    data = dict(train=dict(source="pictures_in_memory"))
    arguments = dict(objective=objective, modalities=SPECS, image_size=SIZE, mesh=mesh, data=data)
    where = dict(data_from=dict(source="pictures_in_memory", split=split), crop=1.0, batch_size=4)
    return build_evaluators({"e": where | block}, **arguments)["e"]


def figures(objective: Any, params: Any, devices: int = 1, **block: Any) -> dict[str, Any]:
    found = evaluator(objective, devices, **block)
    values = dict(found.run(jax.device_put(params, replicated(make_mesh(jax.devices()[:devices]))), {}, lambda: None))
    return {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}


def logits_of(objective: Any, params: Any, pixels: np.ndarray) -> np.ndarray:
    return np.asarray(objective.answers(params, {}, Batch({"rgb": jnp.asarray(pixels)}))["logits"])


def test_sets_of_labels(objective, params):
    source = Pictures(SPECS, "real")
    given = logits_of(objective, params, source.pixels).argmax(1)
    known = source.sets.any(1)
    assert not known.all()
    expected = 100 * source.sets[np.arange(RECORDS), given][known].mean()
    for devices in (1, 4):
        found = figures(objective, params, devices, type="classification", split="real")
        assert found["real"] == pytest.approx(expected) and np.isnan(found["top1"])


def test_answers_of_some_classes_alone(objective, params, tmp_path):
    source = Pictures(SPECS, "few")
    allowed = [1, 4, 6]
    given = np.array(allowed)[logits_of(objective, params, source.pixels)[:, allowed].argmax(1)]
    (tmp_path / "names").write_text("g\nb\ne\n")
    for classes in (("b", "e", "g"), str(tmp_path / "names")):
        found = figures(objective, params, type="classification", split="few", options=dict(classes=classes))
        assert found["top1"] == pytest.approx(100 * (given == source.classes).mean())
    with pytest.raises(ValueError, match="samples have labels above 2"):
        figures(objective, params, type="classification", options=dict(classes=("b", "e", "g")))


def accuracy(objective: Any, params: Any, split: str) -> float:
    source = Pictures(SPECS, split)
    return 100 * float((logits_of(objective, params, source.pixels).argmax(1) == source.classes).mean())


def test_errors_on_corrupted_pictures(objective, params):
    found = figures(objective, params, 4, type="corruptions")
    errors = {name: np.mean([100 - accuracy(objective, params, f"{name}_{s}") for s in range(1, 6)]) for name in ALEXNET_ERRORS}
    assert found["error/fog"] == pytest.approx(errors["fog"])
    assert found["mean_error"] == pytest.approx(np.mean(list(errors.values())))
    assert found["mce"] == pytest.approx(np.mean([error / ALEXNET_ERRORS[name] for name, error in errors.items()]))
    two = figures(objective, params, type="corruptions", options=dict(corruptions=("fog", "snow"), severities=(2, 3)))
    assert set(two) == {"error/fog", "error/snow", "mean_error"}
    assert two["error/snow"] == pytest.approx(100 - (accuracy(objective, params, "snow_2") + accuracy(objective, params, "snow_3")) / 2)


def test_exchanged_backgrounds(objective, params):
    found = figures(objective, params, type="backgrounds")
    assert set(found) == {*BACKGROUNDS, "background_gap"}
    assert found["only_fg"] == pytest.approx(accuracy(objective, params, "only_fg"))
    gap = accuracy(objective, params, "mixed_same") - accuracy(objective, params, "mixed_rand")
    assert found["background_gap"] == pytest.approx(gap)


def test_nine_classes_of_a_thousand():
    assert [len(members) for members in NINE_OF_THOUSAND] == [116, 52, 42, 36, 35, 27, 26, 20, 16]
    assert len({number for members in NINE_OF_THOUSAND for number in members}) == 370


@pytest.mark.parametrize("by", ["random", "attention"])
def test_a_share_of_the_patches_is_black(objective, params, by):
    found = evaluator(objective, type="classification", options=dict(hidden=dict(share=0.7, by=by)))
    pixels = np.random.default_rng(0).integers(1, 256, (3, *SIZE, 3), np.uint8)
    batch = Batch({"rgb": jnp.asarray(pixels)}, record=Record(index=jnp.array([5, 6, 7])))
    seen = np.asarray(found._hidden(params, {}, batch).values["rgb"])
    black = (seen == 0).all(-1).reshape(3, 4, 4, 4, 4).transpose(0, 1, 3, 2, 4).reshape(3, 16, 16)
    hidden = black.all(-1)
    np.testing.assert_array_equal(hidden, black.any(-1))
    assert hidden.sum(1).tolist() == [11, 11, 11]  # of 16
    np.testing.assert_array_equal(seen, np.where((seen == 0).all(-1, keepdims=True), 0, pixels))
    if by == "attention":
        prepared = prepare(objective.model, batch)
        tokens = objective.model.embed(params, prepared.values, None)
        scores = np.asarray(self_attention(objective.model, params, TokenBatch(tokens.tokens, tokens.layout)))
        assert all(scores[i][hidden[i]].min() >= scores[i][~hidden[i]].max() for i in range(3))
    else:
        assert len({tuple(row) for row in hidden}) == 3
    one, four = (figures(objective, params, n, type="classification", options=dict(hidden=dict(share=0.7, by=by))) for n in (1, 4))
    assert one == pytest.approx(four, rel=1e-5)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (dict(type="classification", options=dict(classes=("b", "z"))), "options.classes names 'z', which is no class of the data"),
        (dict(type="classification", options=dict(classes=("b", "b"))), "options.classes must be names of classes, each once"),
        (dict(type="classification", options=dict(hidden=dict(share=1.0))), "hidden.share is 1.0; it must be between 0 and 1"),
        (dict(type="classification", options=dict(hidden=dict(share=0.5, by="depth"))), "hidden.by is 'depth'; known: random, attention"),
        (dict(type="corruptions", options=dict(corruptions=("rain",))), "corruptions names 'rain'; known: gaussian_noise"),
        (dict(type="backgrounds", options=dict(variants=("none",))), "variants is .*; known: original"),
    ],
)
def test_mistakes_are_named(objective, block, message):
    with pytest.raises(ValueError, match=message):
        evaluator(objective, **block)


def test_a_missing_file_of_classes_is_named(objective):
    with pytest.raises(FileNotFoundError, match="options.classes: there is no file /nowhere; give names"):
        evaluator(objective, type="classification", options=dict(classes="/nowhere"))
