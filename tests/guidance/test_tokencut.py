"""TokenCut and attention maps: recorded results of the reference, host and device against each other, and the trap of the key bias."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskvit.guidance.discovery import attention_map, heaviest
from maskvit.guidance.tokencut import Cut, as_guidance, cut, exact_cut, patch_features, second_eigenvector, tokencut_map
from tests.tiny import on_device, tiny_batch, tiny_objective


def bounding_box(mask: np.ndarray, patch: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) in pixels around a mask of patches, right and bottom exclusive and inside (height, width)."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise ValueError("an empty mask has no bounding box")
    right, bottom = (int(columns.max()) + 1) * patch, (int(rows.max()) + 1) * patch
    return int(columns.min()) * patch, int(rows.min()) * patch, min(right, image_size[1]), min(bottom, image_size[0])


@pytest.fixture(scope="module")
def golden(request):
    return np.load(request.config.rootpath / "tests" / "fixtures" / "tokencut.npz")


def test_masks_boxes_and_eigenvectors_of_the_reference(golden):
    columns = (golden[name] for name in ("key_features", "component_mask", "eigenvector", "box"))
    for features, mask, eigenvector, box in zip(*columns, strict=True):
        found = exact_cut(features[1:], (14, 14))
        np.testing.assert_array_equal(found.mask, mask > 0)
        np.testing.assert_allclose(found.eigenvector, eigenvector, atol=1e-6)
        assert bounding_box(found.mask, 16, (224, 224)) == tuple(box)


def test_the_batched_cut_agrees_with_the_exact_one(golden):
    features = golden["key_features"][:, 1:]
    for arguments in (dict(), dict(graph="cosine"), dict(tau=0.05)):
        found = jax.jit(lambda f, a=arguments: cut(f, (14, 14), **a))(features)
        assert found.mask.shape == found.eigenvector.shape == (12, 14, 14)
        for i, one in enumerate(features):
            exact = exact_cut(one, (14, 14), **arguments)
            np.testing.assert_array_equal(found.mask[i], exact.mask)
            np.testing.assert_allclose(found.eigenvector[i], exact.eigenvector, atol=1e-4 * np.abs(exact.eigenvector).max())


def test_the_eigenvector_where_the_graph_almost_falls_apart():
    """Two groups joined by next to nothing, and a long chain whose eigenvalues lie close together, against LAPACK in float64."""
    chain = np.eye(60, k=1) + np.eye(60, k=-1) + np.eye(60)
    groups = np.where(np.arange(60)[:, None] // 35 == np.arange(60) // 35, 1.0, 1e-5)
    for w in (chain, groups):
        root = np.sqrt(w.sum(axis=1))
        expected = np.linalg.eigh(np.eye(60) - w / np.outer(root, root))[1][:, 1] / root
        found = np.asarray(second_eigenvector(jnp.asarray(w[None], jnp.float32)))[0]
        np.testing.assert_allclose(found * np.sign(found @ expected), expected, atol=2e-3 * np.abs(expected).max())


def grouped(seed: int = 0, width: int = 24, grid=(10, 12)) -> tuple[np.ndarray, np.ndarray]:
    """Features of a picture with one object, and its mask: two directions plus noise."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(grid, bool)
    mask[3:7, 4:9] = True
    direction, ground = np.linalg.qr(rng.standard_normal((width, 2)))[0].T
    features = np.where(mask.reshape(-1, 1), direction, ground) + 0.05 * rng.standard_normal((mask.size, width))
    return features.astype(np.float32), mask


@pytest.mark.parametrize("graph", ["binary", "cosine"])
def test_an_object_is_found(graph):
    features, mask = grouped()
    found = exact_cut(features, mask.shape, graph=graph)
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_array_equal(cut(jnp.asarray(features[None]), mask.shape, graph=graph).mask[0], mask)
    assert found.eigenvector[mask].min() > found.eigenvector[~mask].max()
    assert bounding_box(found.mask, 14, (140, 160)) == (56, 42, 126, 98)
    assert bounding_box(found.mask, 14, (90, 120)) == (56, 42, 120, 90)  # the last patches reach over the picture


