"""`scenes`: seeded, exact depth and classes, a label that the colors do not give away."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from maskvit.data import scenes
from maskvit.data.solids import TUBE


@pytest.fixture(scope="module")
def drawn():
    """A hundred samples with their scenes."""
    return [(scenes.sample_scene(3, i), scenes.render(3, i, (48, 48))) for i in range(100)]


def only(scene: scenes.Scene, kind: str, at=(0.0, 5.0), size: float = 1.0) -> scenes.Scene:
    """The scene with one untilted object of a kind and nothing else on the ground, seen level from 1.5 m."""
    bottom = min(part.center[2] - scenes.part_extent(part)[2] for part in scenes.KINDS[kind])
    solid = dataclasses.replace(
        scene.solids[0],
        kind=scenes.KIND_NAMES.index(kind),
        center=np.array([*at, -bottom * size], np.float32),
        rotation=np.eye(3, dtype=np.float32),
        scale=np.full(3, size, np.float32),
    )
    level = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)  # columns: right, down, forward
    return dataclasses.replace(scene, solids=(solid,), position=np.array([0, 0, 1.5], np.float32), camera=level, walls=())


def test_pure_function_of_seed_and_index(drawn):
    for index in (0, 7, 99):
        again = scenes.render(3, index, (48, 48))
        for key in ("rgb", "depth", "semseg"):
            np.testing.assert_array_equal(again[key], drawn[index][1][key])
        assert again["label"] == drawn[index][1]["label"]
    other = scenes.render(4, 0, (48, 48))
    assert (other["rgb"] != drawn[0][1]["rgb"]).mean() > 0.5


def test_shapes_types_and_ranges(drawn):
    wide = scenes.render(3, 0, (32, 56))
    assert wide["rgb"].shape == (32, 56, 3) and wide["depth"].shape == wide["semseg"].shape == (32, 56)
    for _, sample in drawn:
        assert (sample["rgb"].dtype, sample["depth"].dtype, sample["semseg"].dtype) == (np.uint8, np.float32, np.uint8)
        finite = np.isfinite(sample["depth"])
        assert finite.mean() > 0.5
        assert not (sample["semseg"][~finite]).any()  # depth is missing in the sky only, which is background
        assert sample["depth"][finite].min() > 0.5 and sample["depth"][finite].max() < 65535 * scenes.METRES_PER_COUNT
        assert sample["semseg"].max() < len(scenes.CLASS_NAMES)
    assert len(scenes.KIND_NAMES) >= 10


def test_label_is_the_nearest_object_and_it_is_well_visible(drawn):
    for scene, sample in drawn:
        mask = sample["semseg"] == scenes.FIRST_KIND + sample["label"]
        assert mask.mean() > 0.02
        others = (sample["semseg"] >= scenes.FIRST_KIND) & ~mask
        if others.any():
            assert sample["depth"][mask].min() < sample["depth"][others].min()
        kinds = [solid.kind for solid in scene.solids]
        assert len(set(kinds)) == len(kinds)
    assert np.mean([(sample["semseg"] >= scenes.FIRST_KIND).mean() for _, sample in drawn]) > 0.1


def test_ground_depth_is_that_of_the_plane(drawn):
    for scene, sample in drawn[:20]:
        height, width = sample["depth"].shape
        for row, column in np.argwhere(sample["semseg"] == 1)[::97]:
            down = ((row + 0.5) / height * 2 - 1) * scene.tangent
            right = ((column + 0.5) / width * 2 - 1) * scene.tangent * width / height
            ray = scene.camera.astype(np.float64) @ [right, down, 1.0]
            np.testing.assert_allclose(sample["depth"][row, column], -scene.position[2] / ray[2], rtol=1e-4)


def test_depth_of_a_ball_is_analytic():
    scene = only(scenes.sample_scene(0, 0), "ball")
    sample = scenes.render_scene(scene, (65, 65))
    center, radius = scene.solids[0].center.astype(np.float64), 0.95
    checked = 0
    for row, column in np.argwhere(sample["semseg"] == scenes.FIRST_KIND)[::7]:
        ray = np.array([((column + 0.5) / 65 * 2 - 1) * scene.tangent, 1.0, -((row + 0.5) / 65 * 2 - 1) * scene.tangent])
        offset = np.array([0, 0, 1.5]) - center
        a, b, c = ray @ ray, ray @ offset, offset @ offset - radius**2
        np.testing.assert_allclose(sample["depth"][row, column], (-b - np.sqrt(b * b - a * c)) / a, rtol=1e-4)
        checked += 1
    assert checked > 20


def distance_from(part: scenes.Part, local: np.ndarray) -> np.ndarray:
    """An implicit function of a part at points of the object's frame: 0 on its surface, negative inside."""
    axes = [(part.axis + 1) % 3, (part.axis + 2) % 3, part.axis]
    x, y, z = ((local - np.array(part.center)[:, None]) / np.array(part.half)[:, None])[axes]
    radial = np.hypot(x, y)
    if part.shape == "ball":
        return np.hypot(radial, z) - 1
    if part.shape == "cube":
        return np.maximum.reduce([abs(x), abs(y), abs(z)]) - 1
    if part.shape == "cylinder":
        return np.maximum(radial, abs(z)) - 1
    if part.shape == "cone":
        return np.maximum(radial - (1 - z) / 2, -1 - z)
    if part.shape == "pyramid":
        return np.maximum.reduce([abs(x) - (1 - z) / 2, abs(y) - (1 - z) / 2, -1 - z])
    assert part.shape == "torus"
    return np.hypot(radial - 1, z) - TUBE


