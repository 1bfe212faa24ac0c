"""The page about a decoder: its measure on made-up attention, and the page of small models of both families."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from maskvit.checkpoints import save_imported
from maskvit.commands.report import decoder
from maskvit.commands.report.__main__ import main
from maskvit.core.modalities import RGB, Modality
from maskvit.core.types import Batch
from maskvit.data import scenes
from maskvit.objectives import build_objective


def save(directory, **objective):
    """A small untrained checkpoint."""
    block = dict(encoder=dict(width=32, depth=2, heads=2), decoder=dict(width=16, depth=2, heads=2), **objective)
    config = dict(image_size=[32, 32], modalities=dict(rgb=dict(RGB, patch=8)), objective=block)
    params, _ = jax.jit(build_objective(config).init)(jax.random.key(3))
    save_imported(directory, jax.device_get(params), {"config": config})
    return directory


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(scenes.render(5, 0, (40, 40))["rgb"]).save(folder / "a.png")
    return folder


def test_attention_as_a_multiple_of_an_even_spread():
    masked = jnp.asarray([[True, True, False, False], [True, True, True, False]])
    np.testing.assert_allclose(decoder.attention_by_kind(jnp.full((2, 3, 5, 5), 0.2), masked), [1.0, 1.0], rtol=1e-6)
    # A masked token gives 0.3 to each visible one, 0.1 to each masked one and the rest to the global token.
    weights = jnp.where(masked[:, None, None, :], 0.1, 0.3) * jnp.ones((2, 3, 4, 4))
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, 1), (0, 1)))
    np.testing.assert_allclose(decoder.attention_by_kind(weights, masked), [1.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize(("name", "words"), [("mae", "gives 1.42 and 0.39"), ("crossmae", "Weights with which each decoder block")])
def test_page(name, words, pictures, tmp_path, capsys):
    out = tmp_path / "decoder.html"
    checkpoint = save(tmp_path / "checkpoint", name=name)
    assert main(["decoder", "--checkpoint", str(checkpoint), "--images", str(pictures), "--out", str(out)]) == 0
    page = out.read_text()
    assert words in page and "a.png" in page and page.count('src="data:image/') == (1 if name == "mae" else 2)
    assert "block</h1><p>The error (root mean square, stored units of rgb) on hidden patches goes from " in page
    assert ("A masked token attends " if name == "mae" else "The decoder reads ") in page
    assert "1 picture(s)" in capsys.readouterr().out


def test_error_of_what_was_hidden():
    spec = Modality("depth", channels=1, patch=2, missing=0.0)
    stored = np.arange(1.0, 17.0).reshape(4, 4, 1)
    stored[0, 0] = 0.0  # not measured
    stage = stored + np.where(np.arange(4)[:, None, None] < 2, 3.0, 100.0)
    masked = np.array([[True, True], [False, False]])
    assert decoder.hidden_error(spec, stage, stored, masked) == pytest.approx(3.0)  # shown patches and what is missing do not count
    table, result = decoder._errors_by_block(np.array([[4.0, 2.0, 3.0], [2.0, 2.0, 1.0]]), spec, True)
    assert result.endswith("on hidden patches goes from 3 after the first decoder block to 2 after the last.")
    assert table[1].text.startswith("Block 1 lowers it most, by 1.") and table[0].rows[0] == (0, 3.0)


def test_what_a_crossmae_decoder_reads_most():
    weights = np.array([[0.1, -0.7, 0.2], [0.1, 0.5, -0.4]])
    assert decoder.most_read(weights, (0, 3, 6)) == (
        "The decoder reads encoder block 2 (60% of the absolute weights) and encoder block 5 (30% of the absolute weights) most; even "
        "weights would give each 33%."
    )
    assert "what enters the encoder (100%" in decoder.most_read(np.array([[2.0, 0.0]]), (0, 1))


def test_other_decoders_are_named(pictures, tmp_path, capsys):
    checkpoint = save(tmp_path / "checkpoint", name="multimae", inputs=("rgb",), outputs=("rgb",), num_visible=4)
    assert main(["decoder", "--checkpoint", str(checkpoint), "--images", str(pictures), "--out", str(tmp_path / "d.html")]) == 2
    assert "the decoder of this checkpoint is 'spatial'; its blocks are shown for: mae, crossmae" in capsys.readouterr().err


def test_the_last_stage_is_the_prediction():
    block = dict(name="crossmae", encoder=dict(width=32, depth=2, heads=2), decoder=dict(width=16, depth=2, heads=2))
    objective = build_objective(dict(image_size=32, modalities=dict(rgb=dict(RGB, patch=8)), objective=block))
    params, _ = jax.jit(objective.init)(jax.random.key(0))
    batch = Batch({"rgb": jnp.asarray(scenes.render(5, 0, (32, 32))["rgb"][None])})

    def run(params):
        tokens = objective.model.embed(params, objective.prepare(batch).values)
        plan, _ = objective.plan(params, batch, jax.random.split(jax.random.key(1), 1))
        memory = objective.encode_visible(params, tokens, plan)
        arguments = params, "norm_rgb", memory, plan, tokens.layout
        return objective.model.decode_after_blocks(*arguments, False), objective.model.decode(*arguments, False)

    stages, prediction = jax.jit(run)(params)
    assert len(stages) == 2 and not np.allclose(stages[0], stages[1])
    np.testing.assert_allclose(stages[1], prediction, rtol=1e-5, atol=1e-6)