def test_a_bias_that_all_keys_share_hides_the_object():
    """Raw keys with a huge bias: every cosine is near 1, the graph one clique, and the cut arbitrary. Without it, all is well."""
    overlaps = []
    for seed in range(6):
        features, mask = grouped(seed)
        bias = 5 * np.random.default_rng(100 + seed).standard_normal(features.shape[1]).astype(np.float32)
        raw = exact_cut(features + bias, mask.shape).mask
        overlaps.append((raw & mask).sum() / (raw | mask).sum())
        np.testing.assert_array_equal(exact_cut((features + bias) - bias, mask.shape).mask, mask)
    assert np.mean(overlaps) < 0.5


def test_only_the_connected_part_with_the_seed():
    """Two objects alike in features: the one that does not hold the seed is left out, and corners do not touch."""
    features, mask = grouped()
    two = mask.copy()
    two[7:9, 9:11] = True  # touches the first at a corner
    direction, ground = features[mask.ravel()].mean(0), features[~mask.ravel()].mean(0)
    features = np.where(two.reshape(-1, 1), direction, ground) + 0.01 * np.random.default_rng(1).standard_normal(features.shape)
    for found in (exact_cut(features.astype(np.float32), mask.shape), cut(jnp.asarray(features[None], jnp.float32), mask.shape)):
        found = np.asarray(found.mask).reshape(mask.shape)  # patches of both are alike, so either may hold the seed
        assert (found == mask).all() or (found == (two & ~mask)).all()


def test_a_winding_part_is_followed_to_its_end():
    snake = np.zeros((9, 9), bool)
    snake[::2] = True
    snake[1::4, -1] = snake[3::4, 0] = True
    features = np.where(snake.reshape(-1, 1), [1.0, 0.0], [0.0, 1.0]) + 0.001 * np.random.default_rng(0).standard_normal((81, 2))
    found = exact_cut(features.astype(np.float32), (9, 9)).mask
    batched = cut(jnp.asarray(features[None], jnp.float32), (9, 9)).mask[0]
    np.testing.assert_array_equal(found, batched)
    assert (found == snake).all() or (found & snake).sum() == 0


