"""What comes out of converted files, opened as a user does, against numbers recorded from the PyTorch references."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maskvit
from maskvit import convert
from maskvit.core.types import MaskPlan

TOLERANCE = dict(rtol=1e-4, atol=1e-5)


def opened(fixtures, folder, file, **options):
    convert.convert(fixtures / f"{file}.pth", folder / "ours", num_heads=3, **options)
    return maskvit.load(folder / "ours")


@pytest.mark.parametrize(("file", "recorded"), [("mae_tiny_full", "mae_tiny"), ("crossmae_tiny", "crossmae_tiny")])
def test_masked_autoencoders(file, recorded, fixtures, tmp_path):
    loaded = opened(fixtures, tmp_path, file, decoder_num_heads=4, target="normalized")
    with np.load(fixtures / f"{recorded}.npz") as golden:
        image, noise, expected = golden["image"], golden["noise"], golden["pred" if "pred" in golden else "pred_full"]
    order = np.argsort(noise, axis=1)
    visible, hidden = np.sort(order[:, :4], axis=1), np.sort(order[:, 4:], axis=1)
    masked = np.ones(noise.shape, bool)
    np.put_along_axis(masked, visible, False, axis=1)
    plan = jax.tree.map(jnp.asarray, MaskPlan(visible, visible >= 0, hidden, hidden >= 0, masked))
    tokens = loaded.model.embed(loaded.params, {"rgb": jnp.asarray(image.transpose(0, 2, 3, 1))})
    predicted = np.asarray(loaded.objective.reconstruct(loaded.params, tokens, plan)["norm_rgb"]).reshape(4, 16, -1)
    if expected.shape[1] == 12:  # CrossMAE's numbers are those of the hidden tokens
        predicted = np.take_along_axis(predicted, hidden[:, :, None], axis=1)
    np.testing.assert_allclose(predicted, expected, **TOLERANCE)


def test_teacher_of_ibot(fixtures, tmp_path):
    loaded = opened(fixtures, tmp_path, "ibot_tiny", model="both")
    with np.load(fixtures / "ibot_tiny.npz") as golden:
        views = np.concatenate([golden["global_0"], golden["global_1"]]).transpose(0, 2, 3, 1)
        tokens = loaded.model.embed(loaded.params, {"rgb": jnp.asarray(views)})
        encoded = loaded.model.encode(loaded.params, tokens.tokens)
        np.testing.assert_allclose(loaded.model.project(loaded.params, encoded[:, -1]), golden["teacher_cls"], **TOLERANCE)
        patches = loaded.model.project(loaded.params, encoded[:, :-1], patches=True)
        np.testing.assert_allclose(patches, golden["teacher_patch"], **TOLERANCE)
