"""Images to patch vectors and back, fixed position tables, and torch-exact resampling of position tables."""

from __future__ import annotations

import einops
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped


def patchify(images: Shaped[Array, "b h w c"], patch: int) -> Shaped[Array, "b n p"]:
    """Cut images into patches of side `patch`; tokens run row by row, a patch vector is (row, column, channel)."""
    return einops.rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=patch, q=patch)


def unpatchify(tokens: Shaped[Array, "b n p"], grid: tuple[int, int], patch: int) -> Shaped[Array, "b h w c"]:
    """The inverse of `patchify` for a grid of (rows, columns) tokens."""
    return einops.rearrange(tokens, "b (h w) (p q c) -> b (h p) (w q) c", h=grid[0], w=grid[1], p=patch, q=patch)


def sincos_position_table(grid: tuple[int, int], width: int, columns_first: bool = False) -> Float[np.ndarray, "h w d"]:
    """The fixed 2-D table [sin(row w) | cos(row w) | sin(column w) | cos(column w)], w_k = 10000^(-4k/d).

    Row first is MultiMAE's; MAE and CrossMAE have the column half first. Positions are the integers 0, 1, ... `width` must be
    divisible by 4.
    """
    if width % 4:
        raise ValueError(f"a 2-D sin-cos table needs a width divisible by 4, not {width}")
    quarter = width // 4
    omega = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)
    rows = np.arange(grid[0], dtype=np.float64)[:, None] * omega
    columns = np.arange(grid[1], dtype=np.float64)[:, None] * omega
    rows = np.concatenate([np.sin(rows), np.cos(rows)], axis=-1)[:, None, :]
    columns = np.concatenate([np.sin(columns), np.cos(columns)], axis=-1)[None, :, :]
    half = 2 * quarter
    table = [np.broadcast_to(rows, (*grid, half)), np.broadcast_to(columns, (*grid, half))]
    return np.concatenate(table[::-1] if columns_first else table, axis=-1).astype(np.float32)


def _cubic(x: np.ndarray, a: float = -0.75) -> np.ndarray:
    """The cubic convolution kernel with PyTorch's a (PIL and `jax.image.resize` use -0.5)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


def resampling_matrix(size_in: int, size_out: int, method: str, offset: float = 0.0) -> Float[np.ndarray, "o i"]:
    """Rows of weights that resample `size_in` points to `size_out`, as `torch.nn.functional.interpolate` does with
    `align_corners=False` and no antialiasing: half-pixel centers, border index clamped. `method`: "bicubic" or "bilinear".

    `offset` moves the sample points as the scale factor (size_out + offset) / size_in does: DINO and what descends from it
    add 0.1 so that rounding cannot lose a row, and thereby read their tables at slightly other places.
    """
    center = (np.arange(size_out) + 0.5) * size_in / (size_out + offset) - 0.5
    taps: tuple[int, ...]
    if method == "bilinear":
        center = np.maximum(center, 0.0)
        taps, kernel = (0, 1), lambda x: np.maximum(1 - np.abs(x), 0.0)
    elif method == "bicubic":
        taps, kernel = (-1, 0, 1, 2), _cubic
    else:
        raise ValueError(f"unknown resampling {method!r}; known: bicubic, bilinear")
    first = np.floor(center)
    matrix = np.zeros((size_out, size_in))
    for tap in taps:
        index = np.clip(first + tap, 0, size_in - 1).astype(int)
        np.add.at(matrix, (np.arange(size_out), index), kernel(center - (first + tap)))
    return matrix.astype(np.float32)


def resample_pos_embed(
    table: Shaped[Array, "h w d"] | Shaped[np.ndarray, "h w d"], grid: tuple[int, int], method: str = "bicubic", offset: float = 0.0
):
    """Resample a position table (rows, columns, width) to another grid; at equal size the table itself.

    Torch-exact (see `resampling_matrix`, also for `offset`). The positions stay in units of the table's own grid, as in the reference.
    """
    if table.shape[:2] == tuple(grid):
        return table
    rows = resampling_matrix(table.shape[0], grid[0], method, offset)
    columns = resampling_matrix(table.shape[1], grid[1], method, offset)
    # Contract in float32 whatever the table's type: tables are small, and bf16 positions would blur.
    return jnp.einsum("oh,hwd,pw->opd", rows, jnp.asarray(table, jnp.float32), columns, precision="highest")


LEARNED_OFFSET = 0.1  # DINO's, see `resampling_matrix`


def resample_learned(table: Shaped[Array, "h w d"] | Shaped[np.ndarray, "h w d"], grid: tuple[int, int]):
    """Resample a learned position table to another grid, as DINO and iBOT do; the one way for a forward pass and for a stored table."""
    return resample_pos_embed(table, grid, "bicubic", LEARNED_OFFSET)
