"""Several views of a record: sizes, draws that depend on (seed, epoch, record) alone, how often colors change, and how."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from maskvit.core.modalities import DEPTH, RGB, parse_modalities
from maskvit.data import codec
from maskvit.data.augment.settings import parse_augment
from maskvit.data.batches import train_batches
from maskvit.data.block import block_mask
from maskvit.data.sources import ListSource
from maskvit.data.views import Colors, MultiCrop, apply_colors, draw_colors

MODALITIES = parse_modalities({"rgb": {**RGB, "patch": 8}, "depth": {**DEPTH, "patch": 8}})
VIEWS = dict(scale=(0.25, 1.0), views=dict(local_crops=3, local_size=(16, 16), local_scale=(0.05, 0.25)))


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def record(index: int) -> dict:
    out = io.BytesIO()
    Image.fromarray(picture(index)).save(out, "png")
    ramp = np.tile(np.arange(1, 51, dtype=np.uint16) * 100, (40, 1))  # depth grows to the right: a crop's place and mirror show
    return {"id": str(index), "label": index % 3, "rgb": out.getvalue(), "depth": codec.encode_array(ramp)}


@pytest.fixture(scope="module")
def source():
    return ListSource([record(index) for index in range(24)])


def take(source, count: int, **settings) -> list[dict]:
    settings = dict(dict(seed=3, global_batch=8, augment=VIEWS), **settings)
    with train_batches(source, MODALITIES, (32, 32), **settings) as batches:
        return [next(batches) for _ in range(count)]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key], equal_nan=True) for key in one if key != "label")


def test_a_batch_holds_views_in_place_of_pictures(source):
    batch = take(source, 1)[0]
    shapes = {name: (value.shape, str(value.dtype)) for name, value in batch.items()}
    assert shapes == {
        "global/rgb": ((8, 2, 32, 32, 3), "uint8"),
        "global/depth": ((8, 2, 32, 32, 1), "float32"),
        "local/rgb": ((8, 3, 16, 16, 3), "uint8"),
        "local/depth": ((8, 3, 16, 16, 1), "float32"),
        "label": ((8,), "int32"),
    }
    without = take(source, 1, augment=dict(views=dict(local_crops=0, local_size=(16, 16))))[0]
    assert set(without) == {"global/rgb", "global/depth", "label"}


def test_views_depend_on_seed_epoch_and_record_alone(source):
    whole = take(source, 4)
    assert equal(take(source, 1, start_step=2)[0], whole[2])
    assert all(equal(*pair) for pair in zip(take(source, 4, workers=2), whole, strict=True))
    parts = [take(source, 1, process_index=i, process_count=2)[0] for i in range(2)]
    assert equal({name: np.concatenate([part[name] for part in parts]) for name in whole[0]}, whole[0])
    assert not equal(take(source, 1, seed=4)[0], whole[0])
    assert not equal(whole[3], whole[0])  # another epoch


def test_small_views_show_little_and_some_are_mirrored(source):
    batches = take(source, 6)
    depth = {kind: np.concatenate([batch[f"{kind}/depth"] for batch in batches]) for kind in ("global", "local")}
    # The share of the picture's width that a view spans, from its depth.
    spans = {kind: (np.nanmax(x, axis=(2, 3, 4)) - np.nanmin(x, axis=(2, 3, 4))) / 5000 for kind, x in depth.items()}
    assert spans["local"].mean() < 0.5 < spans["global"].mean() and spans["local"].max() < 0.7
    mirrored = np.concatenate([(x[:, :, 0, 0] > x[:, :, 0, -1]).ravel() for x in depth.values()])
    assert 0.35 < mirrored.mean() < 0.65
    assert not np.array_equal(depth["global"][:, 0], depth["global"][:, 1])


def test_each_large_view_has_its_own_exact_block_mask(source):
    masks = np.concatenate([batch["guidance"] for batch in take(source, 12, blocks=((0.0, 0.3), (0.0, 0.2)))])
    assert masks.shape == (96, 2, 4, 4) and set(np.unique(masks)) == {0.0, 1.0}
    shares = masks.mean(axis=(2, 3))
    assert 0.35 < (shares == 0).mean() < 0.7 and shares.max() <= 0.5
    assert (shares[:, 0] != shares[:, 1]).mean() > 0.4
    assert equal(take(source, 1, blocks=(0.3, 0.2), start_step=1)[0], take(source, 2, blocks=(0.3, 0.2))[1])
    one = take(source, 1, blocks=(0.3, 0.0), augment=None)[0]["guidance"]
    assert one.shape == (8, 1, 4, 4) and block_mask(np.random.default_rng(0), 4, 4, 4.8).sum() <= 4


# Colors

COUNT = 4000


@pytest.mark.parametrize(("kind", "blur", "solarize"), [(0, 1.0, 0.0), (1, 0.1, 0.2), (2, 0.5, 0.0)])
def test_how_often_and_how_far_colors_change(kind, blur, solarize):
    rng = np.random.default_rng(kind)
    drawn = [draw_colors(rng, kind, MultiCrop()) for _ in range(COUNT)]
    close = dict(atol=4 * np.sqrt(0.25 / COUNT))
    np.testing.assert_allclose(np.mean([bool(c.jitter) for c in drawn]), 0.8, **close)
    np.testing.assert_allclose(np.mean([c.grey for c in drawn]), 0.2, **close)
    np.testing.assert_allclose(np.mean([c.blur > 0 for c in drawn]), blur, **close)
    np.testing.assert_allclose(np.mean([c.solarize for c in drawn]), solarize, **close)
    radii = np.array([c.blur for c in drawn if c.blur])
    assert 0.1 <= radii.min() < 0.15 and 1.95 < radii.max() <= 2.0
    for name, low, high in (("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)):
        amounts = np.array([dict(c.jitter)[name] for c in drawn if c.jitter])
        width = high - low
        assert low <= amounts.min() < low + 0.01 * width and high - 0.01 * width < amounts.max() <= high
    assert len({tuple(name for name, _ in c.jitter) for c in drawn}) == 1 + 24  # every order


def colors(**changes) -> Colors:
    return Colors(jitter=(), grey=False, blur=0.0, solarize=False)._replace(**changes)


def test_colors_change_as_pillow_changes_them():
    array = picture(0)
    image = Image.fromarray(array)
    np.testing.assert_array_equal(apply_colors(array, colors()), array)
    pairs = [
        (colors(jitter=(("brightness", 1.3),)), ImageEnhance.Brightness(image).enhance(1.3)),
        (colors(jitter=(("contrast", 0.7),)), ImageEnhance.Contrast(image).enhance(0.7)),
        (colors(jitter=(("saturation", 0.9),)), ImageEnhance.Color(image).enhance(0.9)),
        (colors(grey=True), image.convert("L").convert("RGB")),
        (colors(blur=1.7), image.filter(ImageFilter.GaussianBlur(1.7))),
        (colors(solarize=True), ImageOps.solarize(image)),
    ]
    for settings, expected in pairs:
        np.testing.assert_array_equal(apply_colors(array, settings), np.asarray(expected), err_msg=str(settings))
    np.testing.assert_array_equal(apply_colors(array, colors(solarize=True)), np.where(array < 128, array, 255 - array))


@pytest.mark.parametrize("amount", [0.1, -0.1, 0.0])
def test_hue_turns_in_pillows_steps(amount):
    array = picture(1, 16, 16)
    turned_array = apply_colors(array, colors(jitter=(("hue", amount),)))
    before, after = (np.asarray(Image.fromarray(x).convert("HSV")).astype(int) for x in (array, turned_array))
    vivid = (before[..., 1] > 120) & (before[..., 2] > 120)
    turned = (after[..., 0] - before[..., 0] - int(amount * 255) + 128) % 256 - 128
    assert vivid.sum() > 50 and np.abs(turned[vivid]).max() <= 2


@pytest.mark.parametrize(
    ("views", "message"),
    [
        (dict(crops=3), "config.data.augment.views has unknown key 'crops'; known: local_crops"),
        (dict(local_size=(16,)), "local_size is \\(16,\\)"),
        (dict(local_scale=(0.5, 0.1)), "local_scale is \\(0.5, 0.1\\)"),
        (dict(blur=(1.0, 0.5)), "views.blur is \\(1.0, 0.5\\); probabilities lie between 0 and 1, one for each of first large"),
        (dict(grey=1.5), "views.grey is 1.5"),
        (dict(hue=0.7), "views.hue is 0.7; it must be between 0 and 0.5"),
        (dict(local_crops=-1), "local_crops is -1"),
    ],
)
def test_wrong_settings(views, message):
    with pytest.raises(ValueError, match=message):
        parse_augment(dict(views=views))


def test_what_does_not_go_with_views(source):
    with pytest.raises(ValueError, match="crop is 'center', but views are random crops"):
        parse_augment(dict(crop="center", views=dict(local_crops=1)))
    with pytest.raises(ValueError, match="views.local_size: image height 20 is not a multiple of modality 'rgb'"):
        take(source, 1, augment=dict(views=dict(local_size=(20, 16))))
    with pytest.raises(ValueError, match="the batch key 'box' goes with one crop"):
        take(source, 1, extras=("box",))
    with pytest.raises(ValueError, match="the whole picture goes with one crop"):
        take(source, 1, whole_every=2)
    assert parse_augment(dict(views={})).views is None
