"""Patches, position tables and torch-exact resampling."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.core.patches import patchify, resample_pos_embed, resampling_matrix, sincos_position_table, unpatchify

SHAPES = [((14, 14), (16, 24)), ((14, 14), (40, 24)), ((14, 14), (7, 10)), ((4, 6), (9, 3)), ((5, 14), (14, 5)), ((1, 3), (4, 7))]


def test_patch_vectors_run_row_column_channel():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = np.asarray(patchify(images, 2))
    assert tokens.shape == (2, 6, 12)
    # Token 4 of a 2 x 3 grid is row 1, column 1.
    np.testing.assert_array_equal(tokens[1, 4], images[1, 2:4, 2:4].reshape(-1))


@pytest.mark.parametrize("height,width,patch,channels", [(8, 8, 4, 3), (4, 12, 2, 1), (6, 3, 3, 10), (5, 7, 1, 2)])
def test_unpatchify_inverts_patchify(height, width, patch, channels):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, height, width, channels)), jnp.float32)
    tokens = patchify(images, patch)
    np.testing.assert_array_equal(unpatchify(tokens, (height // patch, width // patch), patch), images)


@pytest.mark.parametrize("grid,width", [((14, 14), 768), ((14, 14), 256), ((3, 5), 16)])
def test_position_table_is_row_first(grid, width):
    table = sincos_position_table(grid, width)
    assert table.shape == (*grid, width) and table.dtype == np.float32
    quarter = width // 4
    row, column = grid[0] - 1, grid[1] - 2
    omega = [10000 ** (-k / quarter) for k in range(quarter)]
    expected = [f(x * w) for x in (row, column) for f in (np.sin, np.cos) for w in omega]
    np.testing.assert_allclose(table[row, column], expected, atol=7e-7)


def test_position_table_needs_a_width_divisible_by_four():
    with pytest.raises(ValueError, match="divisible by 4, not 18"):
        sincos_position_table((2, 2), 18)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("source,goal", SHAPES)
def test_resampling_is_torchs(method, source, goal):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.functional.interpolate")
    table = np.random.default_rng(1).standard_normal((*source, 8)).astype(np.float32)
    ours = resample_pos_embed(table, goal, method)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(table.transpose(2, 0, 1))[None], size=goal, mode=method, align_corners=False)
    np.testing.assert_allclose(ours, theirs[0].numpy().transpose(1, 2, 0), rtol=1e-5, atol=1e-5)


def test_resampling_known_weights():
    # Doubling, second point: center 0.25; cubic kernel with a = -0.75 at distances 1.25, 0.25, 0.75, 1.75.
    weights = resampling_matrix(8, 16, "bicubic")[5]
    np.testing.assert_allclose(weights[1:5], [-0.10546875, 0.87890625, 0.26171875, -0.03515625], atol=1e-7)
    np.testing.assert_allclose(resampling_matrix(8, 16, "bilinear")[5, 2:4], [0.75, 0.25], atol=1e-7)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resampling_weights_add_up_to_one(method):
    for size_in, size_out in [(14, 40), (14, 5), (3, 14), (1, 6)]:
        np.testing.assert_allclose(resampling_matrix(size_in, size_out, method).sum(axis=1), 1.0, atol=1e-6)


def test_resampling_at_equal_size_is_the_table_itself():
    table = jnp.ones((3, 4, 8), jnp.float32)
    assert resample_pos_embed(table, (3, 4)) is table


def test_unknown_resampling_is_an_error():
    with pytest.raises(ValueError, match="unknown resampling 'lanczos'; known: bicubic, bilinear"):
        resampling_matrix(4, 8, "lanczos")


@pytest.mark.parametrize(("side", "goal"), [(14, 6), (14, 30), (4, 2)])
def test_the_offset_of_learned_positions_is_torchs_scale_factor(side, goal):
    torch = pytest.importorskip("torch", reason="compares with torch.nn.functional.interpolate")
    table = np.random.default_rng(0).standard_normal((side, side, 5)).astype(np.float32)
    factor = ((goal + 0.1) / side,) * 2
    images = torch.from_numpy(table.transpose(2, 0, 1))[None]
    theirs = torch.nn.functional.interpolate(images, scale_factor=factor, mode="bicubic")
    assert theirs.shape[2:] == (goal, goal)
    ours = np.asarray(resample_pos_embed(table, (goal, goal), offset=0.1))
    # Torch computes the places in float32.
    np.testing.assert_allclose(ours, theirs[0].numpy().transpose(1, 2, 0), atol=2e-5)
    assert np.abs(ours - np.asarray(resample_pos_embed(table, (goal, goal)))).max() > 1e-3


def test_the_offset_changes_nothing_at_equal_size():
    table = np.ones((14, 14, 3), np.float32)
    assert resample_pos_embed(table, (14, 14), offset=0.1) is table
