"""The page to look into a checkpoint: its arithmetic on arrays, its files, its answers, its server, and a browser that clicks."""

from __future__ import annotations

import base64
import io
import json
import threading
import urllib.error
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.checkpoints import save_imported
from maskvit.commands.explore import __main__ as command
from maskvit.commands.explore import look
from maskvit.commands.explore.answers import Explorer, from_bits, pasted, to_bits
from maskvit.commands.explore.page import explore_page, result
from maskvit.commands.explore.samples import find_samples
from maskvit.commands.explore.server import Server
from maskvit.core.keys import sample_keys
from maskvit.core.modalities import DEPTH, RGB, SEMSEG, Modality
from maskvit.core.types import TokenLayout
from maskvit.data import scenes
from maskvit.features import load
from maskvit.masking.plan import drop, show_all
from maskvit.objectives import build_objective
from tests.browser import open_browser
from tests.tiny import fresh_params, on_device, tiny_batch, tiny_objective

CONFIG = dict(
    image_size=[32, 32],
    modalities=dict(
        rgb=dict(RGB, patch=8), depth=dict(DEPTH, patch=8, missing=0.0), semseg=dict(SEMSEG, num_classes=len(scenes.CLASS_NAMES), patch=8)
    ),
    objective=dict(
        name="multimae", inputs=["rgb", "depth", "semseg"], outputs=["rgb", "depth", "norm_rgb"], num_visible=10,
        encoder=dict(width=48, depth=2, heads=2), decoder=dict(width=16, depth=1, heads=2),
    ),
)  # fmt: skip


