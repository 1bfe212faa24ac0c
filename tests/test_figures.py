"""Pictures are what they say: sizes, colors, missing values, and a page that needs nothing beside itself."""

from __future__ import annotations

import html.parser
import io
import itertools
import re

import numpy as np
import pytest
from PIL import Image

from maskvit.core.modalities import DEPTH, RGB, SEMSEG, parse_modalities
from maskvit.plots import curves, page, panels, pictures

MODALITIES = parse_modalities(
    {
        "rgb": RGB,
        "depth": DEPTH,
        "semseg": SEMSEG,
        "normals": dict(channels=3, patch=16, loss="l1"),
        "bands": dict(channels=10, patch=16),
        "flagged": dict(channels=1, patch=16, missing=0.0),
    }
)


def open_png(data: bytes) -> np.ndarray:
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(Image.open(io.BytesIO(data)))


def arrays(samples: int = 2) -> dict:
    rng = np.random.default_rng(0)
    inputs = {
        "rgb": rng.integers(0, 256, (samples, 64, 64, 3), dtype=np.uint8),
        "depth": rng.uniform(500, 4000, (samples, 64, 64, 1)).astype(np.float32),
        "semseg": rng.integers(0, 133, (samples, 16, 16)).astype(np.int32),
    }
    inputs["depth"][:, :20, :20] = np.nan
    inputs["semseg"][0, :4] = -1
    guidance = {name: rng.random((samples, 4, 4)).astype(np.float32) for name in inputs}
    rebuilt = {
        "rgb": inputs["rgb"] * 0.5,
        "norm_rgb": inputs["rgb"] * 0.9,
        "depth": np.nan_to_num(inputs["depth"]),
        "semseg": abs(inputs["semseg"]),
    }
    return {"inputs": inputs, "guidance": guidance, "masked": {n: g > 0.5 for n, g in guidance.items()}, "reconstructions": rebuilt}


def test_rgb_is_shown_as_stored():
    stored = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pictures.to_picture(MODALITIES["rgb"], stored), stored)


def test_a_prediction_of_rgb_is_clipped_and_keeps_its_scale():
    like = np.array([[[0, 128, 255]]], np.uint8)
    picture = pictures.to_picture(MODALITIES["rgb"], np.array([[[-30.0, 128.0, 300.0]]], np.float32), like=like)
    assert picture.tolist() == [[[0, 128, 255]]]


def test_normals_are_centered():
    picture = pictures.to_picture(MODALITIES["normals"], np.array([[[-1.0, 0.0, 1.0]]], np.float32))
    assert picture.tolist() == [[[0, 128, 255]]]


def test_missing_depth_is_hatched_and_the_rest_is_not():
    depth = np.linspace(100, 4000, 64 * 64, dtype=np.float32).reshape(64, 64, 1)
    full = pictures.to_picture(MODALITIES["depth"], depth)
    holed = depth.copy()
    holed[10:20, 30:40] = np.nan
    picture = pictures.to_picture(MODALITIES["depth"], holed, like=depth)
    hole = np.isnan(holed[..., 0])
    np.testing.assert_array_equal(picture[~hole], full[~hole])
    assert {tuple(color) for color in picture[hole].tolist()} == set(pictures.HATCH)
    assert pictures.to_picture(MODALITIES["depth"], np.full((8, 8, 1), np.nan, np.float32)).shape == (8, 8, 3)


def test_the_declared_missing_value_is_hatched():
    values = np.ones((16, 16, 1), np.float32)
    values[:4] = 0
    picture = pictures.to_picture(MODALITIES["flagged"], values)
    hatched = (picture[:, :, None] == np.array(pictures.HATCH)).all(-1).any(-1)
    np.testing.assert_array_equal(hatched, values[..., 0] == 0)


def test_one_channel_rises_in_lightness():
    ramp = np.linspace(0, 1, 32, dtype=np.float32).reshape(1, 32, 1)
    lightness = pictures.to_picture(MODALITIES["depth"], ramp).astype(float) @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness[0, 1:-1]) > 0).all()


def test_many_bands_become_three_colors():
    bands = np.random.default_rng(0).normal(size=(16, 16, 10)).astype(np.float32)
    bands[0, 0] = np.nan
    picture = pictures.to_picture(MODALITIES["bands"], bands)
    assert picture.shape == (16, 16, 3) and picture.std() > 10
    np.testing.assert_array_equal(picture, pictures.to_picture(MODALITIES["bands"], bands.copy(), like=bands))


