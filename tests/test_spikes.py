"""The guard: what it calls a spike, when it goes back, and that a resumed run judges alike."""

import json
import math

import numpy as np
import pytest

from maskvit.training.spikes import HISTORY, Guard, guard_block


def guard(**block) -> Guard:
    settings = guard_block(**{"max_skipped": 3, **block})
    return Guard.resumed({name: settings[name] for name in ("max_skipped", "sigmas", "on_spike")}, None)


def losses(count: int) -> list[float]:
    return (1.0 + 0.05 * np.random.default_rng(0).standard_normal(count)).tolist()


def told(judge: Guard, values: list[float], start: int = 0, skipped: bool = False, norm: float = 50.0) -> list[str]:
    lines = []
    for step, loss in enumerate(values, start):
        judge.observe(step, loss, skipped, norm)
        lines += judge.judge(before=step + 1)
    return lines


def test_noise_and_slow_change_are_no_spikes():
    judge = guard()
    falling = [loss + 3 * math.exp(-step / 100) for step, loss in enumerate(losses(1000))]
    assert told(judge, falling) == [] and judge.healthy()


def test_a_spike_is_told_once_with_its_deviations_and_leaves_the_mean_alone():
    judge = guard(on_spike="rollback")
    told(judge, losses(200))
    mean = judge.mean
    (line,) = told(judge, [1000.0, 1000.0], 200)
    assert line.startswith("step 200: the loss jumps: 1000 is ") and "deviations above its mean of" in line
    assert judge.mean == mean and judge.must_go_back() and not judge.healthy()
    assert told(judge, [1.0], 202) == [] and not judge.must_go_back() and judge.healthy()


@pytest.mark.parametrize("on_spike", ["none", "skip"])
def test_by_default_a_spike_is_only_told(on_spike):
    judge = guard(on_spike=on_spike)
    told(judge, losses(200))
    assert told(judge, [1000.0], 200) and not judge.must_go_back()


def test_the_limit_comes_with_a_history():
    judge = guard()
    told(judge, losses(HISTORY - 1))
    assert judge.limit() == math.inf
    told(judge, [1.0], HISTORY - 1)
    assert 1.1 < judge.limit() < 3


def test_skips_in_a_row_ask_to_go_back_whatever_is_logged():
    judge = guard()
    told(judge, losses(5))
    lines = told(judge, [math.nan, math.nan], 5, skipped=True)
    assert lines == ["step 5: update skipped: its loss or gradient was not finite"] and not judge.must_go_back() and not judge.healthy()
    told(judge, [1.0], 7)
    told(judge, [math.nan, 1.0, math.inf], 8, skipped=True)  # a finite loss whose gradient was not
    assert judge.in_a_row == 3 and judge.must_go_back()
    judge.observe(11, 1.0, False, 50.0)
    assert not judge.healthy()
    judge.went_back(4)
    assert not judge.must_go_back() and judge.returned_to == 4 and judge.healthy()


@pytest.mark.parametrize("norm", [8e27, math.inf, math.nan])
def test_parameters_that_explode_are_not_healthy_though_the_loss_is_finite(norm):
    judge = guard()
    told(judge, losses(20))
    (line,) = told(judge, [1.0], 20, norm=norm)
    assert "the parameters explode" in line and not judge.healthy()


def test_looking_ahead_decides_nothing_and_a_resumed_guard_judges_alike():
    whole, stopped = guard(on_spike="rollback"), guard(on_spike="rollback")
    values = [*losses(120), math.nan, 1.0, 50.0, 1.0, 1.0, 1.0]
    decisions = []
    for step, loss in enumerate(values):
        for judge in (whole, stopped):
            judge.observe(step, loss, math.isnan(loss), 50.0)
        if step in (60, 120, 121, 122):
            assert stopped.healthy() == (step in (60, 121))  # a single skip is over, a spike turns the run back
            saved = json.loads(json.dumps(stopped.as_json(), allow_nan=False))
            stopped = Guard.resumed(dict(max_skipped=3, sigmas=10.0, on_spike="rollback"), saved)
        decisions.append([(judge.judge(before=step - 1), judge.must_go_back(), judge.limit()) for judge in (whole, stopped)])
    assert all(one == other for one, other in decisions)
    assert whole == stopped and any(one[1] for one, _ in decisions)


@pytest.mark.parametrize(
    ("block", "message"),
    [(dict(on_spike="panic"), "known: none, skip"), (dict(max_skipped=0), "at least 1"), (dict(sigmas=0.0), "above 0")],
)
def test_wrong_settings(block, message):
    with pytest.raises(ValueError, match=message):
        guard_block(**block)
