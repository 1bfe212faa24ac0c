"""`--verify` against a MultiMAE in torch: agreement with all inputs and with inputs left out, and mistakes that only those show."""

from __future__ import annotations

import pathlib
import sys

import numpy as np
import pytest

import convert_torch_checkpoint
from maskvit.convert import verify
from maskvit.convert.checkout import import_reference
from maskvit.convert.reader import ConversionError
from maskvit.heads import spatial
from maskvit.objectives import build_objective

torch = pytest.importorskip("torch")
FILE, HEADS = "multimae_tiny_public.pth", (3, 4)


@pytest.fixture
def checkout(tmp_path):
    """A folder as a user's checkout of the reference."""
    package = tmp_path / "checkout" / "multimae"
    package.mkdir(parents=True)
    source = pathlib.Path(__file__).with_name("torch_multimae.py")
    (package / "multimae.py").write_text(source.read_text())
    (package / "__init__.py").write_text("from .multimae import *\n")
    yield package.parent
    for name in [name for name in sys.modules if name.partition(".")[0] == "multimae"]:
        del sys.modules[name]


def test_all_sets_of_inputs():
    assert verify.input_sets(("a", "b", "c")) == [
        ("a", "b", "c"), ("b", "c"), ("a", "c"), ("a", "b"), ("a",), ("b",), ("c",)
    ]  # fmt: skip
    assert verify.input_sets(("a", "b")) == [("a", "b"), ("b",), ("a",)] and verify.input_sets(("a",)) == [("a",)]


def test_agreement_with_inputs_left_out(checkout, fixtures, capsys, monkeypatch):
    arguments = ["--src", str(fixtures / FILE), "--verify", str(checkout), "--num-heads", "3", "--decoder-num-heads", "4"]
    monkeypatch.setattr("sys.argv", ["convert_torch_checkpoint.py", *arguments])
    assert convert_torch_checkpoint.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "agreement" and len(lines) == 2 + 7 * 4
    assert any(line.startswith("rgb, depth ") and " semseg " in line for line in lines)
    differences = [float(line.split()[-3]) for line in lines[1:-1]]
    assert max(differences) < 1e-4


def test_queries_without_their_modality_are_found(checkout, fixtures, capsys, monkeypatch):
    """As the decoders were: the queries of an output that is not among the inputs lacked its embedding."""
    right = spatial.places

    def wrong(table, embeds, names, grids):
        return right(table, embeds if len(names) > 1 else {}, names, grids)

    monkeypatch.setattr(spatial, "places", wrong)
    monkeypatch.setattr(verify, "input_sets", lambda inputs: [inputs, inputs[:-1]])
    assert not verify.verify(fixtures / FILE, checkout, build_objective, None, *HEADS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("DISAGREEMENT")
    wholes = [line for line in lines if line.startswith("rgb, depth, semseg ")]
    assert len(wholes) == 4 and not any("differs" in line for line in wholes)
    assert any(line.startswith("rgb, depth ") and " semseg " in line and "differs" in line for line in lines)


def test_the_stand_in_is_the_reference(checkout, fixtures):
    """Its predictions are those that were recorded of the public code."""
    golden = np.load(fixtures / "multimae_tiny.npz")
    from maskvit.convert import open_checkpoint, understand

    checkpoint = open_checkpoint(fixtures / FILE)
    model = build_objective(understand(checkpoint, *HEADS).config).model
    network = verify.loaded_reference(import_reference(checkout), model, checkpoint)
    depth = golden["depth_standardized"]
    for i in range(2):
        inputs = {"rgb": golden["rgb"][i : i + 1], "depth": depth[i : i + 1], "semseg": golden["semseg"][i : i + 1].astype(np.int64)}
        masks = {name: torch.from_numpy(golden[f"mask_{name}"][i : i + 1].astype(np.int64)) for name in inputs}
        with torch.no_grad():
            predicted, _ = network({name: torch.from_numpy(value) for name, value in inputs.items()}, True, masks, 8)
        for name in ("rgb", "depth", "semseg", "norm_rgb"):
            np.testing.assert_allclose(predicted[name].numpy(), golden[f"pred_{name}"][i : i + 1], rtol=1e-4, atol=1e-5)


def test_only_multimae_has_its_reference(checkout, fixtures):
    with pytest.raises(ConversionError, match="is MAE; --verify compares MultiMAE's own files with its own code"):
        verify.verify(fixtures / "mae_tiny_full.pth", checkout, build_objective)