@pytest.mark.parametrize("kind", scenes.KIND_NAMES)
def test_every_visible_point_lies_on_its_solid(kind):
    """The surface between just outside and just inside: each part's implicit function is about zero at the hit points."""
    scene = only(scenes.sample_scene(0, 1), kind, size=1.1)
    sample = scenes.render_scene(scene, (64, 64))
    rows, columns = np.nonzero(sample["semseg"] >= scenes.FIRST_KIND)
    assert rows.size > 60
    ray = np.stack([((columns + 0.5) / 32 - 1) * scene.tangent, np.ones(rows.size), -((rows + 0.5) / 32 - 1) * scene.tangent])
    local = (np.array([[0], [0], [1.5]]) + sample["depth"][rows, columns] * ray - scene.solids[0].center[:, None]) / 1.1
    gaps = [distance_from(part, local) for part in scenes.KINDS[kind]]
    assert abs(np.min(gaps, axis=0)).max() < 3e-3


def test_objects_cast_shadows():
    scene = only(scenes.sample_scene(0, 2), "cube")
    sun = np.array([0.7, -0.3, 0.65], np.float32)
    plain = dataclasses.replace(scene.ground, pattern="plain", colors=np.full((2, 3), 0.5, np.float32))
    scene = dataclasses.replace(scene, sun=sun / np.linalg.norm(sun), ground=plain, fill_color=np.zeros(3, np.float32))
    sample = scenes.render_scene(scene, (64, 64))
    ground = sample["rgb"][sample["semseg"] == 1].mean(-1)
    assert np.ptp(ground) > 40 and 0.02 < (ground < ground.max() - 40).mean() < 0.6  # lit and shaded ground of one color


def test_labels_are_balanced_and_mean_colour_is_no_cue():
    train, labels = scenes.images(0, range(1000), (24, 24))
    test, truth = scenes.images(9, range(400), (24, 24))
    chance = 1 / len(scenes.KIND_NAMES)
    counts = np.bincount(labels, minlength=len(scenes.KIND_NAMES)) / len(labels)
    assert counts.min() > 0.7 * chance and counts.max() < 1.3 * chance

    def accuracy(features, queries, k):
        features, queries = features.reshape(len(features), -1).astype(np.float64), queries.reshape(len(queries), -1).astype(np.float64)
        distance = (features**2).sum(1) - 2 * queries @ features.T
        near = np.argpartition(distance, k, axis=1)[:, :k]
        votes = np.stack([np.bincount(labels[row], minlength=len(scenes.KIND_NAMES)) for row in near])
        return float((votes.argmax(1) == truth).mean())

    mean = {k: accuracy(train.mean((1, 2)), test.mean((1, 2)), k) for k in (1, 5, 20)}
    pixels = accuracy(train, test, 20)
    listed = ", ".join(f"k={k}: {value:.1%}" for k, value in mean.items())
    print(f"\nk-NN on mean color {listed}; raw pixels {pixels:.1%}; chance {chance:.1%}")
    assert max(mean.values()) <= chance + 0.05
