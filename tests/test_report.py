"""The report commands: their measures on made-up arrays, and whole pages and tables of a small model."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.checkpoints import save_imported
from maskvit.commands.report import attention, compare, guidance, masks, rows, strategies
from maskvit.commands.report.__main__ import main
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality
from maskvit.core.types import Batch, TokenLayout
from maskvit.data import scenes
from maskvit.data.sources import ListSource
from maskvit.features import load
from maskvit.objectives import build_objective
from maskvit.plots.pictures import HIDDEN, THROWN
from tests.runs import make_scenes, small_run

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
    params, _ = build_objective(CONFIG).init(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": CONFIG})
    return directory


@pytest.fixture
def source():
    rendered = (scenes.render(5, i, (32, 32)) for i in range(11))
    return ListSource([{name: sample[name] for name in ("rgb", "depth", "semseg")} for sample in rendered])


# Measures


def test_equal_counts():
    layout = TokenLayout(("a", "b", "c"), ((2, 2), (1, 2), (3, 3)))
    assert attention.equal_counts(layout, 7) == (3, 2, 2)
    assert attention.equal_counts(layout, 12) == (4, 2, 6)  # b is too small for its third: the others take it
    assert attention.equal_counts(layout, 15) == (4, 2, 9)
    with pytest.raises(ValueError, match="16 visible tokens of 15"):
        attention.equal_counts(layout, 16)
    assert attention.share_visible(196, 98, 588) == 33
    assert attention.share_visible(4, 1, 100) == 1 and attention.share_visible(4, 99, 100) == 3


def test_object_tokens():
    ids = np.zeros((1, 4, 4), int)
    ids[0, :2, :2] = 3  # all of the first token
    ids[0, 0, 2:] = 2  # half of the second
    ids[0, 3, 0] = 2  # a quarter of the third
    ids[0, 2:, 2:] = -1
    assert rows.object_tokens(ids, (2, 2), 2).tolist() == [[True, False, False, False]]
    assert rows.object_tokens(ids, (2, 2), 2, above=0.0).tolist() == [[True, True, True, False]]
    assert rows.object_tokens(ids, (2, 2), 3, above=0.0).tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="4 x 4 pixels does not divide into 3 x 2 tokens"):
        rows.object_tokens(ids, (3, 2), 2)


def test_overlap_and_lift_of_known_masks():
    objects = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)  # the last two say nothing
    present = np.ones_like(objects)
    perfect = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]], bool)
    masked = {"global": ~perfect, "mean": perfect, "random": np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1] * 4, [1] * 4], bool)}
    result = rows.row_overlaps(masked, objects, present)
    found = result["strategies"]
    assert found["mean"]["objects_hidden"] == {"mean": 1.0, "error": 0.0, "count": 2}
    assert found["mean"]["lift"]["mean"] == 2.0 and found["global"]["lift"]["mean"] == 0.0
    assert found["mean"]["hidden_are_object"] == {"mean": 0.75, "error": pytest.approx(0.25), "count": 2}
    assert found["random"]["objects_hidden"]["mean"] == 0.25
    assert result["difference"] == {"mean": 1.0, "error": 0.0, "count": 2}
    assert result["object_tokens"]["mean"] == pytest.approx(3 / 8)
    # A token that does not exist is neither hidden nor object.
    present[:, 1] = False
    found = rows.row_overlaps(masked, objects, present)["strategies"]
    assert found["mean"]["hidden_are_object"]["mean"] == 1.0 and found["mean"]["lift"]["mean"] == 3.0


def test_random_masks_have_lift_one():
    rng = np.random.default_rng(0)
    objects = rng.random((4000, 16)) < 0.3
    hidden = np.argsort(rng.random((4000, 16)), axis=1) < 12
    found = rows.row_overlaps({"global": hidden, "mean": hidden}, objects, np.ones_like(hidden))["strategies"]
    lift = found["mean"]["lift"]
    assert abs(lift["mean"] - 1) < 4 * lift["error"] < 0.05


def test_estimate():
    assert rows.estimate(np.array([1.0, 3.0, np.nan])) == (2.0, 1.0, 2)
    assert rows.estimate(np.array([np.nan]))[2] == 0 and np.isnan(rows.estimate(np.array([1.0])).error)


def test_outliers_and_their_attention():
    norms = np.ones((10, 20)) + 0.01 * np.random.default_rng(0).random((10, 20))
    norms[3, 7] = norms[4, 7] = 9.0
    norms[5, 5] = 1e6  # of a token that does not exist
    present = np.ones_like(norms, bool)
    present[5, 5] = False
    assert np.argwhere(rows.outliers(norms, present)).tolist() == [[3, 7], [4, 7]]
    flat, sink = np.full((10, 20), 0.05), np.full((10, 20), 0.5 / 19)
    sink[:, 7] = 0.5
    result = rows.sink_figures({"global": flat, "mean": sink}, norms, present)
    assert result["outliers"] == 2 and result["norm_max"] == 9.0
    assert result["rows"]["global"]["mass"]["mean"] == pytest.approx(0.05 * 2 / 10)
    assert result["rows"]["mean"]["mass"]["mean"] == pytest.approx(0.5 * 2 / 10)
    assert result["rows"]["global"]["position_peak"] == pytest.approx(1) and result["rows"]["mean"]["position_peak"] == pytest.approx(10)


def test_last_block_input_is_one_block_short(checkpoint):
    loaded = load(checkpoint)
    batch = Batch({"rgb": jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 256).astype(jnp.uint8)})
    prepared = loaded.objective.prepare(batch)
    tokens = loaded.model.embed(loaded.params, prepared.values)
    before = rows.last_block_input(loaded.model, loaded.params, tokens)
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
    assert main(["attention", "--checkpoint", str(checkpoint), "--images", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "2 picture(s)" in said.out and "broken.png" in said.err
    page = out.read_text()
    assert page.count('src="data:image/') == 2 and "http:" not in page and "https:" not in page
    assert "3 of 16, the share of 10 of 48" in page
    assert "<header><h1>Attention</h1><p>The most attended 2 of 16 tokens receive " in page


def test_how_concentrated_attention_is():
    flat = np.full((2, 20), 0.05)
    peaked = np.where(np.arange(20) < 2, 0.3, 0.4 / 18)[None].repeat(2, 0)
    assert attention.top_share(flat) == pytest.approx([0.1, 0.1]) and attention.top_share(peaked) == pytest.approx([0.6, 0.6])
    norms = np.ones((2, 20))
    norms[1, 3] = 50.0
    hidden = np.arange(20) < 10
    masked = {"global": np.stack([hidden, hidden]), "mean": ~np.stack([hidden, hidden])}
    maps = attention.AttentionMaps(np.zeros((0, 1, 1, 21, 21)), {"global": peaked, "mean": flat}, masked, norms)
    blocks, result = attention.what_it_attends_to(["a", "b"], [maps])
    assert result.startswith(
        "The most attended 2 of 20 tokens receive 60% of what the global token attends to, and 10% of what all tokens attend to on "
        "average; an even spread would give them 10%. 1 of 40 tokens has an outlier norm"
    )
    assert blocks[0].rows == [("a", "60%", "10%", "0%", 0), ("b", "60%", "10%", "0%", 1)]
    assert "hides 0%, where masks drawn at random would share 50%" in blocks[1].text and "largely different" in blocks[1].text


def test_attention_maps_follow_the_guidance(checkpoint):
    loaded = load(checkpoint)
    batch = Batch({"rgb": jax.random.randint(jax.random.key(0), (2, 32, 32, 3), 0, 256).astype(jnp.uint8)})
    maps = jax.device_get(attention.attention_maps(loaded.objective, loaded.params, batch, 3))
    assert maps.attentions.shape == (2, 2, 2, 17, 17)
    np.testing.assert_allclose(maps.attentions[:, -1, :, -1, :16].mean(1), maps.rows["global"], rtol=1e-5)
    np.testing.assert_allclose(maps.attentions[:, -1].mean((1, 2))[:, :16], maps.rows["mean"], rtol=1e-5)
    for query, row in maps.rows.items():
        assert (maps.masked[query].sum(1) == 13).all()
        assert row[maps.masked[query]].reshape(2, -1).min(1).tolist() > row[~maps.masked[query]].reshape(2, -1).max(1).tolist()


def test_rows_command(checkpoint, source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rows, "open_source", lambda kind, specs, **_: source)
    out = tmp_path / "rows.json"
    arguments = ["rows", "--checkpoint", str(checkpoint), "--data_dir", "x", "--batch_size", "8", "--above", "0.25", "--out", str(out)]
    assert main(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    result = json.loads(out.read_text())
    assert result["images"] == 11
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
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


# Runs side by side


def write_run(folder, losses, accuracies, epoch_per_step=0.5, rate=1.0):
    folder.mkdir(parents=True)
    lines = [{"step": 0, "knn/top1": accuracies[0]}]
    for step, (loss, accuracy) in enumerate(zip(losses, accuracies[1:], strict=True), 1):
        lines.append({"step": step, "epoch": step * epoch_per_step, "learning_rate": rate / step, "loss": loss, "loss/rgb": loss})
        lines.append({"step": step, "knn/top1": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def runs(tmp_path):
    """A sweep of two cells with two seeds each, and a run of its own."""
    home = tmp_path / "sweep"
    write_run(home / "random" / "seed_0", [3.0, 2.0], [10.0, 20.0, 30.0])
    write_run(home / "random" / "seed_1", [3.0, 1.0], [10.0, 20.0, 40.0])
    write_run(home / "high" / "seed_0", [3.0, 1.5], [10.0, 36.0, 36.0])
    write_run(home / "high" / "seed_1", [4.0, 2.5], [10.0, 11.0, 12.0])
    write_run(tmp_path / "alone", [1.4, float("nan")], [36.0, 35.0, 34.0])
    return tmp_path


def test_find_runs_understands_sweeps(runs):
    found = compare.find_runs([runs / "alone", runs / "sweep"])
    assert {name: [folder.name for folder in folders] for name, folders in found.items()} == {
        "alone": ["alone"], "high": ["seed_0", "seed_1"], "random": ["seed_0", "seed_1"],
    }  # fmt: skip
    assert compare.find_runs([runs / "sweep" / "high"]).keys() == {"high"}
    assert len(compare.find_runs([runs / "sweep" / "high" / "seed_1", runs / "sweep" / "high"])["high"]) == 2
    with pytest.raises(FileNotFoundError, match="holds no run"):
        compare.find_runs([runs / "nowhere"])
    write_run(runs / "other" / "high" / "seed_0", [1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="have the same name"):
        compare.find_runs([runs / "sweep", runs / "other"])


def test_epochs_to_reach_a_level(runs):
    run = compare.read_run(runs / "sweep" / "high" / "seed_0")
    assert run.curves["knn/top1"] == ([0.0, 0.5, 1.0], [10.0, 36.0, 36.0])
    assert compare.epochs_to(run.curves["knn/top1"], 35.0, rising=True) == 0.5
    assert compare.epochs_to(run.curves["knn/top1"], 37.0, rising=True) == float("inf")
    assert compare.epochs_to(run.curves["loss"], 2.0, rising=False) == 1.0
    (runs / "young").mkdir()
    for text in ("", '{"step": 2, "knn/top1": 1.0}\n'):
        (runs / "young" / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match="no training step"):
            compare.read_run(runs / "young")
    for text in ("3\n", '{"loss": 1}\n'):
        (runs / "young" / "metrics.jsonl").write_text(text)
        with pytest.raises(ValueError, match="line 1 of .*metrics.jsonl is no row of metrics"):
            compare.read_run(runs / "young")


def test_a_cell_without_training_is_compared_by_its_evaluation(runs, capsys):
    """`total="0 steps"` evaluates alone: no step, no epoch, no loss."""
    folder = runs / "sweep" / "untrained" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 0, "knn/top1": 12.5}\n')
    assert compare.read_run(folder).curves == {"knn/top1": ([0.0], [12.5])}
    for baseline in ("random", "untrained"):
        out = runs / f"{baseline}.html"
        assert main(["compare", str(runs / "sweep"), "--baseline", baseline, "--out", str(out)]) == 0
        assert "<td>untrained</td>" in out.read_text() and "<td>12.5</td>" in out.read_text()


def test_more_of_an_error_is_worse(tmp_path):
    """Depth's rmse falls; the baseline's level is reached from above, and who is below it is better."""
    for cell, ends in (("random", (2.0, 2.2)), ("high", (1.0, 1.1)), ("low", (3.0, 3.1))):
        for seed, end in enumerate(ends):
            folder = tmp_path / cell / f"seed_{seed}"
            folder.mkdir(parents=True)
            lines = [{"step": step, "epoch": step, "depth/rmse": value} for step, value in ((1, 4.0), (2, end))]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = {cell: [compare.read_run(tmp_path / cell / f"seed_{i}") for i in range(2)] for cell in ("random", "high", "low")}
    page = compare.compare_page(runs, "random")
    assert "<p>Of 2 runs compared with random, 1 is better (high -1.05) and 1 is worse (low +0.95) in depth/rmse." in page
    assert "random ends with 2.1 in depth/rmse: high gets there after 2 epochs; some or all seeds never get there of low." in page


def test_compare_page(runs, capsys):
    out = runs / "compare.html"
    assert main(["compare", str(runs / "sweep"), str(runs / "alone"), "--baseline", "random", "--out", str(out)]) == 0
    assert "5 run(s) of 3 cell(s)" in capsys.readouterr().out
    page = out.read_text()
    assert page.count('src="data:image/') == 3 and "http:" not in page and "https:" not in page
    assert "<td>35\u00a0±\u00a07.1</td>" in page and "<td>1.5\u00a0±\u00a00.71</td>" in page  # random's final accuracy and loss
    assert "<th>knn/top1 35</th>" in page and "<td>0.5, never in 1</td>" in page and "<td>0</td>" in page
    said = (
        "In knn/top1 the seeds show no difference from random: high -11; 1 cannot be judged by fewer than two seeds (alone -1).",
        "random ends with 35 in knn/top1: alone gets there after 0 epochs; some or all seeds never get there of high.",
    )
    assert f"<h1>Runs compared</h1><p>{said[0]}" in page and said[1] in page
    assert main(["compare", str(runs / "sweep"), "--baseline", "no", "--out", str(out)]) == 2
    assert "--baseline is 'no', which is none of the runs: high, random" in capsys.readouterr().err


# Strategies


@pytest.fixture(scope="module")
def scenes_dir(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def strategy_file(tmp_path_factory, scenes_dir):
    config = small_run(scenes_dir, global_batch=2048)  # more than there are scenes
    config["objective"]["loss_weight"] = {}
    attention = dict(name="self_attention")
    cells = {
        "random": {},
        "high": {"objective.scores": dict(name="attention_high"), "objective.guidance": attention},
        "weighted": {"objective.guidance": attention, "objective.loss_weight": dict(tau=0.75)},
        "lost_maps": {"objective.scores": dict(name="attention_high"), "objective.guidance": dict(name="stored", path="nowhere")},
    }
    path = tmp_path_factory.mktemp("config") / "strategies.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n\n"
        f"def get_sweep():\n    return {cells!r}\n"
    )
    return str(path)


def test_strategies_show_what_they_hide(strategy_file):
    config, chosen = strategies.find_strategies(strategy_file, None)
    shows = strategies.show_strategies(config, chosen, None, 3, None, 1.0)
    assert (
        list(shows.shown) == ["random", "high", "weighted"]
        and list(shows.missing) == ["lost_maps"]
        and "nowhere" in shows.missing["lost_maps"]
    )
    high, weighted = shows.shown["high"], shows.shown["weighted"]
    assert high.heads["rgb"].shape == (3, 2, 4, 4) and not high.weights and not shows.shown["random"].guidance
    for name, masked in high.masked.items():
        np.testing.assert_allclose(high.guidance[name], high.heads[name].mean(1), rtol=1e-4)
        for hidden, values in zip(masked, high.guidance[name], strict=True):
            assert not hidden.any() or hidden.all() or values[hidden].min() >= values[~hidden].max()
        # The same keys and budget: as many are hidden everywhere; weighting leaves random masks as they are.
        assert (masked.sum((1, 2)) == shows.shown["random"].masked[name].sum((1, 2))).all()
        assert (weighted.masked[name] == shows.shown["random"].masked[name]).all()
    assert weighted.weights["rgb"].min() == 1.0 and weighted.weights["rgb"].max() == pytest.approx(np.exp(1 / 0.75), rel=1e-5)
    assert "Fresh parameters" in shows.remarks["high"]


def shown(masked, guidance=None):
    """A strategy that hides `masked` of one modality."""
    return strategies.Shown({}, {"rgb": masked}, {} if guidance is None else {"rgb": guidance}, {}, {}, {})


def test_what_strategies_hide_in_numbers():
    """Of 20 tokens the guidance is highest on two: one strategy hides both, one neither, one half of them."""
    values = np.arange(20.0).reshape(1, 4, 5).repeat(2, 0)
    places = np.arange(20).reshape(1, 4, 5).repeat(2, 0)
    high, low, random = shown(places >= 10, values), shown(places < 10, values), shown(places % 2 == 0)
    shows = strategies.Shows({"low": low, "random": random, "high": high}, {}, {}, {"rgb": Modality("rgb", patch=8)}, ["a", "b"], "")
    blocks, result = masks.what_is_hidden(shows)
    assert result == (
        "Of the tenth of the tokens that low is guided to most, high hides 100%, random hides 50%, low hides 0%. The 3 strategies hide "
        "50% of all tokens, over 2 images."
    )
    assert [row[0] for row in blocks[0].rows] == ["low", "random", "high"] and blocks[0].rows[2][1:] == ["50%", "50%", "100%"]
    assert "high hides 50 points more" in blocks[1].text
    _, result = masks.what_is_hidden(shows._replace(shown={"random": random}))
    assert result == "random hides 50% of all tokens, over 2 images. None is guided, so none looks at what is in the image."
    _, result = masks.what_is_hidden(shows._replace(remarks={"high": "Fresh parameters: what they attend to means nothing."}))
    assert result.endswith("The parameters are fresh, so what they attend to means nothing: give --checkpoint.")


def test_how_maps_agree_in_numbers():
    rising = np.arange(20.0).reshape(1, 4, 5).repeat(2, 0)
    constant = np.ones_like(rising)
    assert guidance.rank_correlation(rising, rising**3) == pytest.approx(1)
    assert guidance.rank_correlation(rising, -rising) == pytest.approx(-1)
    assert np.isnan(guidance.rank_correlation(rising, constant))
    assert guidance.weight_on_top(np.where(rising >= 18, 9.0, 1.0)) == pytest.approx(0.5)
    blocks, result = guidance.what_weighs({"a": rising, "b": rising**3, "c": -rising}, "rgb", 0.75)
    assert result.startswith(
        "3 map sets agree in part on which rgb tokens matter: rank correlations from -1.00 (a and c) to 1.00 (a and b). At tau"
    )
    assert blocks[0].rows[0] == ("a", "1", "1.00", "-1.00")
    _, result = guidance.what_weighs({"a": rising, "b": rising**3}, "rgb", 0.75)
    assert result.startswith("a and b largely agree on which rgb tokens matter: rank correlation 1.00.")
    _, result = guidance.what_weighs({"flat": constant}, "rgb", 0.75)
    assert "has 10% of the loss weight; even weights would give it 10%" in result and "one map set" in result


def test_masks_and_guidance_pages(strategy_file, tmp_path, capsys):
    out = tmp_path / "masks.html"
    assert main(["masks", "--config", strategy_file, "--images", "2", "--out", str(out)]) == 1  # the stored maps are not there
    assert "3 strategies on 2 image(s)" in capsys.readouterr().out
    page = out.read_text()
    assert page.count('src="data:image/') == 2 + 1 + 3 * 3 and "http:" not in page and "https:" not in page  # 1: names of classes
    assert "The classes of semseg." in page and "hides 100%" in page and "The parameters are fresh" in page
    assert "not shown: no map set in" in page
    out = tmp_path / "guidance.html"
    arguments = ["guidance", "--config", strategy_file, "--strategies", "random,high,weighted", "--images", "2", "--out", str(out)]
    assert main(arguments) == 0
    assert "1 map set(s) on 2 image(s)" in capsys.readouterr().out  # high and weighted read the same attention
    page = out.read_text()
    assert page.count('src="data:image/') == 3 and "http:" not in page
    assert main([*arguments, "--maps", "DINO=nowhere"]) == 1 and "not shown: DINO" in capsys.readouterr().out


def test_a_sheet_alone_and_what_is_thrown_away(scenes_dir, tmp_path, capsys):
    """Beside MultiMAE that rebuilds a half of what it hides: iBOT, whose masks come out of its teacher's pass."""
    config = small_run(scenes_dir)
    views = dict(scale=(0.25, 1.0), flip=0.5, views=dict(local_crops=2, local_size=(16, 16), local_scale=(0.05, 0.25)))
    ibot = dict(
        name="ibot", inputs=("rgb",), encoder=config["objective"]["encoder"], scores=dict(name="attention_high"),
        projection=dict(hidden=16, bottleneck=8, num_prototypes=16), masking=dict(ratio=0.5, ratio_var=0.0, probability=1.0),
    )  # fmt: skip
    cells = {"half": {"objective.predicted": dict(share=0.5, by="scores")}, "teacher": {"objective": ibot, "data.augment": views}}
    path = tmp_path / "file.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({config!r})\n\n"
        f"def get_sweep():\n    return {cells!r}\n"
    )
    shows = strategies.show_strategies(*strategies.find_strategies(str(path), None), None, 2, None, 1.0)
    assert not shows.missing
    half, teacher = shows.shown.values()
    for name, masked in half.masked.items():
        thrown = half.thrown[name]
        assert not (thrown & ~masked).any()
        assert (thrown.sum((1, 2)) == masked.sum((1, 2)) - np.round(masked.sum((1, 2)) / 2)).all()
    (masked,) = teacher.masked.values()
    assert not teacher.thrown and (masked.sum((1, 2)) == 8).all()
    values = teacher.guidance["rgb"]
    assert all(own[hidden].min() >= own[~hidden].max() for own, hidden in zip(values, masked, strict=True))
    out = tmp_path / "masks.png"
    assert main(["masks", "--config", str(path), "--images", "1", "--out", str(out)]) == 0
    assert "2 strategies on 1 image(s)" in capsys.readouterr().out
    with Image.open(out) as sheet:
        colors = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert {HIDDEN, THROWN} <= colors


