"""Patch features to colors: their main components on one basis for many pictures, and how alike patches are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

SHARE = 1.0  # percent of the patches at either end of a component that have its least or greatest color


class Basis(NamedTuple):
    """Three directions in which features vary most, and what is shown as the darkest and lightest of each.

    A feature x has the coordinates (x - mean) @ axes.T; `spread`: the share of the variance along each axis.
    """

    mean: Float[np.ndarray, " d"]
    axes: Float[np.ndarray, "3 d"]
    low: Float[np.ndarray, "3"]
    high: Float[np.ndarray, "3"]
    spread: Float[np.ndarray, "3"]


def fit_basis(features: Float[np.ndarray, "n d"]) -> Basis:
    """The basis of the first three principal components of `features`. Raises ValueError for features of fewer than 3 dimensions."""
    if features.shape[1] < 3:
        raise ValueError(f"features of {features.shape[1]} dimensions have no three components")
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))
    axes = vectors[:, ::-1][:, :3].T
    axes = axes * np.sign(axes[np.arange(3), np.abs(axes).argmax(axis=1)])[:, None]  # an eigenvector's sign is open
    low, high = np.percentile((rows - mean) @ axes.T, (SHARE, 100 - SHARE), axis=0)
    spread = np.maximum(values[::-1][:3], 0) / max(float(np.maximum(values, 0).sum()), 1e-30)
    return Basis(mean, axes, low, high, spread)


def coordinates(basis: Basis, features: Float[np.ndarray, "*b d"]) -> Float[np.ndarray, "*b 3"]:
    """Where features lie along the three axes."""
    return (features.astype(np.float64) - basis.mean) @ basis.axes.T


def component_colors(basis: Basis, features: Float[np.ndarray, "gh gw d"]) -> UInt8[np.ndarray, "gh gw 3"]:
    """One pixel per patch: the first component as red, the second as green, the third as blue."""
    unit = np.clip((coordinates(basis, features) - basis.low) / np.maximum(basis.high - basis.low, 1e-12), 0, 1)
    return (unit * 255).round().astype(np.uint8)


class Place(NamedTuple):
    """What patch features owe to their place: a polynomial of second degree in row and column, fitted to many pictures.

    Position is often most of what varies in a feature; without it the main components show what is in the picture.
    """

    weights: Float[np.ndarray, "6 d"]

    def removed(self, features: Float[np.ndarray, "*b gh gw d"]) -> Float[np.ndarray, "*b gh gw d"]:
        """Features less what their place says of them."""
        return features.astype(np.float64) - _terms(features.shape[-3], features.shape[-2]) @ self.weights


def fit_place(features: Float[np.ndarray, "b gh gw d"]) -> Place:
    """The least-squares fit over all patches of all pictures."""
    terms = _terms(*features.shape[1:3])
    # All pictures have the same terms, so the fit to their mean is the fit to all of them.
    mean = features.astype(np.float64).mean(axis=0)
    return Place(np.linalg.lstsq(terms.reshape(-1, 6), mean.reshape(-1, mean.shape[-1]), rcond=None)[0])


def _terms(height: int, width: int) -> Float[np.ndarray, "gh gw 6"]:
    """1, r, c, rc, r^2, c^2 of every place, with r and c in -1 ... 1."""
    row, column = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(row), row, column, row * column, row**2, column**2], axis=-1)


def cosine(features: Float[np.ndarray, "*b d"], feature: Float[np.ndarray, " d"]) -> Float[np.ndarray, "*b"]:
    """The cosine of the angle between every feature and one: 1 for the same direction."""
    rows, one = features.astype(np.float64), feature.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=-1) * np.linalg.norm(one)
    return (rows @ one) / np.maximum(lengths, 1e-30)
