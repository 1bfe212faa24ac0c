"""Canonical solids: the parts that objects are made of, where rays meet them, and which way their surfaces face.

A ray is an origin and a direction; what is returned is the nearest ray parameter (inf: missed), and the outward direction at a point of
the surface. Objects are unions of canonical solids under affine maps, which leave the ray parameter as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

F32 = np.float32
Vectors = Float32[np.ndarray, "3 _"]  # one column per ray; a camera's rays share one origin, a single column
TUBE = F32(0.36)  # radius of the torus's tube where that of its center line is 1


@dataclasses.dataclass(frozen=True)
class Part:
    """One canonical solid of an object: its shape, center and half extents in the object's frame, and the axis it turns about."""

    shape: str
    center: tuple[float, float, float] = (0.0, 0.0, 0.0)
    half: tuple[float, float, float] = (1.0, 1.0, 1.0)
    axis: int = 2


# The kinds and their parts in a cube of half side 1; "y" is the thin side of flat ones.
KINDS: dict[str, tuple[Part, ...]] = {
    "ball": (Part("ball", half=(0.95, 0.95, 0.95)),),
    "cube": (Part("cube", half=(0.8, 0.8, 0.8)),),
    "cylinder": (Part("cylinder", half=(0.65, 0.65, 1.0)),),
    "cone": (Part("cone", half=(0.85, 0.85, 1.0)),),
    "pyramid": (Part("pyramid", half=(0.9, 0.9, 0.95)),),
    "ring": (Part("torus", half=(0.72, 0.72, 0.72), axis=1),),
    "dumbbell": (
        Part("ball", (-0.66, 0.0, 0.0), (0.42, 0.42, 0.42)),
        Part("ball", (0.66, 0.0, 0.0), (0.42, 0.42, 0.42)),
        Part("cylinder", (0.0, 0.0, 0.0), (0.5, 0.16, 0.16), axis=0),
    ),
    "cross": (Part("cube", half=(1.0, 0.26, 0.28)), Part("cube", half=(0.28, 0.26, 1.0))),
    "stairs": (
        Part("cube", (0.0, 0.0, -0.7), (1.0, 0.7, 0.3)),
        Part("cube", (0.33, 0.0, -0.1), (0.67, 0.7, 0.3)),
        Part("cube", (0.67, 0.0, 0.5), (0.33, 0.7, 0.3)),
    ),
    "mushroom": (Part("cylinder", (0.0, 0.0, -0.35), (0.24, 0.24, 0.65)), Part("ball", (0.0, 0.0, 0.35), (0.95, 0.95, 0.48))),
    "table": (
        Part("cube", (0.0, 0.0, 0.55), (1.0, 0.75, 0.13)),
        *(Part("cube", (x, y, -0.25), (0.11, 0.11, 0.7)) for x in (-0.85, 0.85) for y in (-0.6, 0.6)),
    ),
    "arch": (
        Part("cube", (-0.68, 0.0, -0.2), (0.26, 0.34, 0.8)),
        Part("cube", (0.68, 0.0, -0.2), (0.26, 0.34, 0.8)),
        Part("cube", (0.0, 0.0, 0.74), (1.0, 0.38, 0.22)),
    ),
}


def part_extent(part: Part) -> np.ndarray:
    """Half extents of a part's bounding box in the object's frame."""
    if part.shape != "torus":
        return np.asarray(part.half)
    return np.asarray(part.half) * (1 + np.where(np.arange(3) == part.axis, TUBE - 1, TUBE))