def test_class_ids():
    ids = np.array([[0, 1], [132, -1]], np.int32)
    picture = pictures.to_picture(MODALITIES["semseg"], ids)
    colors = pictures.palette(133)
    assert (picture[0, 0] == colors[0]).all() and (picture[1, 0] == colors[132]).all()
    assert tuple(picture[1, 1]) in pictures.HATCH
    with pytest.raises(ValueError, match="class id 133 in modality 'semseg'.*133 classes"):
        pictures.to_picture(MODALITIES["semseg"], np.full((2, 2), 133))


@pytest.mark.parametrize("count", [2, 40, 133, 300])
def test_palette_is_distinct(count):
    colors = pictures.palette(count).astype(int)
    nearest = min(np.abs(a - b).sum() for a, b in itertools.combinations(colors, 2))
    assert colors.shape == (count, 3) and nearest >= (39 if count <= 133 else 19)
    assert (colors.max(1) - colors.min(1) > 8).all(), "a grey class would look hidden or missing"
    np.testing.assert_array_equal(colors, pictures.palette(400)[:count])


def test_channels_must_be_declared():
    with pytest.raises(ValueError, match="4 channels for modality 'rgb'"):
        pictures.to_picture(MODALITIES["rgb"], np.zeros((4, 4, 4), np.float32))


def test_overlays_cover_whole_tokens():
    picture = np.full((32, 48, 3), 100, np.uint8)
    masked = np.zeros((2, 3), bool)
    masked[1, 2] = True
    shown = pictures.mask_overlay(picture, masked)
    assert (shown[16:, 32:] == pictures.HIDDEN).all() and (shown[:16] == 100).all() and (shown[16:, :32] == 100).all()
    heat = pictures.heat_overlay(picture, masked.astype(np.float32))
    assert heat[20, 40].sum() > heat[0, 0].sum()
    assert (heat[:16] == heat[0, 0]).all()
    with pytest.raises(ValueError, match="32 x 48 pixels does not divide into 5 x 3"):
        pictures.mask_overlay(picture, np.zeros((5, 3), bool))


def test_heat_of_absent_or_equal_tokens():
    picture = np.full((16, 16, 3), 90, np.uint8)
    assert (pictures.heat_overlay(picture, np.full((2, 2), np.nan, np.float32)) == 90).all()
    pictures.heat_overlay(picture, np.ones((2, 2), np.float32))


def test_rollout_of_one_layer_is_its_mean_and_the_residual():
    attention = np.random.default_rng(0).dirichlet(np.ones(5), (1, 3, 5))
    np.testing.assert_allclose(pictures.attention_rollout(attention), 0.5 * attention[0].mean(0) + 0.5 * np.eye(5))
    deep = pictures.attention_rollout(np.random.default_rng(1).dirichlet(np.ones(5), (4, 3, 5)))
    np.testing.assert_allclose(deep.sum(-1), 1)


def test_masking_panel_shows_every_row_at_a_readable_size():
    panel = open_png(panels.masking_panel(arrays(), MODALITIES, samples=2, title="step 10"))
    assert panel.shape[0] > 2 * 4 * 160 and panel.shape[1] > 5 * 160  # two samples x (rgb, norm_rgb, depth, semseg); five columns
    assert open_png(panels.masking_panel(arrays(), MODALITIES, samples=1)).shape[0] < panel.shape[0]
    assert panels.masking_panel(arrays(), MODALITIES) == panels.masking_panel(arrays(), MODALITIES)


def test_masking_panel_without_guidance_has_no_guidance_column():
    guided = open_png(panels.masking_panel(arrays(), MODALITIES))
    random = open_png(panels.masking_panel({**arrays(), "guidance": {}}, MODALITIES))
    assert random.shape[1] < guided.shape[1]


def test_masking_panel_keeps_visible_pixels(monkeypatch):
    given = arrays(1)
    tiles = []
    monkeypatch.setattr(panels._Sheet, "tile", lambda self, xy, picture, size: tiles.append(picture))
    panels.masking_panel({**given, "guidance": {}}, MODALITIES)
    source, _, rebuilt, raw = tiles[:4]
    hidden = pictures._to_pixels(given["masked"]["rgb"][0], (64, 64))
    np.testing.assert_array_equal(rebuilt[~hidden], source[~hidden])
    np.testing.assert_array_equal(rebuilt[hidden], raw[hidden])


def test_masking_panel_rows_stand_in_declared_order(monkeypatch):
    given = arrays(1)
    words = []
    monkeypatch.setattr(panels._Sheet, "text", lambda self, xy, text, *rest: words.append(text))
    panels.masking_panel({key: dict(sorted(value.items())) for key, value in given.items()}, MODALITIES)
    assert [word for word in words if word in given["reconstructions"]] == ["rgb", "norm_rgb", "depth", "semseg"]


