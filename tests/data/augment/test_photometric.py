"""Colors: each change against its rule in exact arithmetic, how often and how far colors change, and which settings make no sense."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from maskvit.data.augment import change_pictures, photometric
from maskvit.data.augment.photometric import ColorJitter, PhotometricDistortion
from maskvit.data.augment.settings import parse_augment

COUNT = 400


def noise(height: int = 24, width: int = 20) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (height, width, 3), dtype=np.uint8)


def turned(picture: np.ndarray, shift: float) -> np.ndarray:
    """Hue turned by `shift` of the circle, in exact arithmetic."""
    hsv = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in picture.reshape(-1, 3)]
    rgb = [colorsys.hsv_to_rgb((h + shift) % 1, s, v) for h, s, v in hsv]
    return 255 * np.array(rgb).reshape(picture.shape)


# --- color jitter -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
def test_jitter_follows_its_rules(factor):
    picture = noise()
    x, gray = picture.astype(float), picture @ [0.299, 0.587, 0.114]
    cut = lambda values: np.clip(values, 0, 255)  # noqa: E731
    np.testing.assert_array_equal(photometric.adjust_brightness(picture, factor), np.floor(cut(x * factor)))
    contrast = photometric.adjust_contrast(picture, factor).astype(float)
    exact = cut(x * factor + np.rint(gray).mean() * (1 - factor))
    assert (exact - contrast).min() > -0.55 and (exact - contrast).max() < 1.05  # truncated, but a constant picture, which is rounded
    saturation = photometric.adjust_saturation(picture, factor)
    np.testing.assert_allclose(saturation, cut(x * factor + np.rint(gray)[..., None] * (1 - factor)), atol=0.51)


@pytest.mark.parametrize("shift", [-0.1, 0.0, 0.2])
def test_hue_turns(shift):
    ours = photometric.adjust_hue(noise(), shift).astype(float)
    # A hue has 180 steps, so a channel that changes by 255 in 30 of them is off by some levels.
    np.testing.assert_allclose(ours, turned(noise(), shift), atol=14)
    assert np.abs(ours - turned(noise(), shift)).mean() < 3


def test_jitter_is_albumentations():
    cv2 = pytest.importorskip("cv2")
    picture = noise()
    for factor in (0.6, 0.93, 1.4):
        gray = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        table = np.clip(np.arange(256) * factor + gray.mean() * (1 - factor), 0, 255).astype(np.uint8)
        np.testing.assert_array_equal(photometric.adjust_contrast(picture, factor), cv2.LUT(picture, table))
        mixed = cv2.addWeighted(picture, factor, cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), 1 - factor, gamma=0)
        difference = np.abs(photometric.adjust_saturation(picture, factor).astype(int) - mixed)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.01
    for shift in (-0.1, 0.07):
        hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = cv2.LUT(hsv[..., 0], np.mod(np.arange(256, dtype=np.int16) + 180 * shift, 180).astype(np.uint8))
        assert np.abs(photometric.adjust_hue(picture, shift).astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)).max() <= 1


def test_how_often_and_how_far_jitter_goes():
    """On gray pictures each change tells its amount."""
    rng, jitter = np.random.default_rng(0), ColorJitter(contrast=(1, 1), saturation=(1, 1), hue=(0, 0))
    flat = np.full((2, 2, 3), 100, np.uint8)
    values = []
    for _ in range(COUNT):
        picture = flat
        for change in jitter.draw(rng):
            picture = change.function(picture, change.amount)
        values.append(int(picture[0, 0, 0]))
    values = np.array(values)
    assert abs((values == 100).mean() - 0.5) < 0.1
    moved = values[values != 100]
    assert 60 <= moved.min() < 64 and 136 < moved.max() <= 140 and abs(moved.mean() - 99.5) < 4
    order = [[change.function.__name__ for change in ColorJitter(probability=1.0).draw(rng)] for _ in range(COUNT)]
    assert len({tuple(names) for names in order}) == 24


# --- photometric distortion ---------------------------------------------------------------------------------------------


def only(**ranges) -> PhotometricDistortion:
    return PhotometricDistortion(**dict(dict(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=1), **ranges))


def outcomes(settings: PhotometricDistortion, picture: np.ndarray) -> np.ndarray:
    rng, made = np.random.default_rng(1), []
    for _ in range(COUNT):
        changed = picture
        for change in settings.draw(rng):
            changed = change.function(changed, change.amount)
        made.append(changed[0, 0])
    return np.array(made).astype(int)


def test_distortion_has_the_references_ranges():
    flat = np.full((1, 1, 3), 100, np.uint8)  # gray: neither hue nor saturation changes it
    shifted = outcomes(only(brightness=32), flat)[:, 0]
    # Truncated: of a shift in -32 ... 32 the values 68 ... 131 remain.
    assert shifted.min() in (68, 69) and shifted.max() in (130, 131) and abs((shifted == 100).mean() - 0.5) < 0.1
    scaled = outcomes(only(contrast=(0.5, 1.5)), flat)[:, 0]
    assert 50 <= scaled.min() < 53 and 146 < scaled.max() < 150 and abs((scaled == 100).mean() - 0.5) < 0.1
    color = np.array([[(200, 100, 100)]], np.uint8)
    spread = np.ptp(outcomes(only(saturation=(0.5, 1.5)), color), axis=1)
    assert 48 <= spread.min() < 54 and 146 < spread.max() <= 151
    hues = [round(colorsys.rgb_to_hsv(*(pixel / 255))[0] * 180 + 90) % 180 - 90 for pixel in outcomes(only(hue=18), color)]
    assert min(hues) == -18 and 16 <= max(hues) <= 17  # the reference's upper end is open
    assert abs(np.mean([hue == 0 for hue in hues]) - 0.5) < 0.1


def test_distortion_adds_before_it_multiplies_half_of_the_time():
    """Contrast before saturation truncates otherwise than after it: both orders occur, and brightness is always first."""
    settings = PhotometricDistortion(brightness=32, contrast=(0.5, 0.5), saturation=(1.5, 1.5), hue=1)
    rng = np.random.default_rng(0)
    names = [tuple(change.function.__name__ for change in settings.draw(rng)) for _ in range(COUNT)]
    assert all(one.index("_add") == 0 for one in names if "_add" in one)
    both = [one for one in names if {"_multiply", "_multiply_saturation"} <= set(one)]
    first = np.mean([one.index("_multiply") < one.index("_multiply_saturation") for one in both])
    assert abs(len(both) / COUNT - 0.25) < 0.08 and 0.35 < first < 0.65
    assert abs(np.mean(["_multiply" in one for one in names]) - 0.5) < 0.1


# --- three-augment ------------------------------------------------------------------------------------------------------


def test_three_augment_is_one_of_three_then_jitter():
    picture, rng = noise(), np.random.default_rng(0)
    image = Image.fromarray(picture)
    gray, solarized = np.asarray(image.convert("L").convert("RGB")), np.asarray(ImageOps.solarize(image))
    kinds, blurs, jitters = [], [], []
    for _ in range(COUNT):
        first, then = photometric.draw_three_augment(rng)
        made = first.function(picture, first.amount)
        colors = then.amount
        jitters.append(colors.jitter)
        kinds.append("gray" if np.array_equal(made, gray) else "solarized" if np.array_equal(made, solarized) else "blurred")
        if kinds[-1] == "blurred":
            blurs.append(first.amount.blur)
            np.testing.assert_array_equal(made, np.asarray(image.filter(ImageFilter.GaussianBlur(blurs[-1]))))
    np.testing.assert_allclose([kinds.count(kind) / COUNT for kind in ("gray", "solarized", "blurred")], 1 / 3, atol=0.08)
    assert 0.1 <= min(blurs) < 0.2 and 1.9 < max(blurs) <= 2.0
    amounts = np.array([amount for jitter in jitters for _, amount in jitter])
    assert 0.7 <= amounts.min() < 0.71 and 1.29 < amounts.max() <= 1.3
    assert len({tuple(name for name, _ in jitter) for jitter in jitters}) == 6
    last = image
    for name, amount in jitters[-1]:
        enhance = dict(brightness=ImageEnhance.Brightness, contrast=ImageEnhance.Contrast, saturation=ImageEnhance.Color)[name]
        last = enhance(last).enhance(amount)
    np.testing.assert_array_equal(then.function(picture, then.amount), np.asarray(last))


# --- together -----------------------------------------------------------------------------------------------------------


def test_pictures_of_a_record_change_alike_and_nothing_draws_nothing():
    pictures = {"rgb": noise(), "other": noise()}
    for settings in (dict(color_jitter={}, gray=0.3), dict(photometric_distortion={}), dict(three_augment=True)):
        settings = parse_augment(settings)
        for seed in range(8):
            made = change_pictures(np.random.default_rng(seed), pictures, settings)
            np.testing.assert_array_equal(made["rgb"], made["other"])
    rng, untouched = np.random.default_rng(0), np.random.default_rng(0)
    made = change_pictures(rng, pictures, parse_augment({}))
    np.testing.assert_array_equal(made["rgb"], pictures["rgb"])
    assert rng.random() == untouched.random()


def test_gray_follows_the_jitter():
    settings = parse_augment(dict(color_jitter=dict(probability=1.0), gray=1.0))
    made = change_pictures(np.random.default_rng(0), {"rgb": noise()}, settings)["rgb"]
    assert (made == made[..., :1]).all()
    share = [
        (change_pictures(np.random.default_rng(seed), {"rgb": noise(4, 4)}, parse_augment(dict(gray=0.3)))["rgb"] != noise(4, 4)).any()
        for seed in range(COUNT)
    ]
    assert abs(np.mean(share) - 0.3) < 0.09


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(color_jitter=dict(bright=1)), "config.data.augment.color_jitter has unknown key 'bright'; known: probability, brightness"),
        (dict(color_jitter=dict(hue=(-0.6, 0.1))), "color_jitter.hue is .-0.6, 0.1.; it must be .low, high. with -0.5 <= low"),
        (dict(color_jitter=dict(probability=2)), "color_jitter.probability is 2; it is a probability"),
        (dict(color_jitter=dict(contrast=0.4)), "color_jitter.contrast is 0.4; it must be .a number, a number."),
        (dict(photometric_distortion=dict(hue=0)), "photometric_distortion.hue is 0; it must be at least 1"),
        (dict(photometric_distortion=dict(contrast=(1.5, 0.5))), "photometric_distortion.contrast is .1.5, 0.5."),
        (dict(gray=-0.1), "config.data.augment.gray is -0.1; it is a probability"),
        (dict(three_augment=True, randaugment="rand-m9-inc1"), "sets three_augment and randaugment; each is a recipe of its own: keep one"),
        (dict(three_augment=True, gray=0.2), "gray is 0.2, which goes with color_jitter or alone: remove it or three_augment"),
        (dict(randaugment="rand-m9-inc1", views=dict(local_crops=2)), "randaugment is set, but several views have colors of their own"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        parse_augment(settings)
