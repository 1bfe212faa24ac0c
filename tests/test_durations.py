"""Durations in every unit people write, and when things are due."""

import pytest

from maskvit.core.durations import is_time, to_steps


@pytest.mark.parametrize(
    "duration, steps",
    [
        (7, 7),
        (0, 0),
        ("20", 20),
        (" 1_000 ", 1000),
        ("2000 steps", 2000),
        ("1 step", 1),
        ("1_000 steps", 1000),
        ("100 epochs", 1000),
        ("1.5 epochs", 15),
        ("1.1 epochs", 11),
        ("0.01 epochs", 1),
        ("0 epochs", 0),
        ("1M examples", 31250),
        ("1000000 examples", 31250),
        ("64k examples", 2000),
        ("5 percent", 20),
        ("5%", 20),
        ("2.5 %", 10),
    ],
)
def test_to_steps(duration, steps):
    assert to_steps(duration, steps_per_epoch=10, global_batch=32, total_steps=400) == steps


@pytest.mark.parametrize(
    "duration", ["ten epochs", "1.5", "1__0", "10_", "²", "10 weeks", "", "-5 steps", -1, 1.5, True, "1.2.3 steps", None]
)
def test_bad_duration_lists_the_forms(duration):
    with pytest.raises(ValueError, match="epochs.*examples.*percent"):
        to_steps(duration, steps_per_epoch=10, global_batch=32, total_steps=400)


def test_percent_needs_a_whole():
    with pytest.raises(ValueError, match="another unit"):
        to_steps("5%", steps_per_epoch=10, global_batch=32)
    with pytest.raises(ValueError, match="more than the whole"):
        to_steps("101%", steps_per_epoch=10, global_batch=32, total_steps=10)


def test_is_time():
    assert [step for step in range(11) if is_time(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(11) if is_time(step, 4, 10, first=True, last=False)] == [0, 4, 8]
    assert not any(is_time(step, 0, 10, first=True) for step in range(11))
    assert is_time(0, 4, 0) and not is_time(0, 4, 0, last=False)