def test_values_of_guidance():
    features, mask = grouped()
    exact, batched = exact_cut(features, mask.shape), cut(jnp.asarray(features[None]), mask.shape)
    for found in (exact, batched):
        values = np.asarray(as_guidance(found)).reshape(mask.shape)
        assert values.max() == 1.0 and (values[~mask] == 0).all() and values[mask].min() > 0.5
        np.testing.assert_array_equal(np.asarray(as_guidance(found, "mask")).reshape(mask.shape), mask)
    with pytest.raises(ValueError, match="value is 'sign'; known: mask, eigenvector"):
        as_guidance(exact, "sign")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(graph="full"), "graph is 'full'; known: binary, cosine"),
        (dict(tau=1.0), "tau is 1.0"),
        (dict(tau=-0.1, graph="cosine"), "at least 0"),
        (dict(eps=0.0), "eps is 0.0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    features, mask = grouped()
    with pytest.raises(ValueError, match=message):
        exact_cut(features, mask.shape, **arguments)
    with pytest.raises(ValueError, match=message):
        cut(jnp.asarray(features[None]), mask.shape, **arguments)
    with pytest.raises(ValueError, match="no bounding box"):
        bounding_box(np.zeros((3, 3), bool), 16, (48, 48))


# ------------------------------------------------------------------------------------------ of a model


@pytest.fixture(scope="module")
def tiny():
    objective = tiny_objective()
    params, _ = objective.init(jax.random.key(0))
    prepared = objective.prepare(on_device(tiny_batch(4)))
    return objective.model, params, objective.model.embed(params, prepared.values)


def with_key_bias(params, bias):
    """The parameters with that bias on every key of the last block; it changes nothing but the keys."""
    qkv = params["encoder"]["block_01"]["attn"]["qkv"]
    blocks = {**params["encoder"], "block_01": {**params["encoder"]["block_01"]}}
    attn = blocks["block_01"]["attn"]
    blocks["block_01"]["attn"] = {**attn, "qkv": {**qkv, "bias": qkv["bias"].at[48:96].set(bias)}}
    return {**params, "encoder": blocks}


def test_the_key_bias_of_a_model(tiny):
    """A huge bias on the keys leaves the model as it is, spoils the cut of raw keys, and is no matter once it is left out."""
    model, params, batch = tiny
    biased = with_key_bias(params, 30.0 * np.random.default_rng(0).standard_normal(48))
    encoded = [model.encode(p, batch.tokens) for p in (params, biased)]
    np.testing.assert_allclose(encoded[0], encoded[1], atol=2e-4)
    raw, _ = patch_features(model, biased, batch, "keys")
    unit = raw / jnp.linalg.norm(raw, axis=2, keepdims=True)
    assert float(jnp.einsum("bnd,bmd->bnm", unit, unit).min()) > 0.9
    same = [tokencut_map(model, p, batch, "keys_without_bias") for p in (params, biased)]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(tokencut_map(model, params, batch, "keys"), same[0])  # a fresh model has no bias yet
    assert (np.asarray(tokencut_map(model, biased, batch, "keys")) != np.asarray(same[0])).any()


def test_features_and_modalities(tiny):
    model, params, batch = tiny
    found, grid = patch_features(model, params, batch, "tokens", modality="depth")
    encoded = model.encode(params, batch.tokens)
    np.testing.assert_allclose(found, encoded[:, 16:32], atol=1e-5)
    assert grid == (4, 4) and tokencut_map(model, params, batch, value="mask", modality="depth").shape == (4, 4, 4)
    early, _ = patch_features(model, params, batch, "tokens", block=0)
    assert not np.allclose(early, encoded[:, :16])
    for arguments, message in (
        (dict(features="queries"), "known: keys, keys_without_bias, tokens"),
        (dict(modality="normals"), "none of the inputs"),
        (dict(block=2), "blocks 0 ... 1"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_features(model, params, batch, **arguments)


def test_attention_maps(tiny):
    model, params, batch = tiny
    rows = model.attentions(params, batch)[-1][:, :, -1, 16:32]
    mean = attention_map(model, params, batch, modality="depth")
    expected = rows.mean(axis=1) - rows.mean(axis=1).min(axis=1, keepdims=True)
    np.testing.assert_allclose(mean.reshape(4, 16), expected / expected.max(axis=1, keepdims=True), atol=1e-5)
    assert mean.min() == 0 and mean.max() == 1
    one = attention_map(model, params, batch, head=2, mass=0.6, modality="depth").reshape(4, 16)
    for row, values in zip(np.asarray(rows[:, 2]), np.asarray(one), strict=True):
        kept, ordered = np.count_nonzero(values), np.sort(row)[::-1] / row.sum()
        assert ordered[:kept].sum() >= 0.6 - 1e-6 > ordered[: kept - 1].sum() - 2e-6
        np.testing.assert_allclose(values[values > 0], row[values > 0] / row.max(), rtol=1e-5)
    for arguments, message in (
        (dict(head=3), "heads 0 ... 2"),
        (dict(mass=0), "mass is 0"),
        (dict(mass=1.5), "mass is 1.5"),
        (dict(block=-3), "blocks 0 ... 1"),
        (dict(modality="normals"), "none of the inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_map(model, params, batch, **arguments)
    with pytest.raises(ValueError, match="the model has none"):
        attention_map(tiny_objective(num_global_tokens=0).model, params, batch)


def test_the_heaviest_tokens():
    weights = jnp.array([[0.1, 0.5, 0.15, 0.25]])
    np.testing.assert_allclose(heaviest(weights, 0.6), [[0.0, 0.5, 0.0, 0.25]])
    np.testing.assert_allclose(heaviest(weights, 0.5), [[0.0, 0.5, 0.0, 0.0]])
    np.testing.assert_allclose(heaviest(weights, 1.0), weights)
    np.testing.assert_allclose(heaviest(jnp.zeros((1, 3)), 0.5), jnp.zeros((1, 3)))


def test_a_cut_is_plain_data(golden):
    found = exact_cut(golden["key_features"][0, 1:], (14, 14))
    assert isinstance(found, Cut) and found.mask.dtype == bool and found.eigenvector.dtype == np.float64
