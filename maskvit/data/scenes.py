"""`scenes`, the embedded data: ray-cast textured solids on textured ground, with exact depth, classes and label.

Sample i of a seed is a pure function of (seed, i). Colors and textures are drawn independently of the kinds of the
objects, so a mean color tells nothing of the label: it takes shape.

World frame: x right, y forward, z up, meters, ground at z = 0. Camera rays are scaled to a forward component of 1, so
the ray parameter *is* the depth along the optical axis. Solids are unions of canonical ones (unit ball, cube, cylinder,
cone, pyramid, torus) under affine maps, which leave the ray parameter as it is.
"""

from __future__ import annotations

import dataclasses
from typing import TypedDict

import numpy as np
from jaxtyping import Float32, UInt8

from maskvit.data.solids import F32, KINDS, SHAPES, Part, Vectors, axes_of, into_part, inverse, part_extent

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
PATTERNS = ("plain", "checks", "stripes", "dots", "clouds", "waves")


@dataclasses.dataclass(frozen=True)
class Texture:
    """Two colors mixed by a pattern; `direction` orients stripes and waves, `frequency` is in cycles per unit."""

    pattern: str
    colors: Float32[np.ndarray, "2 3"]
    frequency: float
    direction: Float32[np.ndarray, " xyz"]
    phase: float