def _slab(origin: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a ray lies between -1 and 1 of one coordinate."""
    one, two = (-1 - origin) * inverse, (1 - origin) * inverse
    return np.minimum(one, two), np.maximum(one, two)


def _nearest(enter: np.ndarray, leave: np.ndarray) -> np.ndarray:
    return np.where((enter < leave) & (enter > 1e-4), enter, np.inf).astype(F32)


def inverse(direction: np.ndarray) -> np.ndarray:
    return 1 / np.where(np.abs(direction) < 1e-9, F32(1e-9), direction)


def _roots(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a t^2 + 2 half_b t + c in rising order for a > 0, falling for a < 0; (inf, -inf) where there are none."""
    discriminant = half_b * half_b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    over_a = inverse(a)
    real = discriminant > 0
    return np.where(real, (-half_b - root) * over_a, np.inf), np.where(real, (-half_b + root) * over_a, -np.inf)


def _hit_ball(o: Vectors, d: Vectors) -> np.ndarray:
    return _nearest(*_roots((d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1))


def _hit_cube(o: Vectors, d: Vectors) -> np.ndarray:
    low, high = _slab(o, inverse(d))
    return _nearest(low.max(0), high.min(0))


def _hit_cylinder(o: Vectors, d: Vectors) -> np.ndarray:
    enter, leave = _roots((d[:2] ** 2).sum(0), (o[:2] * d[:2]).sum(0), (o[:2] ** 2).sum(0) - 1)
    low, high = _slab(o[2], inverse(d[2]))
    return _nearest(np.maximum(enter, low), np.minimum(leave, high))


def _hit_cone(o: Vectors, d: Vectors) -> np.ndarray:
    # x^2 + y^2 <= ((1 - z) / 2)^2 between z = -1 and 1. A ray steeper than the side (a < 0) is inside before the one
    # root and after the other: rising, it leaves the lower half of the double cone at the smaller one.
    above, slope = (1 - o[2]) / 2, -d[2] / 2
    a = (d[:2] ** 2).sum(0) - slope**2
    first, second = _roots(a, (o[:2] * d[:2]).sum(0) - above * slope, (o[:2] ** 2).sum(0) - above**2)
    steep, rising = a < 0, d[2] > 0
    enter = np.where(steep, np.where(rising, -np.inf, first), first)
    leave = np.where(steep, np.where(rising, second, np.inf), second)
    low, high = _slab(o[2], inverse(d[2]))
    return _nearest(np.maximum(enter, low), np.minimum(leave, high))


_PYRAMID = np.array([[2, 0, 1], [-2, 0, 1], [0, 2, 1], [0, -2, 1], [0, 0, -1]], F32)  # n . p <= 1


def _hit_pyramid(o: Vectors, d: Vectors) -> np.ndarray:
    along = _PYRAMID @ d
    t = (1 - _PYRAMID @ o) * inverse(along)
    return _nearest(np.where(along < 0, t, -np.inf).max(0), np.where(along > 0, t, np.inf).min(0))


def _hit_torus(o: Vectors, d: Vectors) -> np.ndarray:
    """By sphere tracing from the entry into the bounding ball; 40 steps settle all but grazing rays."""
    speed = np.sqrt((d * d).sum(0))
    enter, leave = _roots(speed**2, (o * d).sum(0), (o * o).sum(0) - (1 + TUBE) ** 2)
    t = np.where(enter < leave, np.maximum(enter, 1e-3), np.inf).astype(F32)
    active = np.nonzero(np.isfinite(t))[0]
    start, way, rate, end, time = o[:, active] if o.shape[1] > 1 else o, d[:, active], speed[active], leave[active], t[active]
    result = np.full(d.shape[1], np.inf, F32)
    for _ in range(40):
        p = start + time * way
        gap = np.sqrt((np.sqrt(p[0] ** 2 + p[1] ** 2) - 1) ** 2 + p[2] ** 2) - TUBE
        near = np.abs(gap) < 3e-4
        result[active[near]] = time[near]
        time = time + gap / rate
        on = ~near & (time < end)
        active, way, rate, end, time = active[on], way[:, on], rate[on], end[on], time[on]
        start = start[:, on] if start.shape[1] > 1 else start
        if not active.size:
            break
    return np.where(result > 2e-3, result, np.inf).astype(F32)


def _normal_ball(p: Vectors) -> Vectors:
    return p


def _normal_cube(p: Vectors) -> Vectors:
    face = np.abs(p).argmax(0)
    return np.where(np.arange(3)[:, None] == face, np.sign(p), 0).astype(F32)


def _normal_cylinder(p: Vectors) -> Vectors:
    cap = np.abs(p[2]) > np.sqrt(p[0] ** 2 + p[1] ** 2)
    return np.stack([np.where(cap, 0, p[0]), np.where(cap, 0, p[1]), np.where(cap, p[2], 0)])


def _normal_cone(p: Vectors) -> Vectors:
    base = np.abs(p[2] + 1) < np.abs(np.sqrt(p[0] ** 2 + p[1] ** 2) - (1 - p[2]) / 2)
    return np.stack([np.where(base, 0, p[0]), np.where(base, 0, p[1]), np.where(base, -1, (1 - p[2]) / 4)]).astype(F32)


def _normal_pyramid(p: Vectors) -> Vectors:
    return _PYRAMID[(_PYRAMID @ p).argmax(0)].T


def _normal_torus(p: Vectors) -> Vectors:
    pull = 1 - 1 / np.maximum(np.sqrt(p[0] ** 2 + p[1] ** 2), 1e-6)
    return np.stack([p[0] * pull, p[1] * pull, p[2]])


SHAPES: dict[str, tuple[Callable[[Vectors, Vectors], np.ndarray], Callable[[Vectors], Vectors]]] = {
    "ball": (_hit_ball, _normal_ball),
    "cube": (_hit_cube, _normal_cube),
    "cylinder": (_hit_cylinder, _normal_cylinder),
    "cone": (_hit_cone, _normal_cone),
    "pyramid": (_hit_pyramid, _normal_pyramid),
    "torus": (_hit_torus, _normal_torus),
}


def axes_of(part: Part) -> list[int]:
    """Order of the object's axes in which the part's own axis comes last."""
    return [(part.axis + 1) % 3, (part.axis + 2) % 3, part.axis]


def into_part(part: Part, points: Vectors, is_direction: bool) -> Vectors:
    """Map points or directions of the object's unscaled frame into the part's canonical frame."""
    axes = axes_of(part)
    half = np.asarray(part.half, F32)[axes, None]
    if is_direction:
        return points[axes] / half
    return (points[axes] - np.asarray(part.center, F32)[axes, None]) / half
