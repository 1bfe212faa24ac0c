"""The exact block-wise sampler: its rule on scripted draws, the published statistics, ratios, and what it refuses."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from maskvit.data.block import block_mask, draw_ratio


class Recorded:
    """A stream of given uniform numbers."""

    def __init__(self, *numbers: float):
        self.numbers = list(numbers)

    def random(self) -> float:
        return self.numbers.pop(0)


def aspect(value: float) -> float:
    """The uniform number that gives this aspect."""
    limit = math.log(1 / 0.3)
    return (math.log(value) + limit) / (2 * limit)


def rectangle(top: int, left: int, height: int, width: int) -> np.ndarray:
    mask = np.zeros((14, 14), bool)
    mask[top : top + height, left : left + width] = True
    return mask


def test_draws_are_area_aspect_top_left():
    # Target 40: area 16 + (40 - 16) * 0.375 = 25, aspect 1: 5 x 5; room for 15 more. Top 0.5 of 0 ... 9, left the last place.
    stream = Recorded(0.375, aspect(1.0), 0.5, 0.999, *[0.5, aspect(1.0), 0.0, 0.0] * 10)
    mask = block_mask(stream, 14, 14, 40.0)
    # The next area lies between 15 and 16, the wrong way round: 15.5, 4 x 4 = 16 tokens, more than the room. Ten attempts, then stop.
    np.testing.assert_array_equal(mask, rectangle(5, 9, 5, 5))
    assert not stream.numbers


def test_aspect_is_height_over_width_and_sides_round_half_to_even():
    # Area 16 + (18.5 - 16) * 0.98 = 18.45, aspect 2: sqrt(36.9) = 6.07 rows, sqrt(9.225) = 3.04 columns.
    mask = block_mask(Recorded(0.98, aspect(2.0), 0.0, 0.0, *[0.0, aspect(1.0), 0.0, 0.0] * 10), 14, 14, 18.5)
    np.testing.assert_array_equal(mask, rectangle(0, 0, 6, 3))
    # On 6 x 6 tokens areas start at 4: 4 + (6.5 - 4) * 0.9 = 6.25, and 2.5 x 2.5 rounds to 2 x 2.
    mask = block_mask(Recorded(0.9, aspect(1.0), 0.0, 0.0, *[0.0, aspect(1.0), 0.0, 0.0] * 10), 6, 6, 6.5)
    np.testing.assert_array_equal(np.argwhere(mask), [[0, 0], [0, 1], [1, 0], [1, 1]])


def test_rectangles_as_high_or_wide_as_the_grid_are_refused_before_a_place_is_drawn():
    # Area 196: 14 x 14, not shorter than the grid; no top and left are drawn, the next attempt follows.
    stream = Recorded(1.0, aspect(1.0), 0.0, aspect(1.0), 0.0, 0.0, *[1.0, aspect(3.3)] * 10)
    mask = block_mask(stream, 14, 14, 196.0)
    np.testing.assert_array_equal(mask, rectangle(0, 0, 4, 4))


def test_overlap_counts_once_and_nothing_new_is_refused():
    again = [0.0, aspect(1.0), 0.0, 0.0]
    beside = [0.0, aspect(1.0), 0.0, 0.25]  # left 0.25 of 0 ... 10: column 2, half of it new
    mask = block_mask(Recorded(*again, *again, *beside), 14, 14, 24.0)
    np.testing.assert_array_equal(mask, rectangle(0, 0, 4, 6))


def test_achieved_ratios_are_slightly_below_the_requested_ones():
    # Published: requested mean 0.3024, achieved 0.2960 over 600 crops of 14 x 14 with ratios in (0.1, 0.5).
    rng = np.random.default_rng(0)
    requested = np.array([draw_ratio(rng, 0.3, 0.2) for _ in range(2000)])
    masks = np.array([block_mask(rng, 14, 14, ratio * 196) for ratio in requested])
    achieved = masks.mean(axis=(1, 2))
    np.testing.assert_allclose(requested.mean(), 0.3, atol=0.007)
    np.testing.assert_allclose((requested - achieved).mean(), 0.0064, atol=0.001)  # standard error 0.0002 here, 0.0003 there
    assert (achieved <= requested).all() and (requested - achieved).max() < 0.12
    assert achieved.max() > 0.48
    # Blocks, not scattered tokens, and any place: both halves alike.
    same = ((masks[:, 1:] == masks[:, :-1]).mean() + (masks[:, :, 1:] == masks[:, :, :-1]).mean()) / 2
    assert same > 0.87
    np.testing.assert_allclose(masks[:, :7].mean(), masks[:, 7:].mean(), atol=0.01)
    assert masks.any(axis=0).all()


def test_first_rectangles_stay_within_the_published_shapes():
    rng = np.random.default_rng(1)
    for _ in range(300):
        mask = block_mask(rng, 14, 14, 17.0)  # room for one block of 16 or 17 tokens and hardly another
        if mask.any():
            height, width = mask.any(axis=1).sum(), mask.any(axis=0).sum()
            assert height < 14 and width < 14 and mask.sum() <= 17


@pytest.mark.parametrize("height,width", [(1, 1), (1, 9), (2, 2), (3, 20), (4, 4), (6, 6), (16, 9)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_any_grid_and_any_target_end_within_the_target(height, width, share):
    for seed in range(10):
        mask = block_mask(np.random.default_rng(seed), height, width, share * height * width)
        assert mask.shape == (height, width) and mask.dtype == bool and mask.sum() <= share * height * width


def test_masks_repeat_with_the_source_and_accept_pythons_own():
    for source in (np.random.default_rng, random.Random):
        masks = [block_mask(source(seed), 14, 14, 60.0) for seed in (1, 1, 2)]
        np.testing.assert_array_equal(masks[0], masks[1])
        assert (masks[0] != masks[2]).any()


def test_ratios_are_uniform_or_exact_or_one_of_several():
    rng = np.random.default_rng(0)
    drawn = np.array([draw_ratio(rng, 0.3, 0.2) for _ in range(4000)])
    assert 0.1 <= drawn.min() < 0.105 and 0.495 < drawn.max() < 0.5
    np.testing.assert_allclose(np.quantile(drawn, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.012)
    assert draw_ratio(Recorded(), 0.3) == 0.3 == draw_ratio(Recorded(), [0.3], [0.0])
    both = np.array([draw_ratio(rng, (0, 0.3), (0, 0.2)) for _ in range(4000)])
    np.testing.assert_allclose((both == 0).mean(), 0.5, atol=0.03)
    np.testing.assert_allclose(both[both > 0].mean(), 0.3, atol=0.01)
    # One draw per alternative that varies, then the choice.
    assert draw_ratio(Recorded(0.5, 0.9), (0, 0.3), (0, 0.2)) == pytest.approx(0.3)
    assert draw_ratio(Recorded(0.5, 0.1), (0, 0.3), (0, 0.2)) == 0


@pytest.mark.parametrize(
    "arguments,message",
    [
        ((0.1, 0.2), "ratio 0.1 -\\+ ratio_var 0.2"),
        ((0.9, 0.2), "0 ... 1"),
        (((0.1, 0.2), (0.1,)), "2 values and ratio_var 1"),
        (((), ()), "at least one"),
    ],
)
def test_bad_ratios_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_ratio(np.random.default_rng(0), *arguments)


@pytest.mark.parametrize("arguments,message", [((0, 14, 3.0), "1 x 1"), ((14, 14, 197.0), "0 ... 196"), ((14, 14, -1.0), "0 ... 196")])
def test_bad_masks_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_mask(np.random.default_rng(0), *arguments)