@dataclasses.dataclass(frozen=True)
class Solid:
    """An object: world point = rotation @ (scale * local point) + center."""

    kind: int
    center: Float32[np.ndarray, " xyz"]
    rotation: Float32[np.ndarray, "xyz uvw"]
    scale: Float32[np.ndarray, " xyz"]
    texture: Texture

    @property
    def parts(self) -> tuple[Part, ...]:
        """The canonical solids it is the union of."""
        return KINDS[KIND_NAMES[self.kind]]

    @property
    def radius(self) -> float:
        """Radius of a ball about `center` that holds it."""
        return max(float(np.linalg.norm(self.scale * (np.abs(part.center) + part_extent(part)))) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Wall:
    """A vertical wall: points with normal . point = offset, up to `height` meters."""

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
    sun_color: Float32[np.ndarray, " xyz"]
    fill: Float32[np.ndarray, " xyz"]  # direction of a second light without shadow
    fill_color: Float32[np.ndarray, " xyz"]
    ambient: Float32[np.ndarray, " xyz"]
    sky: Float32[np.ndarray, "2 3"]


class Sample(TypedDict):
    """A picture with what is known of it; see `render_scene`."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float32[np.ndarray, "h w"]
    semseg: UInt8[np.ndarray, "h w"]
    label: int


# --- drawing a scene ------------------------------------------------------------------------------------------------


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / np.linalg.norm(vector)).astype(F32)


def _color(rng: np.random.Generator) -> np.ndarray:
    hue, saturation, value = rng.random() * 6, rng.uniform(0.1, 0.9), rng.uniform(0.3, 1.0)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * ramp)).astype(F32)


def _texture(rng: np.random.Generator, frequency: tuple[float, float], strength: tuple[float, float]) -> Texture:
    first, second = _color(rng), _color(rng)
    share = rng.uniform(*strength)
    colors = np.stack([first, first + share * (second - first)]).astype(F32)
    pattern = PATTERNS[rng.integers(len(PATTERNS))]
    return Texture(pattern, colors, float(rng.uniform(*frequency)), _unit(rng.normal(size=3)), float(rng.random()))


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
    bottom = min(part.center[2] - part_extent(part)[2] for part in KINDS[name])
    center = np.array([place[0], place[1], -bottom * scale[2]])
    return Solid(kind, center.astype(F32), _turn(yaw), scale.astype(F32), _texture(rng, (0.8, 2.2), (0.3, 1.0)))


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
        sun_color=rng.uniform(0.65, 0.85) * rng.uniform(0.85, 1.0, 3).astype(F32),
        fill=direction(0.2, 1.2),
        fill_color=(0.3 if two else 0.0) * rng.uniform(0.7, 1.0, 3).astype(F32),
        ambient=rng.uniform(0.2, 0.34) * rng.uniform(0.85, 1.0, 3).astype(F32),
        sky=np.stack([_color(rng), _color(rng)]),
    )


# --- objects ----------------------------------------------------------------------------------------------------------


def _hit_solid(solid: Solid, origin: Vectors, direction: Vectors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indices of the rays that meet the ball about the solid, their nearest t, the part that was hit)."""
    center = solid.center[:, None] - origin
    along = (center * direction).sum(0)
    squared = (direction * direction).sum(0)
    near = ((center * center).sum(0) - along**2 / squared < solid.radius**2) & (along > 0)
    rays = np.nonzero(near)[0]
    frame = (solid.rotation / solid.scale).T
    o = frame @ ((origin[:, rays] if origin.shape[1] > 1 else origin) - solid.center[:, None])
    d = frame @ direction[:, rays]
    best, which = np.full(rays.size, np.inf, F32), np.zeros(rays.size, np.int8)
    for number, part in enumerate(solid.parts):
        t = SHAPES[part.shape][0](into_part(part, o, False), into_part(part, d, True))
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
        axes = axes_of(part)
        own = SHAPES[part.shape][1](into_part(part, local[:, chosen], False))
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
    """Colors of surface points `p`, given in the texture's own units."""
    p = p * F32(texture.frequency) + F32(texture.phase)
    if texture.pattern == "plain":
        return np.repeat(texture.colors[0][:, None], p.shape[1], axis=1)
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
    first, second = texture.colors[:, :, None]
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
      depth: Float32 "h w", meters along the optical axis through the middle of the pixel; NaN in the sky.
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
        reach = (F32(wall.offset) - wall.normal @ origin) * inverse(approach)
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
    normals, colors = np.zeros((3, drawn), F32), np.empty((3, drawn), F32)
    seen = {number: np.nonzero(surface == number)[0] for number in range(first_solid + len(scene.solids))}
    for number, rays in seen.items():
        if not rays.size:
            continue
        if number == 0:
            up = np.clip(direction[2, rays] * 2, 0, 1)
            colors[:, rays] = scene.sky[0][:, None] * (1 - up) + scene.sky[1][:, None] * up
        elif number == 1:
            normals[:, rays] = np.array([[0], [0], [1]], F32)
            colors[:, rays] = _paint(scene.ground, points[:, rays])
        elif number < first_solid:
            wall = scene.walls[number - 2]
            normals[:, rays] = wall.normal[:, None]
            colors[:, rays] = _paint(wall.texture, points[:, rays])
        else:
            solid = scene.solids[number - first_solid]
            local = (solid.rotation / solid.scale).T @ (points[:, rays] - solid.center[:, None])
            normals[:, rays] = _solid_normal(solid, local, part[rays])
            colors[:, rays] = _paint(solid.texture, local)

    # The sky shines by itself and is never shaded.
    bodies = np.nonzero(surface != 0)[0]
    at, facing = points[:, bodies], normals[:, bodies]
    sunlit = np.maximum(scene.sun @ facing, 0) * ~_shadow(scene, at, facing)
    light = scene.ambient[:, None] * (F32(0.75) + F32(0.25) * facing[2])
    light = light + scene.sun_color[:, None] * sunlit + scene.fill_color[:, None] * np.maximum(scene.fill @ facing, 0)
    colors[:, bodies] *= light
    # 2 x 2 rays per pixel are averaged as light, then coded with the usual gamma.
    linear = np.clip(colors, 0, 1).reshape(3, size[0], 2, size[1], 2).mean((2, 4))
    rgb = np.clip(255 * np.sqrt(linear) + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return {"rgb": np.ascontiguousarray(rgb), "depth": depth, "semseg": semseg, "label": scene.solids[0].kind}


def render(seed: int, index: int, size: tuple[int, int] = (64, 64)) -> Sample:
    """Draw sample `index` of `seed`: `render_scene(sample_scene(seed, index), size)`."""
    return render_scene(sample_scene(seed, index), size)


def images(seed: int, indices: range, size: tuple[int, int] = (64, 64)) -> tuple[UInt8[np.ndarray, "b h w 3"], np.ndarray]:
    """The pictures and labels alone of many samples, stacked."""
    samples = [render(seed, index, size) for index in indices]
    return np.stack([sample["rgb"] for sample in samples]), np.array([sample["label"] for sample in samples], np.int32)
