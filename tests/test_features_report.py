"""Patch features as colors and as similarity: on made-up features, and the page of a small model."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from PIL import Image

from maskvit.checkpoints import save_imported
from maskvit.commands.report import features
from maskvit.commands.report.__main__ import main
from maskvit.core.modalities import RGB
from maskvit.data import scenes
from maskvit.objectives import build_objective
from maskvit.plots import components

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    block = dict(name="mae", encoder=dict(width=32, depth=2, heads=2), decoder=dict(width=16, depth=1, heads=2))
    config = dict(image_size=[32, 32], modalities=dict(rgb=dict(RGB, patch=8)), objective=block)
    params, _ = build_objective(config).init(jax.random.key(3))
    directory = tmp_path_factory.mktemp("imported")
    save_imported(directory, jax.device_get(params), {"config": config})
    return str(directory)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(scenes.render(5, i, (40, 40))["rgb"]).save(folder / f"{i}.png")
    return folder


def test_the_basis_is_that_of_the_singular_vectors():
    rows = RNG.standard_normal((300, 5)) * [9, 5, 3, 0.1, 0.1] @ np.linalg.qr(RNG.standard_normal((5, 5)))[0] + 4
    basis = components.fit_basis(rows)
    expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs((basis.axes * expected[2][:3]).sum(1)), 1, atol=1e-9)
    np.testing.assert_allclose(basis.spread, (expected[1] ** 2 / (expected[1] ** 2).sum())[:3], rtol=1e-9)
    colors = components.component_colors(basis, rows.reshape(20, 15, 5))
    assert colors.min() == 0 and colors.max() == 255
    with pytest.raises(ValueError, match="2 dimensions"):
        components.fit_basis(rows[:, :2])


def test_one_basis_for_all_pictures():
    """The same feature has the same color in whichever picture and place it stands."""
    features = RNG.standard_normal((3, 4, 4, 6))
    features[2, 1, 3] = features[0, 2, 0]
    basis = components.fit_basis(features.reshape(-1, 6))
    colors = [components.component_colors(basis, one) for one in features]
    assert colors[2][1, 3].tolist() == colors[0][2, 0].tolist() != colors[0][0, 0].tolist()


def test_what_a_place_says_is_removed():
    row, column = np.meshgrid(np.arange(5.0), np.arange(7.0), indexing="ij")
    owed = (row**2 - 2 * row * column + 3 * column + 1)[..., None] * RNG.standard_normal(4)
    content = np.zeros((6, 5, 7, 4))
    content[::2, 2, 3], content[1::2, 2, 3] = 1.0, -1.0  # what differs between pictures stays
    found = components.fit_place(owed + content).removed(owed + content)
    np.testing.assert_allclose(found, content, atol=1e-9)


def test_cosine():
    rows = np.array([[[1.0, 0, 0], [0, 2, 0]], [[-3, 0, 0], [1, 1, 0]]])
    np.testing.assert_allclose(components.cosine(rows, np.array([5.0, 0, 0])), [[1, 0], [-1, 0.5**0.5]])
    assert components.cosine(np.zeros((1, 3)), np.ones(3)).tolist() == [0.0]


def test_the_chosen_patch_is_framed():
    picture = features.marked(np.full((32, 32, 3), 100, np.uint8), (1, 2), (4, 4))
    assert picture.shape == (160, 160, 3)
    changed = (picture != 100).any(-1)
    assert changed[40:80, 80:120].any() and changed.sum() == changed[40:80, 80:120].sum() and not changed[42:78, 82:118].any()


def test_what_varies_in_numbers():
    """Half of the variance follows the row alone; two directions hold all of it."""
    row = np.linspace(-1, 1, 4)[:, None] * np.ones((4, 4))
    place = row / row.std()
    content = np.where(np.arange(2)[:, None, None] == 0, 1.0, -1.0) * np.ones((2, 4, 4))
    found = np.stack([np.broadcast_to(place, content.shape), content, 0 * content], axis=-1)
    left = components.fit_place(found).removed(found)
    bases = [components.fit_basis(values.reshape(-1, 3)) for values in (found, left)]
    blocks, result = features.what_varies(found, left, *bases)
    assert result == (
        "Three components hold 100% of what varies in the patch features of 2 pictures after the last block. 50% of the variance follows a "
        "patch's place, whatever is in the picture. The mean cosine of two patches is 0.00."
    )
    assert blocks[0].rows == [("features", "50%", "50%", "0%", "100%"), ("without the place", "100%", "0%", "0%", "100%")]
    like = np.array([[0.9, 1.0], [0.5, 0.81]])
    assert features.what_is_alike([like], [(0, 1)]) == "67% of the other patches are like patch 0,1 (cosine above 0.8)."


def test_page(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "features.html"
    (pictures / "note.png").write_text("no picture")
    arguments = ["features", "--checkpoint", checkpoint, "--images", str(pictures), "--out", str(out)]
    assert main([*arguments, "--patch", "0,3", "--patch", "2,1"]) == 1
    said = capsys.readouterr()
    assert "2 picture(s)" in said.out and "left out: " in said.err and "note.png" in said.err
    page = out.read_text()
    assert "<h1>Features</h1><p>Three components hold " in page and "patch features of 2 pictures" in page
    assert "of the other patches are like patch 0,3, " in page and page.count("data:image/png") == 2
    assert main([*arguments, "--patch", "0,4"]) == 2
    assert "--patch is 0,4, but there are 4 x 4 patches" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--patch", "center"])
    assert "'center' is no ROW,COLUMN" in capsys.readouterr().err
