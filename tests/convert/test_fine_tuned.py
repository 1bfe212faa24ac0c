"""Fine-tuned MultiMAE files: every key once or named, and answers out of the recorded tokens of the reference."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import maskvit
from maskvit import convert
from maskvit.checkpoints import load_params
from maskvit.convert.reader import ConversionError, read_checkpoint
from maskvit.convert.rules import to_torch
from maskvit.convert.source import Hints, Source
from maskvit.convert.task_heads import task_head, task_head_params
from maskvit.core.modalities import RGB
from maskvit.core.types import tree_paths
from maskvit.heads import HEADS
from maskvit.nn.layers import apply

RNG = np.random.default_rng(0)
CLASSIFIER = {
    "norm.weight": RNG.uniform(0.5, 1.5, 48),
    "norm.bias": RNG.normal(size=48),
    "head.weight": RNG.normal(size=(5, 48)),
    "head.bias": RNG.normal(size=5),
}


@pytest.fixture(scope="module")
def tensors(fixtures):
    """(encoder and inputs of the recorded model, {task: the recorded head's tensors, or a classifier})."""
    encoder = read_checkpoint(fixtures / "multimae_tiny_public.pth")["model"]
    encoder = {key: value for key, value in encoder.items() if not key.startswith("output_adapters.")}
    heads = read_checkpoint(fixtures / "heads_tiny.pth")["model"]
    found = {task: {key: x for key, x in heads.items() if key.startswith(f"output_adapters.{task}.")} for task in ("semseg", "depth")}
    found["cls"] = {f"output_adapters.cls.{key}": value.astype(np.float32) for key, value in CLASSIFIER.items()}
    return encoder, found


def of_inputs(encoder, *names):
    return {key: value for key, value in encoder.items() if not key.startswith("input_adapters.") or key.split(".")[1] in names}


def written(path, *parts):
    """A file of all these tensors."""
    state = {key: np.ascontiguousarray(value) for part in parts for key, value in part.items()}
    save_file(state, path)
    return state


def converted(folder, state, **options):
    """The checkpoint of a file; its rules give back every tensor but those that are named as left out."""
    folder.mkdir(exist_ok=True)
    path = folder / "x.safetensors"
    written(path, state)
    convert.convert(path, folder / "ours", num_heads=3, **options)
    plan = convert.understand(convert.open_checkpoint(path), num_heads=3, **options)
    back = to_torch(plan.rules, load_params(folder / "ours")[0], "back")
    assert back.keys() | plan.left_out.keys() == state.keys() and not back.keys() & plan.left_out.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)
    return maskvit.load(folder / "ours"), plan


@pytest.fixture(scope="module")
def golden(fixtures):
    """(inputs in stored units, the reference's tokens of all of them, the global one last)."""
    recorded = np.load(fixtures / "multimae_tiny.npz")
    rgb = (recorded["rgb"].transpose(0, 2, 3, 1) * np.array(RGB["std"]) + np.array(RGB["mean"])) * 255
    inputs = {
        "rgb": rgb.astype(np.float32),
        "depth": 65536 * recorded["depth_raw"].transpose(0, 2, 3, 1),
        "semseg": recorded["semseg"].astype(np.int32),
    }
    return inputs, recorded["encoder_tokens_unmasked"].astype(np.float64)


def test_classes_of_pictures(tensors, golden, tmp_path):
    """The mean of all tokens, a norm and a linear layer: of the tokens that the reference recorded."""
    encoder, heads = tensors
    loaded, plan = converted(tmp_path, encoder | heads["cls"])
    objective = loaded.config["objective"]
    assert (plan.family, objective["name"], objective["pool"]) == ("fine-tuned MultiMAE", "supervised", "all")
    assert objective["task"] == dict(name="classification", num_classes=5) and objective["inputs"] == ["rgb", "depth", "semseg"]
    inputs, tokens = golden
    mean = tokens.mean(axis=1)
    normed = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    scores = np.exp((normed * CLASSIFIER["norm.weight"] + CLASSIFIER["norm.bias"]) @ CLASSIFIER["head.weight"].T + CLASSIFIER["head.bias"])
    found = loaded.predict(inputs)
    assert found["classes"] == tuple("01234")
    np.testing.assert_allclose(found["probabilities"], scores / scores.sum(-1, keepdims=True), rtol=1e-3, atol=1e-5)


def test_classes_of_pixels(tensors, golden, tmp_path):
    """The ConvNeXt head on the tokens of rgb, which the other inputs share in."""
    encoder, heads = tensors
    loaded, plan = converted(tmp_path, encoder | heads["semseg"])
    objective = loaded.config["objective"]
    assert objective["task"] == dict(name="segmentation", target="semseg_target") and objective["read_from"] == ["rgb"]
    assert objective["head"] == dict(name="convnext", width=96, preds_per_patch=16, depth=2)
    said = convert.inspect(tmp_path / "x.safetensors", 3)
    assert "task        {'name': 'segmentation', 'target': 'semseg_target'}, by the head {'name': 'convnext'," in said
    assert "modality    semseg_target: {'kind': 'categorical', 'num_classes': 5," in said
    assert "'semseg' is also an input: what the model answers is called 'semseg_target'" in plan.said
    inputs, tokens = golden
    source = Source("x", heads["semseg"], {key: key for key in heads["semseg"]}, {})
    head = task_head(source, "semseg", Hints())
    params = jax.tree.map(jnp.asarray, task_head_params(source, "semseg", head)["convnext"])
    maps = jnp.asarray(tokens[:, :16].reshape(4, 4, 4, 48), jnp.float32)
    logits = np.asarray(apply(HEADS["convnext"].module(channels=5, **head.options), params, (maps,), (32, 32)))
    ids = loaded.predict(inputs)["ids"]
    clear = np.diff(np.sort(logits, axis=-1)[..., -2:], axis=-1)[..., 0] > 1e-3
    assert ids.shape == (4, 32, 32) and clear.mean() > 0.9 and len(np.unique(ids)) > 1
    np.testing.assert_array_equal(ids[clear], logits.argmax(-1)[clear])


def test_depth(tensors, golden, tmp_path):
    """DPT reads four blocks; the reference's mean and deviation make meters of what it says; an unused unit is left out and named."""
    encoder, heads = tensors
    deeper = {key.replace("encoder.0.", "encoder.3."): value for key, value in encoder.items() if key.startswith("encoder.0.")}
    loaded, plan = converted(tmp_path, of_inputs(encoder, "rgb") | deeper | heads["depth"])
    assert loaded.config["objective"]["head"] == dict(name="dpt", form="regression", width=24, layer_dims=[8, 16, 32, 64])
    assert loaded.model.layers == (1, 2, 3, 4) and loaded.config["objective"]["task"] == dict(name="regression", target="depth")
    assert len(plan.left_out) == 4 and all(".refinenet4.resConfUnit1." in key for key in plan.left_out)
    inputs = {"rgb": golden[0]["rgb"][:1]}
    output, _ = loaded.objective._output(loaded.params, {}, {"rgb": jnp.asarray((inputs["rgb"] / 255 - RGB["mean"]) / RGB["std"])}, None)
    found = loaded.predict(inputs)
    np.testing.assert_allclose(found["meters"], np.asarray(output) * 0.7775723 + 2.0707764, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["values"], found["meters"] * 1000, rtol=1e-5)


def test_what_the_training_arguments_say(tensors):
    """Which token a classifier reads; whose tokens a head reads."""
    encoder, heads = tensors
    for task, args, key, expected in (
        ("cls", dict(use_mean_pooling=False), "pool", "global"),
        ("semseg", dict(decoder_main_tasks="depth"), "read_from", ("depth",)),
        ("semseg", dict(decoder_main_tasks="gone"), "read_from", ("rgb",)),
    ):
        state = of_inputs(encoder, "rgb", "depth") | heads[task]
        checkpoint = convert.Checkpoint(
            path=Path("x"), digest="", content=(), state=state, args=args, adam=None, epochs_done=None, parts={}
        )
        assert convert.understand(checkpoint, num_heads=3).config["objective"][key] == expected


def test_a_head_that_reads_all_inputs(tensors, tmp_path):
    encoder, heads = tensors
    state = of_inputs(encoder, "rgb", "depth") | heads["semseg"]
    state["output_adapters.semseg.proj_dec.weight"] = np.tile(state["output_adapters.semseg.proj_dec.weight"], (1, 2))
    loaded, _ = converted(tmp_path, state)
    assert loaded.config["objective"]["read_from"] == ["rgb", "depth"]


def test_refusals(tensors, tmp_path):
    encoder, heads = tensors
    one = of_inputs(encoder, "rgb")
    lacking = {key: value for key, value in heads["cls"].items() if not key.endswith("norm.bias")}
    wide = dict(heads["semseg"], **{"output_adapters.semseg.proj_dec.weight": np.zeros((96, 60), np.float32)})
    extra = dict(heads["cls"], **{"output_adapters.cls.extra": np.zeros(2, np.float32)})
    cases = [
        (heads["cls"] | heads["depth"], "has heads or decoders of cls, depth, and a fine-tuned model has one; --allow 'output_adapters"),
        (lacking, "1 tensors are missing: output_adapters.cls.norm.bias"),
        (extra, "1 tensors are not part of this model: output_adapters.cls.extra"),
        (wide, "the head reads 60 channels, but the tokens of rgb have 48 each"),
        (heads["depth"], "the head reads 4 blocks, but the encoder has 3"),
    ]
    for i, (head, message) in enumerate(cases):
        written(tmp_path / f"{i}.safetensors", one, head)
        with pytest.raises(ConversionError, match=message):
            convert.convert(tmp_path / f"{i}.safetensors", tmp_path / f"to_{i}", num_heads=3)
    convert.convert(tmp_path / "0.safetensors", tmp_path / "one", num_heads=3, allow=[r"output_adapters\.depth\..*"])
    assert maskvit.load(tmp_path / "one").config["objective"]["task"]["num_classes"] == 5


def test_it_begins_another_run(tensors, tmp_path):
    """The head that a file holds is taken over by a run of the same task."""
    encoder, heads = tensors
    loaded, _ = converted(tmp_path, of_inputs(encoder, "rgb") | heads["cls"])
    own = {name: tuple(x.shape) for name, x in tree_paths(loaded.params).items()}
    assert loaded.objective.differences(own, own) == ([], [])
