"""`scenes`, the embedded data: ray-cast textured solids on textured ground, with exact depth, classes and label.

Sample i of a seed is a pure function of (seed, i). Colours and textures are drawn independently of the kinds of the
objects, so a mean colour tells nothing of the label: it takes shape.

World frame: x right, y forward, z up, metres, ground at z = 0. Camera rays are scaled to a forward component of 1, so
the ray parameter *is* the depth along the optical axis. Solids are unions of canonical ones (unit ball, cube, cylinder,
cone, pyramid, torus) under affine maps, which leave the ray parameter as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, UInt8

F32 = np.float32
Vectors = Float32[np.ndarray, "3 _"]  # one column per ray; a camera's rays share one origin, a single column


@dataclasses.dataclass(frozen=True)
class Part:
    """One canonical solid of an object: its shape, centre and half extents in the object's frame, and the axis it turns about."""

    shape: str
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
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
KIND_NAMES: tuple[str, ...] = tuple(KINDS)
CLASS_NAMES: tuple[str, ...] = ("background", "ground", *KIND_NAMES)
FIRST_KIND = 2  # `semseg >= FIRST_KIND` is the mask of the objects
METRES_PER_COUNT = 1 / 512  # of stored depth: 2 mm steps up to 128 m
MISSING = 0  # stored depth of the sky
MODALITIES = {  # what the stored modalities are, in the fields of `maskvit.core.modalities.Modality`
    "rgb": {"kind": "continuous", "channels": 3},
    "depth": {"kind": "continuous", "channels": 1, "missing": MISSING, "metres_per_count": METRES_PER_COUNT},
    "semseg": {"kind": "categorical", "num_classes": len(CLASS_NAMES)},
}
VERSION = 1  # raised when the same seed and index give another picture
FLAT = ("ring", "dumbbell", "cross", "arch")  # turned so that they are not seen edge-on
TUBE = F32(0.36)  # radius of the torus's tube where that of its centre line is 1
PATTERNS = ("plain", "checks", "stripes", "dots", "clouds", "waves")


@dataclasses.dataclass(frozen=True)
class Texture:
    """Two colours mixed by a pattern; `direction` orients stripes and waves, `frequency` is in cycles per unit."""

    pattern: str
    colours: Float32[np.ndarray, "2 3"]
    frequency: float
    direction: Float32[np.ndarray, " xyz"]
    phase: float


