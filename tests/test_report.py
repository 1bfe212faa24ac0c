"""The report commands: their measures on made-up arrays, and whole pages and tables of a small model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit import report
from maskvit.checkpoint import save_imported
from maskvit.data import scenes
from maskvit.data.sources import ListSource
from maskvit.features import load
from maskvit.modalities import DEPTH, RGB, SEMSEG
from maskvit.objectives import build_objective
from maskvit.types import TokenLayout

CONFIG = dict(
    image_size=[32, 32],
    modalities=dict(
        rgb=dict(RGB, patch=8), depth=dict(DEPTH, patch=8, missing=0.0), semseg=dict(SEMSEG, num_classes=len(scenes.CLASS_NAMES), patch=8)
    ),
    objective=dict(
        name="multimae", inputs=["rgb", "depth", "semseg"], outputs=["rgb"], num_visible=10,
        encoder=dict(width=48, depth=2, heads=2), decoder=dict(width=16, depth=1, heads=2),
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("imported")
    params, _ = jax.jit(build_objective(CONFIG).init)(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": CONFIG})
    return directory


@pytest.fixture
def source():
    rendered = (scenes.render(5, i, (32, 32)) for i in range(11))
    return ListSource([{name: sample[name] for name in ("rgb", "depth", "semseg")} for sample in rendered])


# Measures


def test_equal_counts():
    layout = TokenLayout(("a", "b", "c"), ((2, 2), (1, 2), (3, 3)))
    assert report.equal_counts(layout, 7) == (3, 2, 2)
    assert report.equal_counts(layout, 12) == (4, 2, 6)  # b is too small for its third: the others take it
    assert report.equal_counts(layout, 15) == (4, 2, 9)
    with pytest.raises(ValueError, match="16 visible tokens of 15"):
        report.equal_counts(layout, 16)
    assert report.share_visible(196, 98, 588) == 33
    assert report.share_visible(4, 1, 100) == 1 and report.share_visible(4, 99, 100) == 3


def test_object_tokens():
    ids = np.zeros((1, 4, 4), int)
    ids[0, :2, :2] = 3  # all of the first token
    ids[0, 0, 2:] = 2  # half of the second
    ids[0, 3, 0] = 2  # a quarter of the third
    ids[0, 2:, 2:] = -1
    assert report.object_tokens(ids, (2, 2), 2).tolist() == [[True, False, False, False]]
    assert report.object_tokens(ids, (2, 2), 2, above=0.0).tolist() == [[True, True, True, False]]
    assert report.object_tokens(ids, (2, 2), 3, above=0.0).tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="4 x 4 pixels does not divide into 3 x 2 tokens"):
        report.object_tokens(ids, (3, 2), 2)


def test_overlap_and_lift_of_known_masks():
    objects = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)  # the last two say nothing
    present = np.ones_like(objects)
    perfect = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    masked = {"global": ~perfect, "mean": perfect, "random": np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1] * 4, [1] * 4], bool)}
    result = report.row_overlaps(masked, objects, present)
    rows = result["strategies"]
    assert rows["mean"]["objects_hidden"] == {"mean": 1.0, "error": 0.0, "count": 2}
    assert rows["mean"]["lift"]["mean"] == 2.0 and rows["global"]["lift"]["mean"] == 0.0
    assert rows["mean"]["hidden_are_object"] == {"mean": 0.75, "error": pytest.approx(0.25), "count": 2}
    assert rows["random"]["objects_hidden"]["mean"] == 0.25
    assert result["difference"] == {"mean": 1.0, "error": 0.0, "count": 2}
    assert result["object_tokens"]["mean"] == pytest.approx(3 / 8)
    # A token that does not exist is neither hidden nor object.
    present[:, 1] = False
    rows = report.row_overlaps(masked, objects, present)["strategies"]
    assert rows["mean"]["hidden_are_object"]["mean"] == 1.0 and rows["mean"]["lift"]["mean"] == 3.0


def test_random_masks_have_lift_one():
    rng = np.random.default_rng(0)
    objects = rng.random((4000, 16)) < 0.3
    hidden = np.argsort(rng.random((4000, 16)), axis=1) < 12
    rows = report.row_overlaps({"global": hidden, "mean": hidden}, objects, np.ones_like(hidden))["strategies"]
    lift = rows["mean"]["lift"]
    assert abs(lift["mean"] - 1) < 4 * lift["error"] < 0.05


def test_estimate():
    assert report.estimate(np.array([1.0, 3.0, np.nan])) == (2.0, 1.0, 2)
    assert report.estimate(np.array([np.nan]))[2] == 0 and np.isnan(report.estimate(np.array([1.0])).error)


def test_outliers_and_their_attention():
    norms = np.ones((10, 20)) + 0.01 * np.random.default_rng(0).random((10, 20))
    norms[3, 7] = norms[4, 7] = 9.0
    norms[5, 5] = 1e6  # of a token that does not exist
    present = np.ones_like(norms, bool)
    present[5, 5] = False
    assert np.argwhere(report.outliers(norms, present)).tolist() == [[3, 7], [4, 7]]
    flat, sink = np.full((10, 20), 0.05), np.full((10, 20), 0.5 / 19)
    sink[:, 7] = 0.5
    result = report.sink_figures({"global": flat, "mean": sink}, norms, present)
    assert result["outliers"] == 2 and result["norm_max"] == 9.0
    assert result["rows"]["global"]["mass"]["mean"] == pytest.approx(0.05 * 2 / 10)
    assert result["rows"]["mean"]["mass"]["mean"] == pytest.approx(0.5 * 2 / 10)
    assert result["rows"]["global"]["position_peak"] == pytest.approx(1) and result["rows"]["mean"]["position_peak"] == pytest.approx(10)


def test_last_block_input_is_one_block_short(checkpoint):
    loaded = load(checkpoint)
    batch = {"rgb": jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 256).astype(jnp.uint8)}
    prepared = loaded.objective.prepare(batch)
    tokens = loaded.model.embed(loaded.params, prepared.values)
    before = report.last_block_input(loaded.model, loaded.params, tokens)
    assert before.shape == (2, 16, 48)
    # With a last block that adds nothing, the encoder's output is what enters it.
    silent = jax.tree.map(jnp.zeros_like, loaded.params["encoder"]["block_01"])
    params = {**loaded.params, "encoder": {**loaded.params["encoder"], "block_01": silent}}
    np.testing.assert_allclose(loaded.model.encode(params, tokens.tokens)[:, :16], before, rtol=1e-5, atol=1e-6)


# Commands


def test_attention_page(checkpoint, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(scenes.render(0, i, (40, 48))["rgb"]).save(folder / f"scene{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    out = tmp_path / "attention.html"
    assert report.main(["attention", "--checkpoint", str(checkpoint), "--images", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "2 picture(s)" in said.out and "broken.png" in said.err
    page = out.read_text()
    assert page.count('<img src="data:image/png;base64,') == 2 and "http:" not in page and "https:" not in page
    assert "3 of 16, the share of 10 of 48" in page


def test_attention_maps_follow_the_guidance(checkpoint):
    loaded = load(checkpoint)
    batch = {"rgb": jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 256).astype(jnp.uint8)}
    maps = jax.device_get(report.attention_maps(loaded.objective, loaded.params, batch, 3))
    assert maps.attentions.shape == (2, 2, 2, 17, 17)
    np.testing.assert_allclose(maps.attentions[:, -1, :, -1, :16].mean(1), maps.rows["global"], rtol=1e-5)
    np.testing.assert_allclose(maps.attentions[:, -1].mean((1, 2))[:, :16], maps.rows["mean"], rtol=1e-5)
    for query, row in maps.rows.items():
        assert (maps.masked[query].sum(1) == 13).all()
        assert row[maps.masked[query]].reshape(2, -1).min(1).tolist() > row[~maps.masked[query]].reshape(2, -1).max(1).tolist()


def test_rows_command(checkpoint, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "open_source", lambda kind, specs, **_: source)
    out = tmp_path / "rows.json"
    arguments = ["rows", "--checkpoint", str(checkpoint), "--data_dir", "x", "--batch_size", "8", "--above", "0.25", "--out", str(out)]
    assert report.main(arguments) == 0
    *table, last = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    assert json.loads(last) == result and result["images"] == 11
    assert sum("random" in line for line in table) == 3 and all(len(line) < 180 for line in table)
    assert {name: values["visible"] for name, values in result["modalities"].items()} == {"rgb": 4, "depth": 3, "semseg": 3}
    for values in result["modalities"].values():
        assert set(values["strategies"]) == {"random", "global", "mean"}
        assert 0 < values["strategies"]["mean"]["objects_hidden"]["mean"] <= 1
    assert 0 < result["to_global_token"]["global"]["mean"] < 1


def test_mistakes_end_with_one_line(checkpoint, tmp_path, capsys):
    out = str(tmp_path / "x.html")
    for arguments, message in (
        (["attention", "--checkpoint", str(checkpoint), "--images", "nowhere", "--out", out], "nowhere does not exist"),
        (["attention", "--checkpoint", str(checkpoint), "--images", ".", "--out", "nowhere/x.html"], "the folder nowhere does not exist"),
        (["rows", "--checkpoint", str(checkpoint), "--data_dir", str(tmp_path)], "no prepared data set 'scenes'"),
        (["rows", "--checkpoint", "nowhere", "--data_dir", str(tmp_path)], "it does not exist"),
    ):
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
