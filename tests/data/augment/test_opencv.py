"""OpenCV's arithmetic in numpy: against rules written pixel by pixel, and against OpenCV itself where it is installed."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from maskvit.data.augment import opencv

SIZES = [((48, 64), (38, 51)), ((10, 33), (15, 60)), ((51, 68), (5, 7)), ((64, 64), (32, 32)), ((33, 77), (66, 154)), ((40, 40), (40, 20))]


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)


def bilinear(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Between the middles of the four nearest pixels, edges repeated; in exact arithmetic."""
    out = np.empty((*size, 3))
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * picture.shape[0] / size[0] - 0.5, 0), picture.shape[0] - 1)
            x = min(max((column + 0.5) * picture.shape[1] / size[1] - 0.5, 0), picture.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, picture.shape[0] - 1), min(left + 1, picture.shape[1] - 1)
            upper = picture[top, left] * (1 - (x - left)) + picture[top, right] * (x - left)
            lower = picture[bottom, left] * (1 - (x - left)) + picture[bottom, right] * (x - left)
            out[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return out


@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_resizing_is_bilinear_without_antialiasing(size_in, size_out):
    picture = noise(*size_in)
    np.testing.assert_allclose(opencv.resize_bilinear(picture, size_out), bilinear(picture, size_out), atol=1)


@pytest.mark.parametrize(("size_in", "size_out"), SIZES)
def test_a_window_is_a_part_of_the_whole(size_in, size_out):
    picture, window = noise(*size_in), (2, 3, size_out[0] - 3, size_out[1] - 4)
    part = np.s_[2 : size_out[0] - 1, 3 : size_out[1] - 1]
    np.testing.assert_array_equal(opencv.resize_bilinear(picture, size_out, window), opencv.resize_bilinear(picture, size_out)[part])
    np.testing.assert_array_equal(opencv.resize_nearest(picture, size_out, window), opencv.resize_nearest(picture, size_out)[part])


def test_nearest_takes_the_pixel_at_or_before():
    for size_in, size_out in ((480, 384), (100, 33), (17, 51), (224, 56), (640, 640)):
        expected = [i * size_in // size_out for i in range(size_out)]
        assert opencv.nearest_rows(size_in, size_out).tolist() == expected
    assert opencv.nearest_rows(224, 56).tolist() == list(range(0, 224, 4))  # Pillow's would begin at 2


def test_gray_and_hue_of_known_colors():
    picture = np.array([[(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 20, 30), (7, 7, 7), (200, 100, 50)]], np.uint8)
    np.testing.assert_allclose(opencv.to_gray(picture), picture @ [0.299, 0.587, 0.114], atol=0.51)
    hsv = opencv.to_hsv(picture)
    for pixel, (hue, saturation, value) in zip(picture[0], hsv[0].astype(float), strict=True):
        expected = colorsys.rgb_to_hsv(*(pixel / 255))
        np.testing.assert_allclose((hue / 180, saturation / 255, value / 255), expected, atol=1 / 180)
    np.testing.assert_allclose(opencv.from_hsv(hsv).astype(int), picture, atol=2)


def test_as_opencv_itself():
    cv2 = pytest.importorskip("cv2")
    for size_in, size_out in SIZES:
        picture = noise(*size_in)
        theirs = cv2.resize(picture, size_out[::-1], interpolation=cv2.INTER_LINEAR)
        ours = opencv.resize_bilinear(picture, size_out)
        difference = np.abs(ours.astype(int) - theirs)
        assert difference.max() <= 1 and (difference > 0).mean() < 0.05
        if max(size_out) < min(size_in):
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(opencv.resize_bilinear(picture, size_out, None, "cv2"), theirs)
        np.testing.assert_array_equal(
            opencv.resize_nearest(picture[..., 0], size_out), cv2.resize(picture[..., 0], size_out[::-1], interpolation=cv2.INTER_NEAREST)
        )
    levels = np.arange(0, 256, 5)
    picture = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(52, -1, 3).astype(np.uint8)
    np.testing.assert_array_equal(opencv.to_gray(picture), cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
    np.testing.assert_array_equal(opencv.to_hsv(picture), hsv)
    difference = np.abs(opencv.from_hsv(hsv).astype(int) - cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01