def test_masking_panel_refuses_unknown_outputs():
    given = arrays()
    given["reconstructions"]["thermal"] = given["inputs"]["depth"]
    with pytest.raises(ValueError, match="'thermal' belongs to no modality.*rgb, depth, semseg"):
        panels.masking_panel(given, MODALITIES)


def drawn(svg: bytes) -> str:
    """The SVG's text, if it is well-formed, self-contained and follows light and dark."""
    from xml.etree import ElementTree

    text = svg.decode("utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in text and "var(--ink)" in text and "#000000" not in text
    links = re.findall(r'href="([^"]*)"', text)
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    return "\n".join(word.strip() for word in root.itertext() if word.strip())


def test_curves_bars_and_matrices_are_svg():
    rng = np.random.default_rng(0)
    series = {"loss": (range(100), rng.random(100)), "one value": ([3], [1.0]), "never finite": ([1, 2], [np.nan, np.inf])}
    assert "losses" in drawn(curves.curves(series, "losses"))
    assert curves.curves(series) == curves.curves(series)
    data = curves.bars({"rgb mean": {"before": 31.0, "after": 38.0}, "global": {"after": 29.0}}, "k-NN", references={"chance": 10.0})
    assert {"before", "after", "38", "chance 10"} <= set(drawn(data).split("\n"))
    assert "feature" in drawn(curves.matrix(np.eye(3), "block", "feature"))
    with pytest.raises(ValueError, match="no series"):
        curves.curves({})


class _Page(html.parser.HTMLParser):
    """Collects what a page refers to and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.references += [value for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_escaped():
    picture = pictures.png_bytes(np.zeros((4, 4, 3), np.uint8))
    blocks = [
        page.Prose("a < b & c"),
        page.Table(["name", "loss"], [["<script>alert(1)</script>", 0.123456], ["x", 2]]),
        page.Figure(picture, 'the "masks"'),
        page.Figure(curves.bars({"a": {"b": 1.0}}), "bars"),
        page.Commands("make demo\nmake test"),
    ]
    text = page.html_page("a <title>", [page.Section("First", blocks), page.Section("Second", [])], "summary")
    parsed = _Page()
    parsed.feed(text)
    assert not parsed.open
    assert [r[:15] for r in parsed.references] == ["#s0", "#s1", "data:image/png;", "data:image/svg+"]
    for outside in ("http:", "https:", "@import", "url(", "<script", "<link"):
        assert outside not in text
    assert "a &lt; b &amp; c" in text and "0.1235" in text and 'class="number"' in text


def test_page_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="neither a PNG nor an SVG"):
        page.html_page("t", [page.Section("s", [page.Figure(b"GIF89a", "c")])])


def test_page_refuses_ragged_tables():
    with pytest.raises(ValueError, match="1 cells under a header of 2"):
        page.html_page("t", [page.Section("s", [page.Table(["a", "b"], [["only one"]])])])


def test_labeled_grid():
    picture = np.full((32, 48, 3), 100, np.uint8)
    rows = [("one", [(picture, "below"), None]), ("two\nlines", [(picture, ""), (picture, "")])]
    plain = open_png(panels.labeled_grid(["a", "b\nc"], rows))
    assert plain.shape[0] > 2 * 132 and plain.shape[1] > 2 * 198
    assert open_png(panels.labeled_grid(["a", "b"], rows, "title", heat=("0", "1"))).shape[0] > plain.shape[0]
    with pytest.raises(ValueError, match="row 'one' has 2 tiles under 1 columns"):
        panels.labeled_grid(["a"], rows)


def test_heat_maps_share_a_scale():
    low, high = (pictures.heat_map(np.full((2, 2), value), (8, 8), (0.0, 4.0)) for value in (1.0, 4.0))
    assert low.shape == (8, 8, 3) and (low == low[0, 0]).all() and high.sum() > low.sum()
    np.testing.assert_array_equal(pictures.heat_map(np.array([[9.0]]), (8, 8), (0.0, 4.0)), high)
    np.testing.assert_array_equal(
        pictures.heat_map(np.array([[np.nan]]), (8, 8), (0.0, 4.0)), pictures.heat_map(np.zeros((1, 1)), (8, 8), (0.0, 4.0))
    )


def test_panels_and_points_are_svg():
    runs = [([0, 1], [1.0, np.nan]), ([0, 1], [2.0, 3.0])]
    panels = {"loss": {f"cell {i}": runs for i in range(9)}, "k-NN": {"cell 0": runs[:1]}}
    assert "cell 8" in drawn(curves.line_panels(panels))
    assert curves.line_panels(panels) == curves.line_panels(panels)
    with pytest.raises(ValueError, match="no panel"):
        curves.line_panels({})
    assert "low" in drawn(curves.points({"k-NN": {"random": [1.0, 2.0], "low": [np.nan], "none": []}}, "random"))