def save(directory, config):
    """A small untrained checkpoint."""
    params, _ = build_objective(config).init(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": config})
    return str(directory)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("imported"), CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scenes with all modalities and one of colors alone."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("rgb", "depth", "semseg"):
        (root / name).mkdir()
    for i in range(3):
        sample = scenes.render(5, i, (32, 32))
        Image.fromarray(sample["rgb"]).save(root / "rgb" / f"{i}.png")
        if i < 2:
            counts = np.nan_to_num(sample["depth"] / scenes.METRES_PER_COUNT, nan=0)
            Image.fromarray(counts.clip(0, 65535).astype(np.uint16)).save(root / "depth" / f"{i}.png")
            Image.fromarray(sample["semseg"]).save(root / "semseg" / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def explorer(checkpoint, folder):
    loaded = load(checkpoint)
    return Explorer(loaded, find_samples(folder, loaded.model), "runs/<b>", 1.0)


def pixels(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).convert("RGB"))


# Arithmetic


def test_a_plan_hides_what_is_asked_for_and_what_is_absent():
    masked = jnp.array([[True, False, False, True, False], [False] * 5, [True] * 5])
    present = jnp.array([[True, True, False, True, True], [True] * 5, [True] * 5])
    plan = look.plan_of(masked, present)
    assert plan.visible_ids.shape == plan.predicted_ids.shape == (3, 5)
    shown = [np.asarray(ids)[np.asarray(valid)].tolist() for ids, valid in zip(plan.visible_ids, plan.visible_valid, strict=True)]
    asked = [np.asarray(ids)[np.asarray(valid)].tolist() for ids, valid in zip(plan.predicted_ids, plan.predicted_valid, strict=True)]
    assert shown == [[1, 4], [0, 1, 2, 3, 4], []] and asked == [[0, 3], [], [0, 1, 2, 3, 4]]
    everything = show_all(TokenLayout(("a",), ((1, 5),)), 1)
    np.testing.assert_array_equal(look.plan_of(masked[1:2], present[1:2]).visible_ids, everything.visible_ids)


def test_rebuilding_with_padding_is_rebuilding_and_one_program_serves_all_masks():
    """The same maps and losses as an ordinary plan of the visible tokens alone gives."""
    objective = tiny_objective()
    params, batch = fresh_params(objective), on_device(tiny_batch(2))
    batch = batch._replace(present=jnp.ones((2, 3), bool))
    layout, rng = objective.model.layout, np.random.default_rng(0)
    prepared = objective.prepare(batch)

    @jax.jit
    def ordinary(hidden):
        counts = jnp.stack([(~hidden)[:, span].sum(1) for span in layout.spans()], axis=1)
        plan = drop(hidden.astype(jnp.float32), counts, layout, 12)
        tokens = objective.model.embed(params, prepared.values_of(objective.model.inputs), prepared.present)
        made = objective.reconstruct(params, tokens, plan)
        return {n: objective.to_stored(n, one, prepared) for n, one in made.items()}, objective.loss_sums(made, prepared, plan, layout)

    look.rebuild.clear_cache()
    for visible in (1, 47, 12):
        hidden = jnp.asarray(np.argsort(rng.random((2, 48)), axis=1) >= visible)
        found = look.rebuild(objective, params, batch, hidden)
    maps, losses = ordinary(hidden)
    for name, values in maps.items():
        np.testing.assert_allclose(found.maps[name], values, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(found.losses[name], losses[name], rtol=1e-4)
    assert look.rebuild._cache_size() == 1


@pytest.mark.parametrize("budget", look.BUDGET_NAMES)
def test_as_many_tokens_are_shown_as_asked_for_and_one_program_serves_all_numbers(budget):
    layout = TokenLayout(("a", "b"), ((4, 4), (2, 4)))
    keys, present = sample_keys(0, 0, 2), jnp.ones((2, 24), bool).at[1, 16:].set(False)
    guidance = jax.random.uniform(jax.random.key(1), (2, 24))
    scores = look.score(keys, layout, guidance, present, "attention_high")
    np.testing.assert_array_equal(scores, guidance)
    look.spend.clear_cache()
    for visible in (1, 7, 20, 24):
        masked = np.asarray(look.spend(keys, layout, scores, present, jnp.int32(visible), budget))
        assert (~masked).sum(1).tolist() == [visible, min(visible, 16)] and masked[1, 16:].all()
        for part in (slice(0, 16), slice(16, 24)):  # the most attended go first
            hidden, shown = np.asarray(guidance)[0, part][masked[0, part]], np.asarray(guidance)[0, part][~masked[0, part]]
            assert not len(hidden) or not len(shown) or hidden.min() > shown.max()
    assert look.spend._cache_size() == 1


def test_visible_patches_are_kept():
    spec = Modality("rgb", patch=8, scale=1 / 255)
    stored, rebuilt = np.full((16, 16, 3), 200, np.uint8), np.full((16, 16, 3), 10.0, np.float32)
    masked = np.array([[True, False], [False, False]])
    picture = pasted(spec, rebuilt, stored, masked)
    assert (picture[:8, :8] == 10).all() and (picture[8:] == 200).all() and (picture[:8, 8:] == 200).all()
    assert (pasted(spec, rebuilt, stored, None) == 10).all()


def test_masks_travel_as_text():
    flags = np.array([True, False, True])
    assert to_bits(flags) == "101" and from_bits("101", 3).tolist() == flags.tolist()
    for wrong in ("10", "102", 101, None):
        with pytest.raises(ValueError, match="a mask is 3 digits"):
            from_bits(wrong, 3)


# Files


def test_files_are_paired_by_name(folder, explorer, tmp_path):
    found = {task.key: sorted(task.files) for task in find_samples(folder, explorer.model)}
    assert found == {"0": ["depth", "rgb", "semseg"], "1": ["depth", "rgb", "semseg"], "2": ["rgb"]}
    alone = find_samples(folder / "rgb", explorer.model)
    assert [task.key for task in alone] == ["0.png", "1.png", "2.png"] and set(alone[0].files) == {"rgb"}
    (tmp_path / "rgb").mkdir()
    with pytest.raises(FileNotFoundError, match="no files below"):
        find_samples(tmp_path, explorer.model)
    for suffix in ("png", "bmp"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "rgb" / f"a.{suffix}")
    with pytest.raises(ValueError, match="two files for one name: .*a.bmp and .*a.png"):
        find_samples(tmp_path, explorer.model)


# Answers


def test_a_sample_and_what_it_lacks(explorer):
    whole, bare = explorer.picture(0)["inputs"], explorer.picture(2)["inputs"]
    assert not any(one["absent"] for one in whole.values()) and bare["depth"]["absent"] and not bare["rgb"]["absent"]
    assert set(bare["depth"]["present"]) == {"0"} and "picture" not in bare["depth"]
    assert pixels(whole["rgb"]["components"]).shape == (4, 4, 3) and pixels(whole["rgb"]["picture"]).shape == (32, 32, 3)
    with pytest.raises(ValueError, match="there is no sample 3"):
        explorer.picture(3)


def test_what_is_rebuilt_follows_the_mask(explorer):
    picture = pixels(explorer.picture(0)["inputs"]["rgb"]["picture"])
    shown = explorer.rebuild(0, "0" * 48)["outputs"]
    np.testing.assert_array_equal(pixels(shown["rgb"]["picture"]), picture)
    assert shown["rgb"]["note"] == "nothing hidden"
    one = explorer.rebuild(0, "1" + "0" * 47)["outputs"]
    changed = (pixels(one["rgb"]["picture"]) != picture).any(-1)
    assert changed[:8, :8].any() and not changed[8:].any() and not changed[:, 8:].any() and one["rgb"]["note"].startswith("mse ")
    # Depth that nobody gave is rebuilt from the colors alone; patches normalized by a true patch need one.
    bare = explorer.rebuild(2, "0" * 48)["outputs"]
    assert bare["depth"]["note"].startswith("absent") and pixels(bare["depth"]["picture"]).std() > 0
    explorer.rebuild(0, "1" * 48)


def test_masks_that_strategies_draw(explorer):
    for strategy in explorer.strategies:
        assert explorer.draw(0, strategy, "equal", 12, 0)["masked"].count("0") == 12
    drawn = [explorer.draw(0, "random", "equal", 12, seed)["masked"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    high, low = (explorer.draw(0, f"attention_{name}", "joint", 24, 0)["masked"] for name in ("high", "low"))
    assert all(a != b for a, b in zip(high, low, strict=True))  # what one half hides the other shows
    assert explorer.draw(2, "random", "equal", 40, 0)["masked"][:16].count("0") == 16  # of 40 there are 16
    for arguments, words in ((("pie", "equal", 3), "strategy is 'pie'"), (("random", "fixed", 3), "budget is 'fixed'"),
                             (("random", "equal", 0), "0 tokens shown; there are 1 to 48")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            explorer.draw(0, *arguments, 0)


def test_a_token(explorer):
    first, last = explorer.token(0, 5, 0), explorer.token(0, 5, 1)
    assert len(last["attention"]) == len(last["similarity"]) == 48 and last["similarity"][5] == 1.0
    assert 0.5 < sum(last["attention"]) < 1 and first["attention"] != last["attention"] and first["similarity"] == last["similarity"]
    every, n = explorer.tokens(0), 48
    levels = np.frombuffer(base64.b64decode(every["attention"]), np.uint8).reshape(n, n)
    np.testing.assert_allclose(levels[5] / 255 * every["most"][5], last["attention"], atol=every["most"][5] / 500)
    alike = np.frombuffer(base64.b64decode(every["similarity"]), np.uint8).reshape(n, n)
    np.testing.assert_allclose(alike[5] / 127.5 - 1, last["similarity"], atol=0.005)
    with pytest.raises(ValueError, match="absent"):
        explorer.token(2, 20, 1)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (dict(CONFIG["objective"], outputs=[]), "no decoder: it was converted or trained without outputs"),
        (dict(name="dino", inputs=["rgb"], encoder=CONFIG["objective"]["encoder"]), "is of the objective 'dino', which rebuilds nothing"),
    ],
    ids=["without outputs", "dino"],
)
def test_a_checkpoint_without_decoder_says_so(objective, words, tmp_path, folder):
    loaded = load(save(tmp_path, dict(CONFIG, objective=objective)))
    found = Explorer(loaded, find_samples(folder, loaded.model), "x", 1.0)
    about = found.about()
    assert words in about["cannot_rebuild"] and about["outputs"] == [] and about["start"]["visible"] < about["tokens"]
    masked = found.draw(0, "attention_high", "equal", 5, 0)["masked"]
    assert found.token(0, 0, 1) and masked.count("0") == 5
    with pytest.raises(ValueError, match=words):
        found.rebuild(0, masked)
    assert words in explore_page(about)


def test_what_strategies_leave_to_rebuild_in_words():
    drawn = {
        name: [{"outputs": {}}, {"outputs": {"rgb": {"loss": loss}, "depth": {"loss": 1.0}, "norm_rgb": {"note": "absent", "loss": None}}}]
        for name, loss in (("random", 0.5), ("attention_high", 1.5))
    }
    about = {"cannot_rebuild": "", "tokens": 48, "start": {"visible": 11}}
    stored = {"visible": [5, 12], "strategies": list(drawn), "samples": [{"drawn": drawn}, {"problem": "broken"}]}
    assert result(about, stored) == (
        "With 12 of 48 tokens shown, the loss on the hidden ones, summed over outputs and averaged over pictures, is 1.5 (random), 2.5 "
        "(attention_high): random leaves what is easiest to rebuild."
    )
    assert result(about, {**stored, "samples": []}) == "" and result({"cannot_rebuild": "No decoder."}, stored) == "No decoder."


# The server and the page


@pytest.fixture(scope="module")
def server(explorer):
    with Server(0) as server:
        server.explorer, server.page = explorer, explore_page(explorer.about())
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server, path, body=None, **headers):
    """(status, answer)"""
    headers = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.address + path, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_server_answers_as_the_functions_do(server, explorer):
    assert server.server_address[0] == "127.0.0.1"
    status, text = asked(server, "token?number=0&token=5&block=1")
    assert status == 200 and json.loads(text) == explorer.token(0, 5, 1)
    mask = "1" * 20 + "0" * 28
    status, text = asked(server, "rebuild", {"number": 0, "masked": mask})
    assert status == 200 and json.loads(text)["outputs"] == explorer.rebuild(0, mask)["outputs"]
    drawn = dict(number=1, strategy="random", budget="equal", visible=9, seed=2)
    assert json.loads(asked(server, "draw", drawn)[1]) == explorer.draw(**drawn)
    assert "<title>Explore</title>" in asked(server, "")[1]


def test_the_server_refuses(server):
    assert asked(server, "nothing") == (404, '{"error": "there is no /nothing"}')
    assert asked(server, "picture?number=x")[0] == asked(server, "rebuild", {"number": 0})[0] == asked(server, "draw", [1])[0] == 400
    assert asked(server, "picture?number=9")[1] == '{"error": "there is no sample 9: they count from 0 to 2"}'
    assert asked(server, "rebuild", {}, **{"Content-Type": "text/plain"})[0] == 415
    for path in ("", "picture?number=0"):  # a page of another site whose name leads here
        assert asked(server, path, Host="example.org:80")[0] == 403
    with pytest.raises(OSError, match=r"port \d+ is taken: give another with --port"):
        Server(server.server_address[1])


def test_the_page_needs_nothing_outside_and_ends_where_it_should(explorer):
    about = dict(explorer.about(), samples=["</script><b>"])
    text = explore_page(about)
    assert "</script><b>" not in text and "runs/&lt;b&gt;" in text and "http:" not in text and "https:" not in text
    assert "connect-src 'self'" in text and "connect-src" not in explore_page(about, {"samples": []})


def test_the_commands_own_mistakes(capsys):
    mistakes = {"--budgets 0.1,2": "2 must be above 0 and at most 1", "--strategies pie": "'pie' is no strategy", "--port x": "no port"}
    for flags, words in mistakes.items():
        with pytest.raises(SystemExit):
            command.main(["--checkpoint", "x", "--images", "x", *flags.split()])
        assert words in capsys.readouterr().err


# A browser


def test_clicking_a_cell_changes_what_is_rebuilt(server, tmp_path):
    with open_browser(str(tmp_path)) as page:
        page.open(server.address)
        page.wait("document.querySelectorAll('#rebuilt img').length === 3 && document.querySelector('#similarity-legend').textContent")
        page.value("document.querySelector('#all').click()")
        page.wait("document.querySelector('#count').textContent.startsWith('48 of 48')")
        source = "document.querySelector('#rebuilt img').src"
        whole = page.wait(f"document.querySelector('#rebuilt').textContent.includes('nothing hidden') && {source}")
        page.drag("#tokens [data-token='5']")
        assert page.value("document.querySelector(\"#tokens [data-token='5']\").className") == "hidden"
        one = page.wait(f"{source} !== {json.dumps(whole)} && {source}")
        changed = (pixels(one) != pixels(whole)).any(-1)
        assert changed[8:16, 8:16].any() and changed.sum() == changed[8:16, 8:16].sum()
        page.drag("#tokens [data-token='0']", "#tokens [data-token='1']", "#tokens [data-token='2']")  # a drag hides all it passes
        page.wait("document.querySelector('#count').textContent.startsWith('44 of 48')")
        page.drag("#tokens [data-token='5']")
        page.wait("document.querySelector('#count').textContent.startsWith('45 of 48')")
        page.drag("#attention [data-token='7']")
        page.wait("document.querySelector('#attention-hint').textContent.includes('row 1, column 3')")
        page.value("document.querySelector('#sample').value = 2; document.querySelector('#sample').dispatchEvent(new Event('change'))")
        page.wait("document.querySelector('#tokens').textContent.includes('absent: no file of it')")
        assert page.value("document.querySelector('#problem').hidden") and not page.told
        page.open(server.address, 390)
        page.wait("document.querySelectorAll('#rebuilt img').length")
        assert page.value("document.documentElement.scrollWidth") == 390


def test_a_page_without_server_chooses_among_what_was_computed(checkpoint, folder, tmp_path, capsys):
    out = tmp_path / "page.html"
    flags = ["--checkpoint", checkpoint, "--images", str(folder), "--crop", "1", "--out", str(out)]
    assert command.main([*flags, "--budgets", "0.25,0.5", "--strategies", "random,attention_low"]) == 0
    assert f"3 picture(s) in {out}" in capsys.readouterr().out
    with open_browser(str(tmp_path / "browser")) as page:
        page.open(out.as_uri())
        source = "document.querySelector('#rebuilt img').src"
        page.wait("document.querySelectorAll('#rebuilt img').length === 3")
        few = page.wait(f"document.querySelector('#count').textContent.startsWith('12 of 48') && {source}")
        page.value("document.querySelector('#visible').value = 1; document.querySelector('#visible').dispatchEvent(new Event('input'))")
        page.wait("document.querySelector('#count').textContent.startsWith('24 of 48')")
        many = page.wait(f"{source} !== {json.dumps(few)} && {source}")
        page.value("strategy.value = 'attention_low'; strategy.dispatchEvent(new Event('change'))")
        page.wait(f"{source} !== {json.dumps(many)}")
        page.drag("#similarity [data-token='9']")
        page.wait("document.querySelector('#features-hint').textContent.includes('row 2, column 1')")
        assert page.value("document.querySelector('#buttons').hidden") and not page.told
