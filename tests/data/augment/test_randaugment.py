"""RandAugment: each operation against Pillow (and timm where it is installed), how often each is drawn, and its text form."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from maskvit.data.augment.randaugment import OPERATIONS, Layer, RandAugment, apply_layers, draw_layers, parse_randaugment
from maskvit.data.augment.settings import parse_augment

TEXT = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
# Magnitude 9 of 10, and what each operation is then called with.
LEVEL = 0.9


def picture() -> np.ndarray:
    """Smooth colors with noise, not square."""
    rows, columns = np.mgrid[:40, :56]
    smooth = np.stack([rows * 6, columns * 4, (rows + columns) * 2], axis=-1)
    return np.clip(smooth + np.random.default_rng(0).integers(-20, 20, smooth.shape), 0, 255).astype(np.uint8)


def moved(image: Image.Image, matrix: tuple) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL)


def expected(name: str, image: Image.Image, sign: int) -> np.ndarray:
    array = np.asarray(image)
    factor = 1.81 if sign > 0 else 0.19
    # Written as numbers, from the table of the recipe at magnitude 9.
    by_name = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: 255 - array,
        "rotate": lambda: image.rotate(27 * sign, resample=Image.Resampling.BICUBIC, fillcolor=FILL),
        "posterize": lambda: array & 0b10000000,
        "solarize": lambda: np.where(array >= 26, 255 - array, array),
        "solarize_add": lambda: np.where(array < 128, np.minimum(array.astype(int) + 99, 255), array),
        "color": lambda: ImageEnhance.Color(image).enhance(factor),
        "contrast": lambda: ImageEnhance.Contrast(image).enhance(factor),
        "brightness": lambda: ImageEnhance.Brightness(image).enhance(factor),
        "sharpness": lambda: ImageEnhance.Sharpness(image).enhance(factor),
        "shear_x": lambda: moved(image, (1, 0.27 * sign, 0, 0, 1, 0)),
        "shear_y": lambda: moved(image, (1, 0, 0, 0.27 * sign, 1, 0)),
        "translate_x": lambda: moved(image, (1, 0, 0.405 * 56 * sign, 0, 1, 0)),
        "translate_y": lambda: moved(image, (1, 0, 0, 0, 1, 0.405 * 40 * sign)),
    }
    return np.asarray(by_name[name]())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_is_pillows(name, sign):
    ours = apply_layers(picture(), (Layer(name, LEVEL, sign),))
    theirs = expected(name, Image.fromarray(picture()), sign)
    assert ours.dtype == np.uint8 and ours.shape == picture().shape
    # Arguments such as 0.405 * 56 differ in the last bit.
    np.testing.assert_allclose(ours.astype(int), theirs, atol=1 if name in ("color", "contrast", "brightness", "sharpness") else 0)
    assert not np.array_equal(ours, picture())


def test_operations_follow_each_other_and_none_is_none():
    layers = (Layer("rotate", 0.5, 1), Layer("invert", 0.5, 1))
    image = ImageOps.invert(Image.fromarray(picture()).rotate(15, resample=Image.Resampling.BICUBIC, fillcolor=FILL))
    np.testing.assert_array_equal(apply_layers(picture(), layers), np.asarray(image))
    np.testing.assert_array_equal(apply_layers(picture(), ()), picture())


def test_magnitude_10_posterizes_to_black_as_in_the_reference():
    assert (apply_layers(picture(), (Layer("posterize", 1.0, 1),)) == 0).all()
    assert set(np.unique(apply_layers(picture(), (Layer("posterize", 0.99, 1),)))) == {0, 128}


def test_draws_have_the_stated_probabilities():
    settings, count = parse_randaugment(TEXT), 6000
    rng = np.random.default_rng(0)
    drawn = [draw_layers(rng, settings) for _ in range(count)]
    lengths = np.bincount([len(layers) for layers in drawn], minlength=3) / count
    np.testing.assert_allclose(lengths, (0.25, 0.5, 0.25), atol=0.025)
    layers = [layer for one in drawn for layer in one]
    names, counts = np.unique([layer.name for layer in layers], return_counts=True)
    assert sorted(names) == sorted(OPERATIONS) and len(names) == 15
    np.testing.assert_allclose(counts / len(layers), 1 / 15, atol=0.015)
    magnitudes = 10 * np.array([layer.level for layer in layers])
    assert magnitudes.max() == 10 and 0.015 < (magnitudes == 10).mean() < 0.032  # clipped above two deviations: 2.3 %
    below = magnitudes[magnitudes < 10]
    assert abs(np.median(magnitudes) - 9) < 0.03 and abs(np.mean(below < 8.5) - 0.159 / 0.977) < 0.02
    np.testing.assert_allclose(np.mean([layer.sign for layer in layers]), 0, atol=0.05)
    pairs = [(one[0].name, one[1].name) for one in drawn if len(one) == 2]
    assert 0.04 < np.mean([a == b for a, b in pairs]) < 0.095  # with replacement


def test_text():
    assert parse_randaugment(TEXT) == RandAugment(magnitude=9, deviation=0.5, layers=2, probability=0.5)
    assert parse_randaugment("rand-inc1-n3-m7-p0.9") == RandAugment(7, 0.0, 3, 0.9)
    assert parse_augment({"randaugment": TEXT}).randaugment == RandAugment(9, 0.5, 2, 0.5)
    assert parse_augment({"randaugment": None}).randaugment is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("original-m9", "must begin with 'rand'"),
        ("rand-m9-mstd0.5", "must hold 'inc1'"),
        ("rand-m9-inc0", "must hold 'inc1'"),
        ("rand-m9-x3-inc1", "whose part 'x3' is unknown; known: m9, mstd0.5, n2, p0.5 and inc1"),
        ("rand-m-inc1", "whose part 'm' is unknown"),
        ("rand-m9.5-inc1", "whose part 'm9.5' must be a whole number"),
        ("rand-m9-m8-inc1", "gives 'm' twice"),
        ("rand-m11-inc1", "whose magnitude is 11; it must be at least 0 and at most 10"),
        ("rand-n0-inc1", "whose layers is 0; it must be at least 1"),
        ("rand-p1.5-inc1", "whose probability is 1.5"),
        (9, "randaugment is 9; it must be text"),
    ],
)
def test_wrong_text(text, message):
    with pytest.raises(ValueError, match=message):
        parse_augment({"randaugment": text})


def test_as_timm_itself():
    auto_augment = pytest.importorskip("timm.data.auto_augment")
    theirs = {
        "auto_contrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate", "posterize": "PosterizeIncreasing",
        "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd", "color": "ColorIncreasing", "contrast": "ContrastIncreasing",
        "brightness": "BrightnessIncreasing", "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY",
        "translate_x": "TranslateXRel", "translate_y": "TranslateYRel",
    }  # fmt: skip
    assert list(theirs.values()) == auto_augment._RAND_INCREASING_TRANSFORMS
    settings = dict(img_mean=FILL, interpolation=Image.Resampling.BICUBIC)
    for name, their_name in theirs.items():
        # Without the largest magnitude, whose posterize Pillow 13 refuses in timm.
        for magnitude in (0.0, 3.7, 9.0, 9.9):
            operation = auto_augment.AugmentOp(their_name, prob=1.0, magnitude=magnitude, hparams=settings)
            made = [apply_layers(picture(), (Layer(name, magnitude / 10, sign),)) for sign in (1, -1)]
            for _ in range(4):
                reference = np.asarray(operation(Image.fromarray(picture())))
                assert any(np.array_equal(reference, one) for one in made), (name, magnitude)