@dataclasses.dataclass(frozen=True)
class Solid:
    """An object: world point = rotation @ (scale * local point) + centre."""

    kind: int
    centre: Float32[np.ndarray, " xyz"]
    rotation: Float32[np.ndarray, "xyz uvw"]
    scale: Float32[np.ndarray, " xyz"]
    texture: Texture

    @property
    def parts(self) -> tuple[Part, ...]:
        """The canonical solids it is the union of."""
        return KINDS[KIND_NAMES[self.kind]]

    @property
    def radius(self) -> float:
        """Radius of a ball about `centre` that holds it."""
        return max(float(np.linalg.norm(self.scale * (np.abs(part.centre) + part_extent(part)))) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Wall:
    """A vertical wall: points with normal . point = offset, up to `height` metres."""

    normal: Float32[np.ndarray, " xyz"]
    offset: float
    height: float
    texture: Texture


@dataclasses.dataclass(frozen=True)
class Scene:
    """All that a picture shows. `camera` columns: right, down, forward; `tangent` is tan(half the vertical field of view).

    `solids[0]` is the nearest and gives the label.
    """

    position: Float32[np.ndarray, " xyz"]
    camera: Float32[np.ndarray, "xyz uvw"]
    tangent: float
    solids: tuple[Solid, ...]
    ground: Texture
    walls: tuple[Wall, ...]
    sun: Float32[np.ndarray, " xyz"]
    sun_colour: Float32[np.ndarray, " xyz"]
    fill: Float32[np.ndarray, " xyz"]  # direction of a second light without shadow
    fill_colour: Float32[np.ndarray, " xyz"]
    ambient: Float32[np.ndarray, " xyz"]
    sky: Float32[np.ndarray, "2 3"]


class Sample(TypedDict):
    """A picture with what is known of it; see `render_scene`."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    semseg: UInt8[np.ndarray, "h w"]
    label: int


def part_extent(part: Part) -> np.ndarray:
    """Half extents of a part's bounding box in the object's frame."""
    if part.shape != "torus":
        return np.asarray(part.half)
    return np.asarray(part.half) * (1 + np.where(np.arange(3) == part.axis, TUBE - 1, TUBE))


# --- drawing a scene ------------------------------------------------------------------------------------------------


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(F32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.random() * 6, rng.uniform(0.1, 0.9), rng.uniform(0.3, 1.0)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * ramp)).astype(F32)


def _texture(rng: np.random.Generator, frequency: tuple[float, float], strength: tuple[float, float]) -> Texture:
    first, second = _colour(rng), _colour(rng)
    share = rng.uniform(*strength)
    colours = np.stack([first, first + share * (second - first)]).astype(F32)
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return Texture(pattern, colours, float(rng.uniform(*frequency)), _unit(rng.normal(size=3)), float(rng.random()))


def _turn(yaw: float) -> np.ndarray:
    cos, sin = np.cos(yaw), np.sin(yaw)
    return np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], F32)


def _solid(rng: np.random.Generator, kind: int, place: np.ndarray, size: float) -> Solid:
    name = KIND_NAMES[kind]
    isotropic = name in ("ring", "ball", "dumbbell")  # the torus is traced by its distance function; a ball is round
    scale = size * (np.ones(3) if isotropic else rng.uniform(0.87, 1.15, 3))
    towards = -np.arctan2(place[0], place[1])  # yaw at which the thin side faces the camera
    yaw = towards + rng.uniform(-0.9, 0.9) + np.pi * rng.integers(2) if name in FLAT else rng.uniform(0, 2 * np.pi)
    if name == "stairs":  # seen from behind they are a box
        yaw = towards + rng.uniform(-1.0, 1.0) + np.pi * rng.integers(2)
    bottom = min(part.centre[2] - part_extent(part)[2] for part in KINDS[name])
    centre = np.array([place[0], place[1], -bottom * scale[2]])
    return Solid(kind, centre.astype(F32), _turn(yaw), scale.astype(F32), _texture(rng, (0.8, 2.2), (0.3, 1.0)))


def sample_scene(seed: int, index: int) -> Scene:
    """Draw scene `index` of `seed`; a pure function of both."""
    rng = np.random.default_rng([seed, index])
    kind = int(rng.integers(len(KINDS)))
    distance, size = rng.uniform(3.4, 5.6), rng.uniform(0.85, 1.2)
    first = np.array([rng.uniform(-0.5, 0.5), distance])
    places, solids = [(first, 1.5 * size)], [_solid(rng, kind, first, size)]
    others = rng.permutation([k for k in range(len(KINDS)) if k != kind])[: rng.integers(0, 4)]
    for other in others:
        for _ in range(8):  # a few tries for a free place behind the nearest object
            depth, size = distance + rng.uniform(3.2, 9.0), rng.uniform(0.7, 1.5)
            place = np.array([rng.uniform(-0.6, 0.6) * depth, depth])
            if all(np.linalg.norm(place - taken) > 1.5 * size + room for taken, room in places):
                places.append((place, 1.5 * size))
                solids.append(_solid(rng, int(other), place, size))
                break
    height = rng.uniform(1.1, 3.0)
    position = np.array([0, 0, height], F32)
    target = np.array([first[0] + rng.uniform(-0.7, 0.7), first[1], rng.uniform(0.6, 1.3)])
    forward = _unit(target - position)
    roll = rng.uniform(-0.06, 0.06)
    right = _unit(np.cross(forward, [np.sin(roll), 0, np.cos(roll)]))
    camera = np.stack([right, np.cross(forward, right), forward], axis=1).astype(F32)

    walls = []
    for _ in range(rng.integers(1, 3)):
        yaw = rng.uniform(-0.6, 0.6)
        tall = float(rng.uniform(2.5, 7.0)) if rng.random() < 0.5 else np.inf
        normal = np.array([np.sin(yaw), -np.cos(yaw), 0], F32)
        texture = _texture(rng, (0.1, 0.5), (0.1, 0.6))
        # The wall stands behind every object, seen along its own normal.
        behind = max(float(-normal[:2] @ place) + room for place, room in places)
        walls.append(Wall(normal, -(behind + float(rng.uniform(0.5, 7.0))), tall, texture))

    def direction(low: float, high: float) -> np.ndarray:
        azimuth, elevation = rng.uniform(np.pi, 2 * np.pi), rng.uniform(low, high)  # from the camera's side: the walls are lit
        return np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)], F32)

    two = rng.random() < 0.5
    return Scene(
        position=position,
        camera=camera,
        tangent=float(np.tan(np.radians(rng.uniform(21, 27)))),
        solids=tuple(solids),
        ground=_texture(rng, (0.3, 1.0), (0.2, 0.9)),
        walls=tuple(walls),
        sun=direction(0.5, 1.2),
        sun_colour=rng.uniform(0.65, 0.85) * rng.uniform(0.85, 1.0, 3).astype(F32),
        fill=direction(0.2, 1.2),
        fill_colour=(0.3 if two else 0.0) * rng.uniform(0.7, 1.0, 3).astype(F32),
        ambient=rng.uniform(0.2, 0.34) * rng.uniform(0.85, 1.0, 3).astype(F32),
        sky=np.stack([_colour(rng), _colour(rng)]),
    )


# --- canonical solids: nearest ray parameter (inf: missed), and the outward direction at a point of the surface ------


def _slab(origin: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where a ray lies between -1 and 1 of one coordinate."""
    one, two = (-1 - origin) * inverse, (1 - origin) * inverse
    return np.minimum(one, two), np.maximum(one, two)


def _nearest(enter: np.ndarray, leave: np.ndarray) -> np.ndarray:
    return np.where((enter < leave) & (enter > 1e-4), enter, np.inf).astype(F32)


def _inverse(direction: np.ndarray) -> np.ndarray:
    return 1 / np.where(np.abs(direction) < 1e-9, F32(1e-9), direction)


def _roots(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Roots of a t^2 + 2 half_b t + c in rising order for a > 0, falling for a < 0; (inf, -inf) where there are none."""
    discriminant = half_b * half_b - a * c
    root = np.sqrt(np.maximum(discriminant, 0))
    inverse = _inverse(a)
    real = discriminant > 0
    return np.where(real, (-half_b - root) * inverse, np.inf), np.where(real, (-half_b + root) * inverse, -np.inf)


def _hit_ball(o: Vectors, d: Vectors) -> np.ndarray:
    return _nearest(*_roots((d * d).sum(0), (o * d).sum(0), (o * o).sum(0) - 1))


def _hit_cube(o: Vectors, d: Vectors) -> np.ndarray:
    low, high = _slab(o, _inverse(d))
    return _nearest(low.max(0), high.min(0))


def _hit_cylinder(o: Vectors, d: Vectors) -> np.ndarray:
    enter, leave = _roots((d[:2] ** 2).sum(0), (o[:2] * d[:2]).sum(0), (o[:2] ** 2).sum(0) - 1)
    low, high = _slab(o[2], _inverse(d[2]))
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
    low, high = _slab(o[2], _inverse(d[2]))
    return _nearest(np.maximum(enter, low), np.minimum(leave, high))


_PYRAMID = np.array([[2, 0, 1], [-2, 0, 1], [0, 2, 1], [0, -2, 1], [0, 0, -1]], F32)  # n . p <= 1


def _hit_pyramid(o: Vectors, d: Vectors) -> np.ndarray:
    along = _PYRAMID @ d
    t = (1 - _PYRAMID @ o) * _inverse(along)
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


_SHAPES: dict[str, tuple[Callable[[Vectors, Vectors], np.ndarray], Callable[[Vectors], Vectors]]] = {
    "ball": (_hit_ball, _normal_ball),
    "cube": (_hit_cube, _normal_cube),
    "cylinder": (_hit_cylinder, _normal_cylinder),
    "cone": (_hit_cone, _normal_cone),
    "pyramid": (_hit_pyramid, _normal_pyramid),
    "torus": (_hit_torus, _normal_torus),
}


def _axes(part: Part) -> list[int]:
    """Order of the object's axes in which the part's own axis comes last."""
    return [(part.axis + 1) % 3, (part.axis + 2) % 3, part.axis]


def _into_part(solid: Solid, part: Part, points: Vectors, is_direction: bool) -> Vectors:
    """Map points or directions of the object's unscaled frame into the part's canonical frame."""
    axes = _axes(part)
    half = np.asarray(part.half, F32)[axes, None]
    if is_direction:
        return points[axes] / half
    return (points[axes] - np.asarray(part.centre, F32)[axes, None]) / half


def _hit_solid(solid: Solid, origin: Vectors, direction: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices of the rays that meet the ball about the solid, their nearest t, the part that was hit)."""
    centre = solid.centre[:, None] - origin
    along = (centre * direction).sum(0)
    squared = (direction * direction).sum(0)
    near = ((centre * centre).sum(0) - along**2 / squared < solid.radius**2) & (along > 0)
    rays = np.nonzero(near)[0]
    frame = (solid.rotation / solid.scale).T
    o = frame @ ((origin[:, rays] if origin.shape[1] > 1 else origin) - solid.centre[:, None])
    d = frame @ direction[:, rays]
    best, which = np.full(rays.size, np.inf, F32), np.zeros(rays.size, np.int8)
    for number, part in enumerate(solid.parts):
        t = _SHAPES[part.shape][0](_into_part(solid, part, o, False), _into_part(solid, part, d, True))
        closer = t < best
        best[closer], which[closer] = t[closer], number
    return rays, best, which


def _solid_normal(solid: Solid, local: Vectors, which: np.ndarray) -> Vectors:
    """Outward unit normals in the world at points of the object's unscaled frame."""
    normal = np.empty_like(local)
    for number, part in enumerate(solid.parts):
        chosen = np.nonzero(which == number)[0]
        if not chosen.size:
            continue
        axes = _axes(part)
        own = _SHAPES[part.shape][1](_into_part(solid, part, local[:, chosen], False))
        turned = np.empty_like(own)
        turned[axes] = own / np.asarray(part.half, F32)[axes, None]
        normal[:, chosen] = turned
    world = solid.rotation @ (normal / solid.scale[:, None])
    return world / np.maximum(np.sqrt((world * world).sum(0)), 1e-12)


# --- textures -------------------------------------------------------------------------------------------------------

_CLOUDS = np.random.default_rng(1234).random((64, 64)).astype(F32)


def _clouds(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two octaves of smooth noise in 0 ... 1."""
    total = np.zeros_like(u)
    for weight, rate in ((0.65, 1.0), (0.35, 2.3)):
        x, y = u * F32(rate), v * F32(rate)
        column, row = np.floor(x), np.floor(y)
        x, y = x - column, y - row
        x, y = x * x * (3 - 2 * x), y * y * (3 - 2 * y)
        left, top = column.astype(np.int32) & 63, row.astype(np.int32) & 63
        right, bottom = (left + 1) & 63, (top + 1) & 63
        upper = _CLOUDS[top, left] * (1 - x) + _CLOUDS[top, right] * x
        lower = _CLOUDS[bottom, left] * (1 - x) + _CLOUDS[bottom, right] * x
        total += F32(weight) * (upper * (1 - y) + lower * y)
    return np.clip((total - 0.5) * 2.2 + 0.5, 0, 1)


def _paint(texture: Texture, p: Vectors) -> Vectors:
    """Colours of surface points `p`, given in the texture's own units."""
    p = p * F32(texture.frequency) + F32(texture.phase)
    if texture.pattern == "plain":
        return np.repeat(texture.colours[0][:, None], p.shape[1], axis=1)
    if texture.pattern == "checks":
        share = (np.floor(p).sum(0).astype(np.int32) & 1).astype(F32)
    elif texture.pattern == "stripes":
        share = np.clip(3 * np.sin(F32(2 * np.pi) * (texture.direction @ p)) + 0.5, 0, 1)
    elif texture.pattern == "dots":
        share = np.clip((0.38 - np.sqrt(((p - np.floor(p) - 0.5) ** 2).sum(0))) * 12, 0, 1)
    elif texture.pattern == "clouds":
        share = _clouds(2 * (p[0] + 0.5 * p[2]), 2 * (p[1] + 0.8 * p[2]))
    else:
        bend = np.sin(F32(5) * p[1]) + np.sin(F32(4) * p[2] + F32(3) * p[0])
        share = 0.5 + 0.5 * np.sin(F32(9) * (texture.direction @ p) + bend)
    first, second = texture.colours[:, :, None]
    return first + (second - first) * share


# --- pictures -------------------------------------------------------------------------------------------------------


def _rays(scene: Scene, size: tuple[int, int], samples: int) -> Vectors:
    """Directions of the rays through the middles of `samples` x `samples` parts of each pixel, row by row."""
    height, width = size[0] * samples, size[1] * samples
    down = (np.arange(height, dtype=F32) + F32(0.5)) / height * 2 - 1
    right = (np.arange(width, dtype=F32) + F32(0.5)) / width * 2 - 1
    grid = np.ones((3, height, width), F32)
    grid[0] = right * F32(scene.tangent * width / height)
    grid[1] = down[:, None] * F32(scene.tangent)
    return scene.camera @ grid.reshape(3, -1)


def _shadow(scene: Scene, points: Vectors, normals: Vectors) -> np.ndarray:
    """True where an object stands between the point and the sun."""
    dark = np.zeros(points.shape[1], bool)
    start = points + F32(2e-3) * normals
    towards = np.repeat(scene.sun[:, None], points.shape[1], axis=1)
    for solid in scene.solids:
        rays, t, _ = _hit_solid(solid, start, towards)
        dark[rays] |= np.isfinite(t)
    return dark


def render_scene(scene: Scene, size: tuple[int, int] = (64, 64)) -> Sample:
    """Draw a scene.

    Returns:
      rgb: UInt8 "h w 3", the mean of 2 x 2 rays per pixel.
      depth: Float32 "h w", metres along the optical axis through the middle of the pixel; NaN in the sky.
      semseg: UInt8 "h w", class of that same ray: 0 walls and sky, 1 ground, 2 + kind for objects (`CLASS_NAMES`).
      label: kind of the nearest object (`KIND_NAMES`).
    """
    fine = _rays(scene, size, 2)
    direction = np.concatenate([fine, _rays(scene, size, 1)], axis=1)
    count, drawn = direction.shape[1], fine.shape[1]
    origin = scene.position[:, None]

    t = np.where(direction[2] < -1e-6, -origin[2] / np.minimum(direction[2], -1e-6), np.inf).astype(F32)
    surface = np.where(np.isfinite(t), 1, 0).astype(np.int16)  # 0 sky, 1 ground, 2 ... walls, then solids
    part = np.zeros(count, np.int8)
    for number, wall in enumerate(scene.walls):
        approach = wall.normal @ direction
        reach = (F32(wall.offset) - wall.normal @ origin) * _inverse(approach)
        reach = np.where((approach < 0) & (reach > 0) & (origin[2] + reach * direction[2] <= wall.height), reach, np.inf)
        closer = reach < t
        t[closer], surface[closer] = reach[closer], 2 + number
    first_solid = 2 + len(scene.walls)
    for number, solid in enumerate(scene.solids):
        rays, reach, which = _hit_solid(solid, origin, direction)
        closer = reach < t[rays]
        hit = rays[closer]
        t[hit], part[hit], surface[hit] = reach[closer], which[closer], first_solid + number

    classes = np.array([0, 1, *[0] * len(scene.walls), *[FIRST_KIND + solid.kind for solid in scene.solids]], np.uint8)
    depth = np.where(np.isfinite(t[drawn:]), t[drawn:], np.nan).astype(F32).reshape(size)
    semseg = classes[surface[drawn:]].reshape(size)

    t, surface, part, direction = t[:drawn], surface[:drawn], part[:drawn], direction[:, :drawn]
    points = origin + np.where(np.isfinite(t), t, 0) * direction
    normals, colours = np.zeros((3, drawn), F32), np.empty((3, drawn), F32)
    seen = {number: np.nonzero(surface == number)[0] for number in range(first_solid + len(scene.solids))}
    for number, rays in seen.items():
        if not rays.size:
            continue
        if number == 0:
            up = np.clip(direction[2, rays] * 2, 0, 1)
            colours[:, rays] = scene.sky[0][:, None] * (1 - up) + scene.sky[1][:, None] * up
        elif number == 1:
            normals[:, rays] = np.array([[0], [0], [1]], F32)
            colours[:, rays] = _paint(scene.ground, points[:, rays])
        elif number < first_solid:
            wall = scene.walls[number - 2]
            normals[:, rays] = wall.normal[:, None]
            colours[:, rays] = _paint(wall.texture, points[:, rays])
        else:
            solid = scene.solids[number - first_solid]
            local = (solid.rotation / solid.scale).T @ (points[:, rays] - solid.centre[:, None])
            normals[:, rays] = _solid_normal(solid, local, part[rays])
            colours[:, rays] = _paint(solid.texture, local)

    # The sky shines by itself and is never shaded.
    bodies = np.nonzero(surface != 0)[0]
    at, facing = points[:, bodies], normals[:, bodies]
    sunlit = np.maximum(scene.sun @ facing, 0) * ~_shadow(scene, at, facing)
    light = scene.ambient[:, None] * (F32(0.75) + F32(0.25) * facing[2])
    light = light + scene.sun_colour[:, None] * sunlit + scene.fill_colour[:, None] * np.maximum(scene.fill @ facing, 0)
    colours[:, bodies] *= light
    # 2 x 2 rays per pixel are averaged as light, then coded with the usual gamma.
    linear = np.clip(colours, 0, 1).reshape(3, size[0], 2, size[1], 2).mean((2, 4))
    rgb = np.clip(255 * np.sqrt(linear) + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return {"rgb": np.ascontiguousarray(rgb), "depth": depth, "semseg": semseg, "label": scene.solids[0].kind}


def render(seed: int, index: int, size: tuple[int, int] = (64, 64)) -> Sample:
    """Draw sample `index` of `seed`: `render_scene(sample_scene(seed, index), size)`."""
    return render_scene(sample_scene(seed, index), size)


def images(seed: int, indices: range, size: tuple[int, int] = (64, 64)) -> tuple[UInt8[np.ndarray, "b h w 3"], np.ndarray]:
    """The pictures and labels alone of many samples, stacked."""
    samples = [render(seed, index, size) for index in indices]
    return np.stack([sample["rgb"] for sample in samples]), np.array([sample["label"] for sample in samples], np.int32)
