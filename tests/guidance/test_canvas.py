"""Maps of whole pictures per record: what is written under a crop is read back under another, whatever the mirror."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fresh_params, on_device, tiny_batch, tiny_objective

from maskvit.core.keys import sample_keys
from maskvit.core.types import TokenLayout
from maskvit.guidance.canvas import (
    AverageError,
    ReusedAttention,
    blank,
    every_kth,
    fill_unknown,
    read,
    rows_of,
    standardize,
    store,
    stride,
    write,
)

ONE = TokenLayout(("rgb",), ((8, 8),))
WHOLE = jnp.array([[0.0, 0.0, 1.0, 1.0]])


def flips(*values: bool):
    return jnp.array(values)


def scene(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """A smooth function of the place in the whole picture."""
    return np.sin(3 * rows) + np.cos(2 * columns)


def crop_values(box: tuple[float, float, float, float], flip: bool, grid: int = 8) -> np.ndarray:
    """The scene at the tokens of a crop."""
    places = (np.arange(grid) + 0.5) / grid
    rows = box[0] + places * box[2]
    columns = box[1] + (places[::-1] if flip else places) * box[3]
    return scene(rows[:, None], columns[None, :])


def test_a_whole_picture_is_read_back_as_it_was_written():
    values = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    maps = write(rows_of(blank(3, ONE, 8), jnp.array([1]), 8), jnp.asarray(values), WHOLE, flips(False), ONE, 0.9)
    np.testing.assert_allclose(maps[0, 0], values.reshape(8, 8), rtol=1e-5)
    np.testing.assert_allclose(read(maps, WHOLE, flips(False), ONE), values, rtol=1e-5)
    mirrored = np.asarray(read(maps, WHOLE, flips(True), ONE)).reshape(8, 8)
    np.testing.assert_allclose(mirrored, values.reshape(8, 8)[:, ::-1], rtol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.25, 0.5, 0.5, 0.5), (0.4, 0.1, 0.45, 0.7)])
def test_reading_follows_crop_and_mirror(box, flip):
    places = (np.arange(32) + 0.5) / 32
    maps = jnp.asarray(scene(places[:, None], places[None, :]), jnp.float32)[None, None]
    found = np.asarray(read(maps, jnp.array([box]), flips(flip), ONE)).reshape(8, 8)
    np.testing.assert_allclose(found, crop_values(box, flip), atol=0.08)


@pytest.mark.parametrize("flip", [False, True])
def test_writing_touches_the_cells_under_the_crop_alone(flip):
    box = (0.25, 0.5, 0.5, 0.5)
    values = jnp.asarray(crop_values(box, flip), jnp.float32).reshape(1, -1)
    maps = np.asarray(write(rows_of(blank(1, ONE, 16), jnp.array([0]), 16), values, jnp.array([box]), flips(flip), ONE, 0.5))[0, 0]
    inside = np.zeros((16, 16), bool)
    inside[4:12, 8:] = True
    assert (np.isnan(maps) == ~inside).all()
    places = (np.arange(16) + 0.5) / 16
    np.testing.assert_allclose(maps[inside], scene(places[:, None], places[None, :])[inside], atol=0.08)


def test_later_visits_are_averaged_in_and_nothing_is_said_of_unknown_tokens():
    first, second = jnp.full((1, 64), 1.0), jnp.full((1, 64), 3.0).at[:, :32].set(jnp.nan)
    maps = write(rows_of(blank(1, ONE, 8), jnp.array([0]), 8), first, WHOLE, flips(False), ONE, 0.75)
    maps = np.asarray(write(maps, second, WHOLE, flips(False), ONE, 0.75))[0, 0]
    np.testing.assert_allclose(maps[:4], 1.0)
    np.testing.assert_allclose(maps[4:], 0.75 + 0.25 * 3.0)


def test_places_that_were_never_seen_are_unknown_and_filled_at_random():
    values = jnp.ones((1, 64))
    maps = write(rows_of(blank(1, ONE, 16), jnp.array([0]), 16), values, jnp.array([[0.0, 0.0, 0.5, 0.5]]), flips(False), ONE, 0.5)
    found = np.asarray(read(maps, WHOLE, flips(False), ONE)).reshape(8, 8)
    assert np.isfinite(found[:4, :4]).all() and np.isnan(found[5:, 5:]).all()
    filled = np.asarray(fill_unknown(jnp.asarray(found).reshape(1, -1), ONE, sample_keys(0, 0, 1))).reshape(8, 8)
    np.testing.assert_allclose(filled, 1.0, atol=0.01)
    assert len(np.unique(filled[5:, 5:])) == 9
    nothing = np.asarray(fill_unknown(jnp.full((2, 64), jnp.nan), ONE, sample_keys(0, 0, 2)))
    assert np.isfinite(nothing).all() and len(np.unique(nothing)) == 128


def test_padding_rows_leave_every_record_alone():
    maps = store(blank(4, ONE, 8), jnp.array([2, -1]), jnp.stack([jnp.ones((1, 8, 8)), jnp.zeros((1, 8, 8))]))
    assert [bool(np.isnan(m).all()) for m in np.asarray(maps)] == [True, True, False, True]
    assert np.isnan(rows_of(maps, jnp.array([-1]), 8)).all() and (np.asarray(rows_of(maps, jnp.array([2]), 8)) == 1).all()


def test_standardize_counts_known_tokens_alone():
    values = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32) * 5 + 3
    values[0, :10] = np.nan
    present = np.ones((2, 64), bool)
    present[1, 30:] = False
    found = np.asarray(standardize(jnp.asarray(values), ONE, jnp.asarray(present)))
    for row, known in zip(found, (~np.isnan(values[0]), present[1]), strict=True):
        assert np.isnan(row[~known]).all()
        np.testing.assert_allclose([row[known].mean(), row[known].std()], [0, 1], atol=1e-5)


# The sources


def visit(size: int = 8, records: int = 16, seed: int = 0):
    """A batch with index, box and flip."""
    rng = np.random.default_rng(seed)
    batch = tiny_batch(size, seed)
    length = rng.uniform(0.5, 1.0, (size, 2))
    start = rng.uniform(0, 1 - length)
    batch |= dict(
        index=rng.permutation(records)[:size].astype(np.int32),
        box=np.concatenate([start, length], axis=1).astype(np.float32),
        flip=rng.random(size) < 0.5,
    )
    return on_device(batch)


@pytest.fixture(scope="module")
def objective():
    return tiny_objective(scores=dict(name="attention_high"), guidance=dict(name="self_attention"))


@pytest.fixture(scope="module")
def request_of(objective):
    """A request of a source with a given batch and memory."""
    params = fresh_params(objective)

    def make(source, batch, state):
        return source.remind(objective._request(params, {}, batch, sample_keys(0, 0, 8)), state)

    return make


def test_reused_attention_remembers_the_exact_scores_of_a_part(objective, request_of):
    source = ReusedAttention(every=2, grid=8, momentum=0.0)
    model, batch = objective.model, visit()
    maps = source.init(model, {}, 16)
    assert maps.shape == (16, 3 * 8 * 8) and maps.dtype == jnp.float16
    request = request_of(source, batch, maps)
    before = np.asarray(source(request))
    assert np.isfinite(before).all() and abs(np.corrcoef(before[0], before[1])[0, 1]) < 0.5
    maps = source.update(request, jnp.zeros((), jnp.int32), None)
    visited = np.sort(np.asarray(batch.record.index)[::2])
    assert (np.flatnonzero(~np.isnan(np.asarray(maps)).all(axis=1)) == visited).all()
    # Read under the same crop they are the exact scores, but for the way through the map's cells.
    exact = np.asarray(objective.guidance(request))
    again = np.asarray(source(source.remind(request, maps)))
    for span in model.layout.spans():
        for i in range(0, 8, 2):
            assert np.corrcoef(np.log(again[i, span]), np.log(exact[i, span]))[0, 1] > 0.8


def test_the_samples_with_an_exact_pass_divide_the_batch():
    assert [stride(batch, 24) for batch in (8, 24, 48, 60, 64, 256, 2048, 53)] == [8, 24, 24, 30, 32, 32, 32, 53]
    rows = every_kth({"a": jnp.arange(60), "b": jnp.arange(120).reshape(60, 2)}, stride(60, 24))
    assert rows["a"].tolist() == [0, 30] and rows["b"].tolist() == [[0, 1], [60, 61]]


def test_whole_pictures_replace_the_map(objective, request_of):
    source = ReusedAttention(every=4, view="whole", grid=4)
    assert source.needs.whole_every == 4 and ReusedAttention().needs.whole_every == 0
    batch = visit()
    whole = {name: batch.values[name][::4] for name in objective.model.inputs}
    request = request_of(source, batch._replace(whole=whole), jnp.zeros((16, 3 * 4 * 4), jnp.float16))
    maps = np.asarray(source.update(request, jnp.zeros((), jnp.int32), None))
    exact = standardize(jnp.log(objective.guidance(request)), objective.model.layout)
    for row in (0, 4):
        np.testing.assert_allclose(maps[int(batch.record.index[row])].reshape(-1), exact[row], atol=2e-3, rtol=2e-3)
    others = sorted(set(range(16)) - set(np.asarray(batch.record.index)[::4].tolist()))
    assert (maps[others] == 0).all()


def test_average_error_remembers_what_was_hard(objective, request_of):
    source = AverageError(momentum=0.5, grid=4)
    batch = visit()
    batch = batch._replace(record=batch.record._replace(box=jnp.tile(WHOLE, (8, 1)), flip=jnp.zeros(8, bool)))
    errors = np.random.default_rng(1).random((8, 48)).astype(np.float32)
    errors[:, ::5] = np.nan
    maps = source.init(objective.model, {}, 16)
    request = request_of(source, batch, maps)
    maps = source.update(request, jnp.zeros((), jnp.int32), jnp.asarray(errors))
    found = np.asarray(source(source.remind(request, maps)))
    known = ~np.isnan(errors)
    expected = np.asarray(standardize(jnp.asarray(errors), objective.model.layout))
    np.testing.assert_allclose(found[known], expected[known], atol=2e-3)
    assert np.isfinite(found).all()
    with pytest.raises(ValueError, match="needs the errors of the step"):
        source.update(request, jnp.zeros((), jnp.int32), None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ReusedAttention(every=0), "every is 0"),
        (ReusedAttention(view="half"), "view is 'half'; known: crop, whole"),
        (ReusedAttention(grid=0), "grid is 0"),
        (ReusedAttention(momentum=1.0), "momentum is 1.0"),
        (ReusedAttention(block=9), "block is 9"),
        (AverageError(grid=65), "grid is 65"),
        (AverageError(momentum=-0.1), "momentum is -0.1"),
    ],
)
def test_mistakes_are_named(source, message):
    with pytest.raises(ValueError, match=message):
        source.check(tiny_objective().model)


def test_average_error_needs_an_error_of_every_input():
    with pytest.raises(ValueError, match="needs an error of every input, but 'depth'"):
        AverageError().check(tiny_objective(outputs=("rgb",)).model)
