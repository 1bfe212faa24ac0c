"""`python -m maskvit export`: a program with its weights inside says what the checkpoint says, for every batch size, without maskvit."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import maskvit
from maskvit.checkpoints import save_imported
from maskvit.commands import export as command
from maskvit.core.types import Batch
from tests.test_fine_tuned_models import CLASSES, NAMES, fine_tuned, saved
from tests.tiny import fresh_params, tiny_batch, tiny_config, tiny_objective


def exported(checkpoint, dst, *more):
    """(the program as JAX reads it, what is said about it)."""
    assert command.main(["--checkpoint", str(checkpoint), "--dst", str(dst), *more]) == 0
    return jax.export.deserialize(bytearray(dst.read_bytes())), json.loads(dst.with_name(dst.name + ".json").read_text())


def agree(program, expected, given):
    found = program.call(given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_a_classifier_says(tmp_path, capsys):
    """For two batch sizes, on three kinds of device, from the weights that were asked for."""
    saved(tmp_path / "run", fine_tuned(CLASSES, ema_decay=0.9), label_names=NAMES, licence="CC-BY-NC 4.0")
    written = []
    for weights in ("params", "ema"):
        program, about = exported(tmp_path / "run", tmp_path / f"{weights}.stablehlo", "--weights", weights)
        loaded = maskvit.load(tmp_path / "run", weights)
        for count in (1, 3):
            pictures = tiny_batch(count)["rgb"]
            agree(program, {"probabilities": loaded.predict(pictures)["probabilities"]}, {"rgb": pictures})
        written.append(np.asarray(program.call({"rgb": pictures})["probabilities"]))
    assert np.abs(written[0] - written[1]).max() > 1e-4
    assert tuple(program.platforms) == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
    assert (about["function"], about["classes"], about["licence"], about["weights"]) == ("predict", NAMES, "CC-BY-NC 4.0", "ema")
    assert about["inputs"] == {"rgb": {"shape": ["b", 32, 32, 3], "dtype": "uint8", "values": "0 to 255; normalized inside"}}
    assert about["outputs"] == {"probabilities": {"shape": ["b", 7], "dtype": "float32"}}
    said = capsys.readouterr().out
    assert "predict: rgb uint8 [b, 32, 32, 3] to probabilities float32 [b, 7]" in said and "licence of these weights: CC-BY-NC 4.0" in said


def test_maps_of_several_inputs(tmp_path):
    """Running statistics come along; every input has the type it is stored with; meters where the unit is known."""
    task = dict(name="regression", target="depth")
    config = fine_tuned(task, head=dict(name="linear", norm="batch"), inputs=("rgb", "semseg", "heat"))
    config["modalities"]["semseg"]["missing"] = 255
    config["modalities"]["heat"] = dict(channels=1, patch=8, scale=0.01, missing=0)
    saved(tmp_path / "run", config)
    program, about = exported(tmp_path / "run", tmp_path / "x.stablehlo")
    assert {name: form["dtype"] for name, form in about["inputs"].items()} == {"rgb": "uint8", "semseg": "int32", "heat": "float32"}
    assert about["inputs"]["semseg"]["values"] == "class ids 0 to 6, -1 where there is no label" and about["classes"] == []
    batch = tiny_batch(2)
    batch["semseg"] = np.repeat(np.repeat(batch["semseg"], 4, axis=1), 4, axis=2)
    batch["semseg"][0, :9] = -1
    batch["heat"] = batch.pop("depth")
    batch["heat"][1, 3:20] = np.nan
    expected = maskvit.load(tmp_path / "run").predict(batch)
    assert expected.keys() == {"values", "meters"}
    agree(program, expected, batch)


def test_features_of_models_that_were_not_fine_tuned_and_of_others_on_demand(tmp_path, capsys):
    save_imported(tmp_path / "pretrained", fresh_params(tiny_objective()), {"config": tiny_config()})
    saved(tmp_path / "run", fine_tuned(CLASSES))
    for name, more in (("pretrained", ()), ("run", ("--function", "features"))):
        program, about = exported(tmp_path / name, tmp_path / f"{name}.stablehlo", *more)
        loaded, pictures = maskvit.load(tmp_path / name), {"rgb": tiny_batch(2)["rgb"]}
        agree(program, jax.jit(loaded.objective.predict)(loaded.params, (), Batch(pictures)), pictures)
        assert about["function"] == "features" and about["outputs"].keys() == {"mean", "global"}
    arguments = ["--checkpoint", str(tmp_path / "pretrained"), "--dst", str(tmp_path / "x.stablehlo"), "--function", "predict"]
    assert command.main(arguments) == 2 and "has no task: fine-tune it first" in capsys.readouterr().err
    assert not (tmp_path / "x.stablehlo").exists()


def test_attention_is_plain_whatever_the_checkpoint_says(tmp_path):
    """A kernel of one kind of GPU could not run here: neither that of a run that asks for it, nor one that "auto" would choose there."""
    _, params, _ = saved(tmp_path / "plain", fine_tuned(CLASSES, compute_dtype="bfloat16", attention="plain"))
    save_imported(tmp_path / "fused", params, {"config": fine_tuned(CLASSES, compute_dtype="bfloat16", attention="cudnn")})
    program, _ = exported(tmp_path / "fused", tmp_path / "x.stablehlo")
    pictures, loaded = tiny_batch(2)["rgb"], maskvit.load(tmp_path / "plain")
    agree(program, {"probabilities": loaded.predict(pictures)["probabilities"]}, {"rgb": pictures})
    fused = dataclasses.replace(loaded.model, attention_kernel="cudnn")
    there = loaded._replace(model=fused, objective=dataclasses.replace(loaded.objective, model=fused))
    for function in command.FUNCTIONS:
        command.as_stablehlo(command.program_of(there, function))


def test_onnx_says_the_same(tmp_path):
    """In float32 whatever the model computes in, inputs and outputs by name, for a batch of any size."""
    pytest.importorskip("jax2onnx", reason="pip install 'maskvit[onnx-export]'")
    runtime = pytest.importorskip("onnxruntime")
    config = fine_tuned(dict(name="regression", target="depth"), head=dict(name="linear", norm="batch"), inputs=("rgb", "semseg"))
    _, params, state = saved(tmp_path / "run", config)
    config["objective"]["compute_dtype"] = "bfloat16"
    save_imported(tmp_path / "half", params, {"config": config}, objective_state=state)
    for name in ("run", "half"):
        assert command.main(["--checkpoint", str(tmp_path / name), "--dst", str(tmp_path / f"{name}.onnx")]) == 0
        session = runtime.InferenceSession(tmp_path / f"{name}.onnx")
        assert json.loads((tmp_path / f"{name}.onnx.json").read_text())["compute_dtype"] == "float32"
        for count in (1, 3):
            batch = {name: value for name, value in tiny_batch(count).items() if name in ("rgb", "semseg")}
            batch["semseg"] = np.repeat(np.repeat(batch["semseg"], 4, axis=1), 4, axis=2)
            expected = maskvit.load(tmp_path / "run").predict(batch)
            found = dict(zip((output.name for output in session.get_outputs()), session.run(None, batch), strict=True))
            assert found.keys() == expected.keys() == {"values", "meters"}
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-4, err_msg=key)


def test_onnx_needs_its_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    saved(tmp_path / "run", fine_tuned(CLASSES))
    assert command.main(["--checkpoint", str(tmp_path / "run"), "--dst", str(tmp_path / "x.onnx")]) == 2
    assert "pip install 'maskvit[onnx-export]'" in capsys.readouterr().err and not (tmp_path / "x.onnx").exists()


READING = """
import sys
import numpy as np
from jax import export
program = export.deserialize(bytearray(open("x.stablehlo", "rb").read()))
print(np.asarray(program.call({"rgb": np.load("rgb.npy")})["probabilities"]).tolist())
assert "maskvit" not in sys.modules and "flax" not in sys.modules
"""


def test_it_is_read_without_maskvit(tmp_path):
    saved(tmp_path / "run", fine_tuned(CLASSES))
    exported(tmp_path / "run", tmp_path / "x.stablehlo")
    pictures = tiny_batch(2)["rgb"]
    np.save(tmp_path / "rgb.npy", pictures)
    child = subprocess.run([sys.executable, "-c", READING], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    np.testing.assert_allclose(json.loads(child.stdout), maskvit.load(tmp_path / "run").predict(pictures)["probabilities"], atol=1e-5)


@pytest.mark.parametrize(
    ("dst", "message"),
    [("x.bin", "its suffix says the format: .stablehlo or .onnx"), ("there/x.stablehlo", "does not exist: make it first")],
)
def test_where_nothing_can_be_written(dst, message, tmp_path, capsys):
    """Said before the checkpoint is opened: here there is none."""
    assert command.main(["--checkpoint", str(tmp_path / "none"), "--dst", str(tmp_path / dst)]) == 2
    assert message in capsys.readouterr().err


def test_weights_that_are_too_large(tmp_path, monkeypatch, capsys):
    saved(tmp_path / "run", fine_tuned(CLASSES))
    monkeypatch.setattr(command, "LARGEST", 1000)
    assert command.main(["--checkpoint", str(tmp_path / "run"), "--dst", str(tmp_path / "x.stablehlo")]) == 2
    assert "its weights take 0.0 GiB, and a .stablehlo file holds less than 2 GiB" in capsys.readouterr().err