def test_weights_are_those_of_the_paper():
    maps = np.array([[[0.2, 0.2], [0.7, 1.2]]], np.float32)
    np.testing.assert_allclose(guidance.weights_of(maps, None), [[[0, 0], [0.5, 1]]], atol=1e-6)
    for tau, largest in ((0.7, 4.1727), (0.75, 3.7937), (0.8, 3.4903)):
        weights = guidance.weights_of(maps, tau)
        assert (weights[0, 0] == 1).all() and weights.max() == pytest.approx(largest, abs=1e-4)


def test_strategy_mistakes_are_named(strategy_file, checkpoint, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x.html")]
    for arguments, message in (
        (["masks", "--config", strategy_file, "--strategies", "no", *out], "its get_sweep() has random, high, weighted, lost_maps"),
        (["masks", "--config", strategy_file, "--strategies", "random", "--checkpoint", str(checkpoint), *out], "has shape"),
        (["masks", "--config", strategy_file, "--strategies", "lost_maps", *out], "no strategy can be shown; lost_maps: no map set"),
        (["guidance", "--config", strategy_file, "--strategies", "random", *out], "no strategy has a guidance source"),
        (["guidance", "--config", strategy_file, "--maps", "DINO", *out], "not of the form name=folder"),
        (["guidance", "--config", strategy_file, "--strategies", "high", "--modality", "infrared", *out], "the inputs: rgb, depth, semseg"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
